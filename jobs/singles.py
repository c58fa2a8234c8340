"""Single jobs, each a batch of one, written together: what is submitted at about the same time costs one round trip.

What goes wrong: a store that is away is waited for as `jobs.patience` says. Enlisting is idempotent by batch id, so what
may have arrived is sent again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jobs import keys
from jobs.blocks import encode_blocks
from jobs.connections import redis_errors
from jobs.errors import Conflict, MimoqError, Unanswered
from jobs.looks import JobLook
from jobs.patience import Patience
from jobs.requests import Request
from jobs.room import Room
from jobs.scripts import Script
from jobs.states import JobState, job_id
from jobs.submission import NewBatch

#: Bytes of requests that go into one step of the store, which serves nobody else meanwhile.
STEP_BYTES = 1_000_000

#: What can be done about a submit of which nobody knows whether it arrived.
MAYBE = "it may have been submitted all the same: send it again with the same Idempotency-Key, or look for it first"

_enlist = Script("enlist")


@dataclass(frozen=True, slots=True)
class Single:
    """One job to be made a batch of its own.

    `join` is a digest under which a waiting call that is made again finds it for `join_s` seconds, '' for none; `again` says
    that this is one made again, which makes no job where it finds one.
    """

    new: NewBatch
    request: Request = field(repr=False)
    join: str = ""
    join_s: int = 0
    again: bool = False

    @property
    def size(self) -> int:
        """Bytes of its request, about."""
        return len(self.request.body) + 500

    def arguments(self) -> list[Any]:
        """What enlist.lua takes of it."""
        new = self.new
        ((fields, _),) = encode_blocks([self.request], new.slice_size)
        requests = [item for pair in fields.items() for item in pair]
        further = [*new.further(), "single", 1, "endpoint", self.request.endpoint]
        if self.request.custom_id is not None:
            further += ["custom_id", self.request.custom_id]
        return [
            new.batch_id,
            new.lane,
            new.label,
            new.identity,
            new.content,
            new.ttl_s,
            "" if new.deadline_s is None else new.deadline_s,
            new.tenant,
            self.join,
            self.join_s,
            int(self.again),
            len(fields),
            *requests,
            len(further) // 2,
            *further,
        ]


class Enlisted(NamedTuple):
    """What came of one; `created` is False where its idempotency key's job was there, and then `created_at` is 0.

    It may be 0 also where the store was asked twice. Unix seconds.
    """

    batch_id: str
    created: bool
    created_at: float


def enlist(client: Any, singles: Sequence[Single], patience: Patience, room: Room) -> list[Enlisted | Exception]:
    """Makes each a batch of one; what came of each, in order: its batch, or why there is none.

    Of those that nobody has answered for that is `Unanswered`: they may have been made.
    """
    came: list[Enlisted | Exception] = []
    tried = False

    def step(block: Sequence[Single]) -> Any:
        nonlocal tried
        arguments = [block[0].new.slice_size]
        for single in block:
            arguments += single.arguments()
        again, tried = tried, True
        if not again:
            room.check(len(block), sum(single.size for single in block))
        with redis_errors():
            return again, _enlist(client, [keys.PREFIX], arguments)

    for block in _blocks(singles):
        tried = False
        try:
            again, replies = patience.call(step, block)
        except MimoqError as error:
            told = Unanswered(f"{error}; {MAYBE}") if patience.unanswered else error
            return [*came, *[told] * len(block), *[error] * (len(singles) - len(came) - len(block))]
        came += [_outcome(single, reply, again) for single, reply in zip(block, replies, strict=True)]
        room.added(sum(isinstance(item, Enlisted) and item.created for item in came[-len(block) :]))
    return came


def _outcome(single: Single, reply: list[bytes], again: bool) -> Enlisted | Exception:
    word, batch_id = reply[0].decode(), reply[1].decode()
    if word == "conflict":
        return Conflict("this idempotency key came before with another body; nothing was submitted: use a new key")
    # One of this very id that is there when it is asked for again was made the time before.
    created = word == "created" or (again and batch_id == single.new.batch_id)
    return Enlisted(batch_id, created, float(reply[2]) if len(reply) > 2 else 0.0)


def _blocks(singles: Sequence[Single]) -> list[list[Single]]:
    """Consecutive ones, in blocks of at most `STEP_BYTES`, and of one slice size."""
    blocks: list[list[Single]] = []
    size = 0
    for single in singles:
        size += single.size
        if not blocks or size > STEP_BYTES or single.new.slice_size != blocks[-1][0].new.slice_size:
            blocks.append([])
            size = single.size
        blocks[-1].append(single)
    return blocks


def queued(single: Single, enlisted: Enlisted) -> JobLook:
    """The look of a job that has just been made."""
    new = single.new
    return JobLook(
        job_id=job_id(enlisted.batch_id, 0),
        batch_id=enlisted.batch_id,
        index=0,
        state=JobState.QUEUED,
        custom_id=single.request.custom_id,
        endpoint=single.request.endpoint,
        lane=new.lane,
        metadata=new.metadata,
        callback=new.callback,
        created_at=enlisted.created_at,
        ended_at=None,
        deadline_at=None if new.deadline_s is None else enlisted.created_at + new.deadline_s,
        not_before=None,
        single=True,
        attempts=[],
        stored=None,
    )
