"""How far the provider's limits are used: the read side of the limiter that the metrics show.

One look is three round trips, however many models there are; the models used last come first. All times are unix seconds
by the Redis server's clock. The moves are the workers': `worker/lua/limits.lua` says what the records hold.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import msgspec

from jobs import keys
from jobs.connections import redis_errors
from jobs.gates import Gate
from jobs.settings import Settings

if TYPE_CHECKING:
    import redis

#: Models looked at.
LOOKED_AT = 100
#: As in limits.lua: the log of the last minute has a bin for each quarter of a second, and keeps it for so long.
BIN_S = 0.25
KEPT_S = 60.5

_FIELDS = (
    "sum_r",
    "sum_t",
    "first",
    "last",
    "window",
    "rate",
    "told_rpm",
    "told_tpm",
    "gate_reason",
    "gate_status",
    "gate_since",
    "gate_until",
)
_GATE = ("reason", "status", "since", "until", "refused_at")


class Level(msgspec.Struct, frozen=True):
    """How much of a limit is used, and how much is allowed: None where there is no limit."""

    used: float
    allowed: float | None


class Limits(msgspec.Struct, frozen=True):
    """One (account, model): its limits by their name (requests, tokens, concurrency), calls in flight by lane, its gate."""

    account: str
    model: str
    limits: dict[str, Level]
    in_flight: dict[str, int]
    gate: Gate | None


def all_limits(client: redis.Redis, settings: Settings) -> tuple[list[Limits], list[Gate]]:
    """The limits of the models used last, and the shut gates of their accounts.

    `settings` say which limits were given: those of whoever looks, which should be the workers'.
    """
    any_client: Any = client
    with redis_errors():
        pipe = any_client.pipeline(transaction=False)
        pipe.time()
        pipe.zrevrange(keys.LIMITS, 0, LOOKED_AT - 1)
        (seconds, micros), members = pipe.execute()
        now = seconds + micros / 1e6
        names = [(account, model) for account, _, model in (raw.decode().partition(":") for raw in members)]
        accounts = sorted({account for account, _ in names})
        pipe = any_client.pipeline(transaction=False)
        for account in accounts:
            pipe.hmget(keys.gate(account), *_GATE)
        for account, model in names:
            pipe.hmget(keys.limit(account, model), *_FIELDS)
            for lane in keys.LANES:
                pipe.zcount(keys.flight(lane, account, model), f"({now:.6f}", "+inf")
        replies = pipe.execute()
        gates = [_gate(account, None, reply) for account, reply in zip(accounts, replies, strict=False)]
        rows = [replies[at : at + 3] for at in range(len(accounts), len(replies), 3)]
        gone = _gone(any_client, names, [row[0] for row in rows], now)
    found = []
    for (account, model), (record, *flights), left in zip(names, rows, gone, strict=True):
        fields = dict(zip(_FIELDS, record, strict=True))
        found.append(_limits(account, model, fields, flights, left, settings))
    return found, [gate for gate in gates if gate is not None]


def _gone(
    client: Any, names: list[tuple[str, str]], records: list[Any], now: float
) -> list[tuple[float, float] | None]:
    """Requests and tokens of each record that have left its last minute since it was last used; None: all of them."""
    stop = math.floor((now - KEPT_S) / BIN_S) - 1
    found: list[tuple[float, float] | None] = [(0.0, 0.0)] * len(names)
    asked = []
    pipe = client.pipeline(transaction=False)
    for at, ((account, model), record) in enumerate(zip(names, records, strict=True)):
        first, last = record[_FIELDS.index("first")], record[_FIELDS.index("last")]
        if first is None or float(last) <= stop:
            found[at] = None
        elif float(first) <= stop:
            bins = range(int(float(first)), stop + 1)
            pipe.hmget(keys.minute(account, model), [f"{kind}{number}" for kind in "rt" for number in bins])
            asked.append((at, len(bins)))
    for (at, count), values in zip(asked, pipe.execute(), strict=True):
        numbers = [float(value or 0) for value in values]
        found[at] = sum(numbers[:count]), sum(numbers[count:])
    return found


def _limits(
    account: str,
    model: str,
    record: dict[str, bytes | None],
    flights: list[int],
    gone: tuple[float, float] | None,
    settings: Settings,
) -> Limits:
    number = {name: float(value) for name, value in record.items() if value and name != "gate_reason"}
    requests = tokens = 0.0
    if gone is not None:
        requests, tokens = number.get("sum_r", 0.0) - gone[0], number.get("sum_t", 0.0) - gone[1]
    learned = number["rate"] * 60 if "rate" in number else None
    window = math.floor(number["window"]) if "window" in number else None
    limits = {
        "requests": Level(max(requests, 0.0), _least(settings.rpm, number.get("told_rpm"), learned)),
        "tokens": Level(max(tokens, 0.0), _least(settings.tpm, number.get("told_tpm"))),
        "concurrency": Level(sum(flights), _least(settings.max_in_flight, window)),
    }
    gate = [record[f"gate_{name}"] for name in ("reason", "status", "since", "until")]
    in_flight = dict(zip(keys.LANES, flights, strict=True))
    return Limits(account, model, limits, in_flight, _gate(account, model, [*gate, None]))


def _least(*limits: float | None) -> float | None:
    return min((float(limit) for limit in limits if limit is not None), default=None)


def _gate(account: str, model: str | None, fields: list[bytes | None]) -> Gate | None:
    reason, status, since, until, refused_at = fields
    if not reason:
        return None
    return Gate(
        account=account,
        model=model,
        reason=reason.decode(),
        status=int(status) if status else None,
        since=float(since or 0),
        until=float(until or 0),
        refused_at=float(refused_at) if refused_at else None,
    )
