"""Who calls: tokens, what they may do, and how often.

A token comes as `Authorization: Bearer` or `X-Api-Key`. What the store says of one is kept for `FRESH_S`, so a revoked
token ends within that time; while the store is away, what was known is taken for `STALE_S`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from api.problems import Problem
from api.threads import StoreThreads
from jobs import keys, tokens
from jobs.connections import redis_errors
from jobs.errors import StoreUnavailable
from jobs.settings import is_loopback
from jobs.tokens import SCOPES, Token

FRESH_S = 2.0
STALE_S = 60.0
#: Tokens that are remembered, unknown ones too.
REMEMBERED = 10_000
#: Seconds between two rounds in which the requests of all processes are added up.
COUNT_S = 0.5
#: Seconds that the store keeps a minute's count.
COUNT_KEPT_S = 180


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is at the door: a tenant, what it may do, and its requests a minute (None: any)."""

    tenant: str
    token_id: str
    scopes: frozenset[str]
    rpm: int | None = None

    @property
    def reads(self) -> bool:
        """Whether it may see answers."""
        return "read" in self.scopes

    def need(self, scope: str) -> None:
        """Raises a `Problem` unless the token has this scope."""
        if scope not in self.scopes:
            raise Problem(403, "scope_missing", f"this token lacks the scope `{scope}`")


#: Where no token is asked for: sees what has no tenant, jobs of the command line among them.
ANYBODY = Caller("", "", frozenset(SCOPES))


class Auth:
    """Knows callers by their headers; `rpm` is for tokens without one of their own."""

    def __init__(self, threads: StoreThreads, asks: bool, rpm: int | None) -> None:
        self._threads = threads
        self._asks = asks
        self._rpm = rpm
        self._known: dict[str, tuple[float, Token | None]] = {}
        self._fetching: dict[str, asyncio.Task[Token | None]] = {}

    async def caller(self, headers: Iterable[tuple[bytes, bytes]]) -> Caller:
        """Who sends these headers (names in lower case). Raises a `Problem` (401)."""
        if not self._asks:
            _refuse_web_pages(headers)
            return ANYBODY
        given = _given(headers)
        if not given:
            raise _refused("a token is needed: send it as `Authorization: Bearer ...` or `X-Api-Key`")
        parts = tokens.split(given)
        token = await self._token(parts[0]) if parts is not None else None
        if token is None or not tokens.matches(token, given):
            raise _refused("this token is not known; `mimoq token create` makes one")
        return Caller(token.tenant, token.id, frozenset(token.scopes), token.rpm or self._rpm)

    async def _token(self, token_id: str) -> Token | None:
        at, token = self._known.get(token_id, (None, None))
        if at is not None and time.monotonic() - at < FRESH_S:
            return token
        task = self._fetching.get(token_id)
        if task is None:
            task = self._fetching[token_id] = asyncio.create_task(self._fetch(token_id))
            task.add_done_callback(lambda _: self._fetching.pop(token_id, None))
        try:
            return await asyncio.shield(task)
        except StoreUnavailable:
            if at is not None and time.monotonic() - at < STALE_S:
                return token
            raise

    async def _fetch(self, token_id: str) -> Token | None:
        token = await self._threads.call(lambda store: store.patience.call(tokens.find, store.client, token_id))
        if len(self._known) >= REMEMBERED:  # most of them made up
            self._known = {known: entry for known, entry in self._known.items() if entry[1] is not None}
        self._known[token_id] = (time.monotonic(), token)
        return token


def _refuse_web_pages(headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Where nobody is asked for a token, a page in this machine's browser must not be taken for its user.

    Raises a `Problem` (403) for a request that names another host than this machine, or comes from another's page.
    """
    host, origin = "", None
    for name, value in headers:
        if name == b"host":
            host = value.decode("latin-1")
        elif name == b"origin":
            origin = value.decode("latin-1")
    try:
        here = is_loopback(urlsplit(f"//{host}").hostname or "")
    except ValueError:
        here = False
    if not here or origin not in (None, f"http://{host}"):
        raise Problem(403, "other_host", "without tokens only this machine's own programs are served: use 127.0.0.1")


def _given(headers: Iterable[tuple[bytes, bytes]]) -> str:
    bearer = key = b""
    for name, value in headers:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            bearer = value[7:].strip()
        elif name == b"x-api-key":
            key = value.strip()
    return (bearer or key).decode("latin-1")


def _refused(detail: str) -> Problem:
    return Problem(401, "unauthorized", detail, headers={"WWW-Authenticate": "Bearer"})


class Rates:
    """Counts requests of tokens, over all processes: each adds its own to the store's twice a second."""

    def __init__(self, threads: StoreThreads) -> None:
        self._threads = threads
        self._minute = 0
        self._seen: dict[str, int] = {}  # of all processes, by token, this minute
        self._untold: dict[str, int] = {}  # of this one, since it was told last

    def count(self, caller: Caller) -> None:
        """One more request. Raises a `Problem` (429) when its minute is full."""
        if caller.rpm is None:
            return
        now = time.time()
        if int(now // 60) != self._minute:
            self._minute = int(now // 60)
            self._seen.clear()
            self._untold.clear()
        used = self._seen.get(caller.token_id, 0) + self._untold.get(caller.token_id, 0)
        if used >= caller.rpm:
            left_s = str(int(60 - now % 60) + 1)
            raise Problem(
                429,
                "rate_limited",
                f"this token may make {caller.rpm:,} requests a minute; go on in {left_s} s",
                headers={"Retry-After": left_s},
            )
        self._untold[caller.token_id] = self._untold.get(caller.token_id, 0) + 1

    async def run(self) -> None:
        """Tells and asks until cancelled."""
        while True:
            await asyncio.sleep(COUNT_S)
            if not self._untold:
                continue
            minute, told, self._untold = self._minute, self._untold, {}
            for token_id, count in told.items():
                self._seen[token_id] = self._seen.get(token_id, 0) + count
            try:
                totals = await self._threads.call(lambda store: _add(store.client, minute, told))  # noqa: B023
            except StoreUnavailable:
                continue  # this process's own are counted all the same
            if minute == self._minute:
                self._seen.update(totals)


def _add(client: Any, minute: int, told: dict[str, int]) -> dict[str, int]:
    pipe = client.pipeline(transaction=False)
    with redis_errors():
        for token_id, count in told.items():
            pipe.incrby(keys.rate(token_id, minute), count)
            pipe.expire(keys.rate(token_id, minute), COUNT_KEPT_S)
        replies = pipe.execute()
    return dict(zip(told, replies[::2], strict=True))
