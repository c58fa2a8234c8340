"""Pages of lists whose cursors are ids: what comes behind or before one of them, in the order of their making.

What has been deleted keeps its place in its list for a while, so that who deletes what a page shows can go on behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from jobs.connections import redis_errors
from jobs.errors import NotFound

#: Members of a list read in one round trip.
STEP = 200
#: Seconds that what is gone keeps its place.
GONE_S = 86_400

Item = TypeVar("Item")


class Asked(NamedTuple):
    """A page that somebody asks for: at most `limit` items right behind the id `after`, or right before the id `before`."""

    limit: int
    after: str | None = None
    before: str | None = None
    newest_first: bool = True


def page(
    client: Any, name: str, asked: Asked, read: Callable[[Sequence[str]], Sequence[Item | None]]
) -> tuple[list[Item], bool]:
    """Items of the sorted set `name`, and whether there are more that way. `read` gives those of some ids, None to skip one.

    Raises `NotFound` for an unknown cursor.
    """
    backwards = asked.before is not None
    # Those before a cursor are met in the opposite order: from it on.
    newest_first = asked.newest_first != backwards
    cursor = asked.before if backwards else asked.after
    if cursor is not None and _rank(client, name, cursor, newest_first) is None:
        raise NotFound("the list has no such cursor")
    items: list[Item] = []
    while len(items) <= asked.limit:
        ids = _behind(client, name, cursor, newest_first)
        if not ids:
            break
        items += [item for item in read(ids) if item is not None]
        cursor = ids[-1]
    more = len(items) > asked.limit
    del items[asked.limit :]
    return (items[::-1] if backwards else items), more


def _rank(client: Any, name: str, member: str, newest_first: bool) -> int | None:
    with redis_errors():
        found = client.zrevrank(name, member) if newest_first else client.zrank(name, member)
    return None if found is None else int(found)


def _behind(client: Any, name: str, cursor: str | None, newest_first: bool) -> list[str]:
    """The next ids; none where the cursor is gone meanwhile."""
    start = 0
    if cursor is not None:
        rank = _rank(client, name, cursor, newest_first)
        if rank is None:
            return []
        start = rank + 1
    with redis_errors():
        found = client.zrange(name, start, start + STEP - 1, desc=newest_first)
    ids = [raw.decode() for raw in found]
    # Something new may have come in between, and moved them all by one.
    return ids[ids.index(cursor) + 1 :] if cursor in ids else ids


def forget(client: Any, name: str, exists: Callable[[str], str], before: float) -> None:
    """Takes off a list what was made before that unix time and is gone; `exists` names the key that tells."""
    start = 0
    with redis_errors():
        while members := client.zrangebyscore(name, "-inf", f"({before!r}", start=start, num=STEP):
            pipe = client.pipeline(transaction=False)
            for raw in members:
                pipe.exists(exists(raw.decode()))
            gone = [raw for raw, there in zip(members, pipe.execute(), strict=True) if not there]
            if gone:
                client.zrem(name, *gone)
            start += len(members) - len(gone)
