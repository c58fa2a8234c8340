"""The outbox of webhooks: what is to be told to a callback address, from the end of a job or batch until it has arrived.

An event is written in the step that ends its job or batch, so none is lost; `api.deliverer` takes it from here and sends it,
at least once and with the same id each time. All times are unix seconds by the Redis server's clock. The functions take
an async client, but for `dead_count`; each is one round trip or a few of one Lua script, and may be called again when its
answer was lost.
"""

from __future__ import annotations

import base64
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal, cast

from jobs import keys
from jobs.connections import redis_errors
from jobs.errors import NotFound
from jobs.scripts import Script

#: Seconds a taken event is its taker's own; one whose taker died is due again after it.
LEASE_S = 60.0
#: Seconds from its beginning (its job's end, or a wish to try again) that an event is tried.
TRIED_S = 86_400
#: Seconds that what has arrived, or was given up, can still be seen.
DELIVERED_KEPT_S = 86_400
DEAD_KEPT_S = 30 * 86_400
#: Due events looked at in one step; how many of these stay due while their host or tenant is busy; seconds the others are
#: put off.
LOOKED_AT = 500
STAYING = 250
PUT_OFF_S = 3.0
#: Random bytes of a secret.
SECRET_BYTES = 32

State = Literal["pending", "delivered", "dead"]
Told = Literal["delivered", "failed", "gone"]
Settled = Literal["delivered", "failed", "dead", "stale"]

_take = Script("outbox_take")
_settle = Script("outbox_settle")
_list = Script("outbox_list")
_again = Script("outbox_again")


@dataclass(frozen=True, slots=True)
class Due:
    """A taken event: its `attempt`-th try, the `tries`-th since its beginning; `host` is that of the address."""

    id: str
    host: str
    attempt: int
    tries: int
    type: str
    subject: str
    url: str = field(repr=False)
    tenant: str
    created_at: float


@dataclass(frozen=True, slots=True)
class Event:
    """What a tenant is shown of one webhook; `due_at` is None unless it is pending. The address is not in its `repr`."""

    id: str
    type: str
    subject: str
    url: str = field(repr=False)
    state: State
    created_at: float
    attempts: int
    due_at: float | None
    last_at: float | None
    last_status: int | None
    last_error: str | None


@dataclass(frozen=True, slots=True)
class Page:
    """Events, the newest first; `next` is the `after` of the next page, None at the end. It may be short of the limit."""

    events: list[Event]
    next: str | None


async def take(
    client: Any,
    wanted: int,
    per_host: int,
    per_tenant: int,
    flying: Iterable[tuple[str, str]] = (),
    lease_s: float = LEASE_S,
) -> tuple[list[Due], float | None]:
    """Events that are due, leased to the caller, and seconds until more may be (0: at once; None: there are none).

    At most `per_host` of one host and `per_tenant` of one tenant come, counting those under way: `flying` holds the host and
    the tenant of each.
    """
    args = [lease_s, wanted, per_host, per_tenant, LOOKED_AT, STAYING, PUT_OFF_S, *chain.from_iterable(flying)]
    wait, *rows = await _take(client, [keys.PREFIX, keys.OUTBOX], args)
    taken = [
        Due(
            id=row[0].decode(),
            host=row[1].decode(errors="replace"),
            attempt=row[2],
            tries=row[3],
            type=row[4].decode(),
            subject=row[5].decode(),
            url=row[6].decode(errors="replace"),
            tenant=row[7].decode(),
            created_at=float(row[8]),
        )
        for row in rows
    ]
    return taken, float(wait) if wait else None


async def settle(client: Any, due: Due, told: Told, status: int | None, error: str | None, wait_s: float) -> Settled:
    """Writes what came of a try; a `failed` one is due again after `wait_s`, or dead if its time is over.

    Returns what became of the event; `stale`: it has been taken again since, or had ended, and nothing was written.
    """
    args = [
        due.id,
        due.attempt,
        told,
        "" if status is None else status,
        error or "",
        wait_s,
        TRIED_S,
        DELIVERED_KEPT_S,
        DEAD_KEPT_S,
    ]
    word = await _settle(client, [keys.PREFIX, keys.OUTBOX, keys.DEAD], args)
    return cast("Settled", word.decode())


async def events_of(
    client: Any, tenant: str, limit: int = 100, after: str | None = None, state: State | None = None
) -> Page:
    """A page of a tenant's events, of that state; the newest, or those older than the event `after`.

    Raises `NotFound` if the tenant has no event `after`.
    """
    names = [keys.PREFIX, keys.tenant_events(tenant), keys.OUTBOX]
    reply = await _list(client, names, [after or "", limit, max(limit, LOOKED_AT), state or ""])
    if not reply:
        raise NotFound(f"no webhook event has the id {after!r}")
    mark, *rows = reply
    return Page([_event(row) for row in rows], mark.decode() or None)


async def again(client: Any, tenant: str, event_id: str) -> bool:
    """Has a dead or pending event delivered now, and tried as long as at first; returns False if it has arrived already.

    Raises `NotFound` if the tenant has no such event.
    """
    names = [keys.PREFIX, keys.OUTBOX, keys.DEAD, keys.tenant_events(tenant)]
    word = await _again(client, names, [event_id, tenant])
    if word == b"unknown":
        raise NotFound(f"no webhook event has the id {event_id!r}")
    return bool(word == b"pending")


def dead_count(client: Any) -> int:
    """How many events of all tenants were given up and can still be seen, by a sync client. Raises `StoreUnavailable`."""
    with redis_errors():
        seconds, _ = client.time()
        return int(client.zcount(keys.DEAD, seconds - DEAD_KEPT_S, "+inf"))


async def secret_of(client: Any, tenant: str) -> str:
    """What a tenant's webhooks are signed with, `whsec_` and base64; made when it is first asked for."""
    found = await client.hget(keys.SECRETS, tenant)
    if found is None:
        await client.hsetnx(keys.SECRETS, tenant, new_secret())
        found = await client.hget(keys.SECRETS, tenant)  # another process may have been first
    return str(found.decode())


def new_secret() -> str:
    """A secret as Standard Webhooks writes it."""
    return "whsec_" + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()


def _event(row: list[Any]) -> Event:
    event_id, due_at, *pairs = row
    record = {name.decode(): value.decode() for name, value in zip(pairs[::2], pairs[1::2], strict=True)}
    return Event(
        id=event_id.decode(),
        type=record["type"],
        subject=record["subject"],
        url=record["url"],
        state=cast("State", record.get("state", "pending")),
        created_at=float(record["created_at"]),
        attempts=int(record["attempts"]),
        due_at=float(due_at) if due_at else None,
        last_at=float(record["last_at"]) if record.get("last_at") else None,
        last_status=int(record["last_status"]) if record.get("last_status") else None,
        last_error=record.get("last_error") or None,
    )
