"""Follow-ups: what the end of a job brings about in Celery, written down in the step that ends it.

A batch whose record has a `followup` gets one for each of its jobs, however these end. It is either a link (`jobs.links`) or
the rest of a Celery task `mimoq.complete`: its result, its chord's part, its chain, its callbacks. Any worker process
sees to it (`worker.followups`), at least once: each is leased, and one whose worker dies is due again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from jobs import keys
from jobs.connections import redis_errors
from jobs.links import Link
from jobs.scripts import Script
from jobs.states import TERMINAL, JobState

#: Seconds after which a follow-up that its worker has not settled is due again.
LEASE_S = 30.0

_take = Script("followups_take")
_settle = Script("followups_settle")


class Ending(msgspec.Struct, frozen=True, tag="task"):
    """A Celery task that ends with its job: `signature` is the JSON, by kombu, of what its message said of it."""

    signature: str

    def __repr__(self) -> str:
        return "Ending()"


_encode = msgspec.json.Encoder().encode
_decode: msgspec.json.Decoder[Link | Ending] = msgspec.json.Decoder(Link | Ending)


class FollowUp(NamedTuple):
    """One that was taken: of which job, the due time that stands for its lease, which try this is, how the job ended.

    `state` is None where the job goes on after all, `what` where its batch is no longer kept.
    """

    job_id: str
    lease: str
    tries: int
    state: JobState | None
    what: Link | Ending | None


def ending(signature: str) -> str:
    """What the record of a task's job holds."""
    return _encode(Ending(signature)).decode()


def take(client: Any, wanted: int, lease_s: float = LEASE_S) -> list[FollowUp]:
    """Up to `wanted` follow-ups that are due, by a sync client. Raises `StoreUnavailable`."""
    names = [keys.PREFIX, keys.FOLLOWUPS, keys.FOLLOWUP_TRIES]
    with redis_errors():
        rows = _take(client, names, [lease_s, wanted])
    return [
        FollowUp(
            job_id.decode(),
            lease.decode(),
            int(tries),
            TERMINAL[letter[0]] if letter else None,
            _decode.decode(what) if what else None,
        )
        for job_id, lease, tries, letter, what in rows
    ]


def done(client: Any, followup: FollowUp) -> None:
    """It is seen to, or given up. Raises `StoreUnavailable`; settled late it is seen to again."""
    _settled(client, followup, "")


def later(client: Any, followup: FollowUp, wait_s: float) -> None:
    """It is to be tried again. Raises `StoreUnavailable`; its lease runs out then."""
    _settled(client, followup, wait_s)


def _settled(client: Any, followup: FollowUp, wait_s: float | str) -> None:
    names = [keys.PREFIX, keys.FOLLOWUPS, keys.FOLLOWUP_TRIES]
    # A task ends once, whatever becomes of its job after that.
    once = "1" if isinstance(followup.what, Ending) and wait_s == "" else ""
    with redis_errors():
        _settle(client, names, [followup.job_id, followup.lease, wait_s, once])


def pending(client: Any) -> int:
    """How many wait to be seen to, by a sync client. Raises `StoreUnavailable`."""
    with redis_errors():
        return int(client.zcard(keys.FOLLOWUPS))
