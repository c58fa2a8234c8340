"""Gates that are shut: the read side that displays show, and the way for a run to have its key tried at once.

A gate means that nobody calls before a time, and for what reason. One of an account shuts all its models, one of a model
that model alone. All times are unix seconds by the Redis server's clock. The moves are the workers'.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from jobs import keys
from jobs.connections import redis_errors

if TYPE_CHECKING:
    import redis

#: Limit records that are looked at, the last used first.
LOOKED_AT = 1_000
#: Seconds between probes of a gate that is tried anew; the pause doubles from there.
FIRST_STEP_S = 0.5


class Gate(msgspec.Struct, frozen=True):
    """A shut account, or one `model` of it: why, the status that shut it, since when, when one call tries it next.

    `refused_at` is when the account's last call was refused.
    """

    account: str
    model: str | None
    reason: str
    status: int | None
    since: float
    until: float
    refused_at: float | None = None

    @property
    def why(self) -> str:
        """The reason, with its status where there was one: `key_refused (401)`."""
        return self.reason if self.status is None else f"{self.reason} ({self.status})"

    def wait_s(self, now: float) -> float:
        """Seconds from `now`, a time of the server's, to the next probe."""
        return max(0.0, self.until - now)


def gates_of(client: redis.Redis, account: str) -> list[Gate]:
    """The shut gates of an account: its own first, then those of its models by their names."""
    any_client: Any = client
    own = account_gate(client, account)
    head = f"{account}:"
    with redis_errors():
        known = [name.decode() for name in any_client.zrevrange(keys.LIMITS, 0, LOOKED_AT - 1)]
        models = sorted(name.removeprefix(head) for name in known if name.startswith(head))
        pipe = any_client.pipeline(transaction=False)
        for model in models:
            pipe.hmget(keys.limit(account, model), "gate_reason", "gate_status", "gate_since", "gate_until")
        replies = pipe.execute()
    gates = [] if own is None else [own]
    for model, (reason, status, since, until) in zip(models, replies, strict=True):
        if reason:
            gates.append(Gate(account, model, reason.decode(), _status(status), float(since), float(until)))
    return gates


def account_gate(client: redis.Redis, account: str) -> Gate | None:
    """The account's own gate, or None while it is open."""
    any_client: Any = client
    names = ("reason", "status", "since", "until", "refused_at")
    with redis_errors():
        reason, status, since, until, refused_at = any_client.hmget(keys.gate(account), *names)
    if not reason:
        return None
    refused = float(refused_at) if refused_at else None
    return Gate(account, None, reason.decode(), _status(status), float(since), float(until), refused)


def _status(raw: bytes | None) -> int | None:
    return int(raw) if raw else None


def open_gate(client: redis.Redis, account: str) -> float:
    """Lets one call of a shut account go at once, as a probe; returns the server's time at that moment.

    The gate itself stays until the probe is answered, so what is refused later than the returned time is news. A pause that
    the upstream asked for is kept.
    """
    any_client: Any = client
    gate = keys.gate(account)

    def step(pipe: Any) -> None:
        reason, asked_until = pipe.hmget(gate, "reason", "asked_until")
        pipe.multi()
        if reason:
            pipe.hset(gate, mapping={"until": asked_until or 0, "step_s": FIRST_STEP_S})
        pipe.time()

    with redis_errors():
        return _seconds(any_client.transaction(step, gate)[-1])


def server_time(client: redis.Redis) -> float:
    """The Redis server's clock."""
    any_client: Any = client
    with redis_errors():
        return _seconds(any_client.time())


def _seconds(reply: tuple[int, int]) -> float:
    return reply[0] + reply[1] / 1e6
