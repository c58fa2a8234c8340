"""Pages whose cursors are ids, over a real Valkey: nothing twice, nothing left out, whatever is deleted or comes in."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs import cursors
from jobs.connections import connect
from jobs.cursors import STEP, Asked, forget, page
from jobs.errors import NotFound

LIST = "list"

_prefixes = itertools.count()


@pytest.fixture
def client(store_url: str) -> Iterator[Any]:
    with connect(store_url) as client:
        yield client


def fill(client: Any, count: int, name: str = LIST) -> list[str]:
    """So many members, `m0000` the oldest."""
    members = [f"m{n:04}" for n in range(count)]
    client.zadd(name, {member: 1_000.0 + n for n, member in enumerate(members)})
    return members


def all_of(ids: Sequence[str]) -> list[str | None]:
    """Each id is its own item."""
    return list(ids)


def but(gone: set[str]) -> Callable[[Sequence[str]], list[str | None]]:
    """Each id is its own item, but for those that are gone."""
    return lambda ids: [None if member in gone else member for member in ids]


def walk(client: Any, limit: int, gone: set[str] | None = None, **asked: Any) -> list[list[str]]:
    """All pages one after the other, forwards."""
    pages: list[list[str]] = []
    after = None
    while True:
        items, more = page(client, LIST, Asked(limit, after, **asked), but(gone or set()))
        pages.append(items)
        if not more:
            return pages
        assert len(items) == limit
        after = items[-1]


def test_pages_in_both_orders(client: Any) -> None:
    members = fill(client, 7)
    assert walk(client, 3) == [members[:3:-1], members[3:0:-1], members[0:1]]
    assert walk(client, 3, newest_first=False) == [members[:3], members[3:6], members[6:]]
    assert walk(client, 7) == [members[::-1]]
    assert walk(client, 100) == [members[::-1]]


def test_a_list_of_nothing(client: Any) -> None:
    assert page(client, LIST, Asked(5), all_of) == ([], False)
    with pytest.raises(NotFound):
        page(client, LIST, Asked(5, "m0000"), all_of)


def test_what_comes_before_is_the_page_right_before(client: Any) -> None:
    members = fill(client, 10)
    newest = members[::-1]
    assert page(client, LIST, Asked(3, before=newest[8]), all_of) == (newest[5:8], True)
    assert page(client, LIST, Asked(3, before=newest[3]), all_of) == (newest[0:3], False)
    assert page(client, LIST, Asked(3, before=newest[0]), all_of) == ([], False)
    assert page(client, LIST, Asked(2, before=members[4], newest_first=False), all_of) == (members[2:4], True)


@pytest.mark.parametrize("asked", [Asked(2, "m0009"), Asked(2, before="m0009"), Asked(2, ""), Asked(2, "\x00é\n" * 60)])
def test_an_unknown_cursor_is_an_error(client: Any, asked: Asked) -> None:
    fill(client, 3)
    with pytest.raises(NotFound):
        page(client, LIST, asked, all_of)


def test_behind_the_last_there_is_nothing(client: Any) -> None:
    members = fill(client, 3)
    assert page(client, LIST, Asked(2, members[0]), all_of) == ([], False)
    assert page(client, LIST, Asked(2, members[-1], newest_first=False), all_of) == ([], False)


def test_what_is_gone_is_passed_over_and_still_a_cursor(client: Any) -> None:
    members = fill(client, 6)
    newest = members[::-1]
    assert page(client, LIST, Asked(2), but({newest[0], newest[2]})) == ([newest[1], newest[3]], True)
    assert page(client, LIST, Asked(2, newest[2]), but({newest[2]})) == ([newest[3], newest[4]], True)
    # Whether there is more is asked of what is still there.
    assert page(client, LIST, Asked(2), but(set(newest[2:]))) == (newest[:2], False)
    assert page(client, LIST, Asked(2), but(set(members))) == ([], False)


def test_many_that_are_gone_between_two_that_are_not(client: Any) -> None:
    members = fill(client, 3 * STEP + 20)
    gone = set(members[5 : 3 * STEP])
    assert walk(client, 20, gone, newest_first=False) == [
        members[:5] + members[3 * STEP : 3 * STEP + 15],
        members[3 * STEP + 15 :],
    ]
    assert (
        page(client, LIST, Asked(3, before=members[5], newest_first=True), but(gone))[0]
        == members[3 * STEP : 3 * STEP + 3][::-1]
    )


def test_deleting_what_each_page_shows(client: Any) -> None:
    members = fill(client, 11)
    gone: set[str] = set()
    seen: list[str] = []
    after = None
    more = True
    while more:
        items, more = page(client, LIST, Asked(2, after), but(gone))
        gone.update(items)
        seen += items
        after = items[-1]
    assert seen == members[::-1]


def test_what_comes_in_between_two_looks_at_one_page(client: Any) -> None:
    """Newest first, each new member moves all others by one."""
    members = fill(client, 2 * STEP)
    new = itertools.count(5_000)

    def read(ids: Sequence[str]) -> list[str | None]:
        for _ in range(3):
            number = next(new)
            client.zadd(LIST, {f"n{number}": float(number)})
        return list(ids)

    items, more = page(client, LIST, Asked(2 * STEP - 1), read)
    assert (items, more) == (members[:0:-1], True)


def test_a_new_one_between_finding_the_cursor_and_reading_on(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    members = fill(client, 6)
    found = cursors._rank

    def rank(*args: Any) -> int | None:
        place = found(*args)
        client.zadd(LIST, {"new": 9_000.0})
        return place

    monkeypatch.setattr(cursors, "_rank", rank)
    items, more = page(client, LIST, Asked(3, members[4]), all_of)
    assert (items, more) == (members[3:0:-1], True)


def test_a_cursor_that_is_forgotten_meanwhile(client: Any) -> None:
    members = fill(client, 3 * STEP)

    def read(ids: Sequence[str]) -> list[str | None]:
        client.delete(LIST)
        return list(ids)

    items, more = page(client, LIST, Asked(2 * STEP, newest_first=False), read)
    assert (items, more) == (members[:STEP], False)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    count=st.integers(0, 30),
    limit=st.integers(1, 12),
    gone=st.sets(st.integers(0, 29)),
    newest_first=st.booleans(),
)
def test_pages_are_the_list(client: Any, count: int, limit: int, gone: set[int], newest_first: bool) -> None:
    """Forwards and backwards alike, ties of time included."""
    name = f"list{next(_prefixes)}"
    members = [f"m{n:04}" for n in range(count)]
    if members:
        client.zadd(name, {member: 1_000.0 + n // 3 for n, member in enumerate(members)})
    missing = {f"m{n:04}" for n in gone}
    kept = [member for member in (members[::-1] if newest_first else members) if member not in missing]
    seen: list[str] = []
    after = None
    more = True
    while more:
        items, more = page(client, name, Asked(limit, after, None, newest_first), but(missing))
        seen += items
        after = items[-1] if items else None
    assert seen == kept
    if not kept:
        return
    seen, before, more = [], kept[-1], True
    while more:
        items, more = page(client, name, Asked(limit, None, before, newest_first), but(missing))
        seen = items + seen
        before = items[0] if items else before
    assert seen == kept[:-1]


def test_forgetting_what_is_gone_and_old(client: Any) -> None:
    members = fill(client, 2 * STEP + 50)
    there = set(random.Random(0).sample(members, STEP))
    for member in there:
        client.set(f"thing:{member}", "1")
    old = members[: 2 * STEP]
    forget(client, LIST, lambda member: f"thing:{member}", 1_000.0 + 2 * STEP)
    kept = [raw.decode() for raw in client.zrange(LIST, 0, -1)]
    assert kept == [member for member in members if member in there or member not in old]
    forget(client, LIST, lambda member: f"thing:{member}", 1e12)
    assert [raw.decode() for raw in client.zrange(LIST, 0, -1)] == sorted(there)
