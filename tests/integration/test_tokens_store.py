"""Tokens of the API in a real store."""

from __future__ import annotations

import contextlib
import re
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jobs import keys, tokens
from jobs.connections import connect
from jobs.errors import Conflict, MimoqError, NotFound, StoreUnavailable, UsageError
from jobs.tokens import Token
from producers import cli

#: `mimoq token ARGS`: its status, stdout and stderr.
Mimoq = Callable[..., tuple[int, str, str]]


@pytest.fixture
def client(store_url: str) -> Iterator[Any]:
    client = connect(store_url)
    yield client
    client.close()


def of(client: Any, text: str) -> Token:
    """What the store knows of a token, by its text."""
    parts = tokens.split(text)
    assert parts is not None
    found = tokens.find(client, parts[0])
    assert found is not None
    return found


def test_a_token_is_found_by_its_id_and_its_text_is_kept_nowhere(client: Any) -> None:
    text = tokens.create(client, "ci", ["read"], 60)
    assert re.fullmatch(r"mq_[0-9a-f]{12}_[\w-]{43}", text, re.ASCII)
    found = of(client, text)
    assert (found.name, found.tenant, found.scopes, found.rpm) == ("ci", found.id, ["read"], 60)
    assert tokens.matches(found, text)
    secret = text.rpartition("_")[2]
    for name, value in client.hgetall(keys.TOKENS).items():
        assert secret.encode() not in name + value
    assert client.keys("*") == [keys.TOKENS.encode()]
    assert tokens.find(client, "0" * 12) is None


def test_each_token_is_a_tenant_unless_it_is_told_another(client: Any) -> None:
    first, second = (of(client, tokens.create(client, name)) for name in ("a", "b"))
    assert first.tenant != second.tenant
    third = of(client, tokens.create(client, "c", tenant=first.tenant))
    assert (third.tenant, third.scopes, third.rpm) == (first.tenant, ["submit", "read"], None)
    assert [token.name for token in tokens.all_tokens(client)] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("name", "scopes", "rpm", "part"),
    [
        ("", ["read"], None, "1 to 64"),
        ("n" * 65, ["read"], None, "1 to 64"),
        ("a\nb", ["read"], None, "printable"),
        ("\udcff", ["read"], None, "printable"),
        (" a", ["read"], None, "space"),
        ("a", [], None, "needs a scope"),
        ("a", ["read", "admin"], None, "'admin' is none of submit, read"),
        ("a", ["read"], 0, "rpm"),
    ],
)
def test_what_can_not_be_is_refused(client: Any, name: str, scopes: list[str], rpm: int | None, part: str) -> None:
    with pytest.raises(UsageError, match=part):
        tokens.create(client, name, scopes, rpm)
    assert tokens.all_tokens(client) == []


def test_a_name_is_given_once_however_many_ask_for_it_at_a_time(client: Any, store_url: str) -> None:
    made: list[str] = []
    refused: list[MimoqError] = []
    ready = threading.Barrier(8)

    def ask(one: Any) -> None:
        ready.wait()
        try:
            made.append(tokens.create(one, "same"))
        except MimoqError as error:
            refused.append(error)

    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(contextlib.closing(connect(store_url))) for _ in range(8)]
        threads = [threading.Thread(target=ask, args=(one,)) for one in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (len(made), [type(error) for error in refused]) == (1, [Conflict] * 7)
    assert tokens.matches(of(client, made[0]), made[0])
    assert len(tokens.all_tokens(client)) == 1


def test_a_token_is_revoked_by_name_or_id_and_its_name_is_free_again(client: Any) -> None:
    first, second = (of(client, tokens.create(client, name)) for name in ("a", "b"))
    assert tokens.revoke(client, "a") == first
    assert tokens.revoke(client, second.id) == second
    assert tokens.all_tokens(client) == []
    for gone in ("a", second.id, ""):
        with pytest.raises(NotFound):
            tokens.revoke(client, gone)
    assert of(client, tokens.create(client, "a")).tenant != first.tenant


def test_a_replaced_token_leaves_its_tenant_to_the_next(client: Any) -> None:
    old = tokens.create(client, "serve", ["read"], 7)
    before = of(client, old)
    text = tokens.replace(client, "serve")
    after = of(client, text)
    assert (after.name, after.tenant, after.scopes, after.rpm) == ("serve", before.tenant, ["read"], 7)
    assert tokens.all_tokens(client) == [after]
    assert not tokens.matches(after, old)
    with pytest.raises(NotFound):
        tokens.replace(client, "another")


def test_a_store_that_is_away_is_told(tmp_path: Any) -> None:
    with contextlib.closing(connect(f"unix://{tmp_path}/nobody.sock")) as client:
        for call in (
            lambda: tokens.create(client, "a"),
            lambda: tokens.find(client, "a"),
            lambda: tokens.all_tokens(client),
            lambda: tokens.revoke(client, "a"),
        ):
            with pytest.raises(StoreUnavailable):
                call()


# -- on the command line


@pytest.fixture
def mimoq(store_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Mimoq:
    """`mimoq token ARGS`: its status, stdout and stderr."""
    monkeypatch.setenv("MIMOQ_REDIS_URL", store_url)

    def call(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mimoq", "token", *args])
        status = cli.main()
        out, err = capsys.readouterr()
        return status, out, err

    return call


def test_create_prints_the_token_alone_and_list_shows_no_secret(mimoq: Mimoq, client: Any) -> None:
    status, out, err = mimoq("create", "--name", "ci", "--scope", "read", "--rpm", "60")
    assert (status, err) == (0, "")
    first = of(client, out.removesuffix("\n"))
    assert tokens.matches(first, out.removesuffix("\n"))
    assert (first.scopes, first.rpm) == (["read"], 60)
    status, other, _ = mimoq("create", "--name", "next", "--same-tenant-as", "ci", "--scope", "read, submit")
    second = of(client, other.strip())
    assert (second.tenant, second.scopes) == (first.tenant, ["submit", "read"])

    status, listed, err = mimoq("list")
    assert (status, err) == (0, "")
    one, two = listed.splitlines()
    assert all(part in one for part in (first.id, "ci", f"tenant {first.tenant}", "read", "rpm 60"))
    assert "submit,read" in two
    for text, token in ((out, first), (other, second)):
        assert text.strip().rpartition("_")[2] not in listed
        assert token.digest not in listed

    assert mimoq("revoke", "ci") == (0, "", f"token ci ({first.id}) is revoked\n")
    assert mimoq("revoke", second.id)[0] == 0
    assert mimoq("list") == (0, "no tokens\n", "")


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["create"], "Missing option"),
        (["create", "--name", ""], "1 to 64"),
        (["create", "--name", "a", "--scope", "write"], "'write' is none of submit, read"),
        (["create", "--name", "a", "--scope", ","], "needs a scope"),
        (["create", "--name", "a", "--rpm", "0"], "--rpm"),
        (["create", "--name", "taken"], "'taken' is there already"),
        (["create", "--name", "a", "--same-tenant-as", "nobody"], "no token 'nobody'"),
        (["revoke", "nobody"], "no token 'nobody'"),
    ],
)
def test_what_is_wrong_is_told_and_changes_nothing(mimoq: Mimoq, client: Any, args: list[str], part: str) -> None:
    tokens.create(client, "taken")
    status, out, err = mimoq(*args)
    assert (status, out) == (2, "")
    assert part in err.splitlines()[-1]
    assert [token.name for token in tokens.all_tokens(client)] == ["taken"]
