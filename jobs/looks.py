"""Looks at jobs as their submitters see them: several of any batches in one round trip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from jobs import keys
from jobs.about import with_account
from jobs.backends import ResultBackend
from jobs.blocks import decode_block, decode_large
from jobs.connections import redis_errors
from jobs.requests import Request
from jobs.results import Attempt, StoredResult, decode_result
from jobs.scripts import Script
from jobs.states import TERMINAL, JobState, job_id

#: What look.lua tells of the record, '' for what it has not.
FIELDS = (
    "size",
    "lane",
    "closing",
    "closing_at",
    "created_at",
    "finished_at",
    "deadline_at",
    "metadata",
    "callback",
    "endpoint",
    "custom_id",
    "single",
    "account",
)

_look = Script("look")
_decode_attempts = msgspec.json.Decoder(list[Attempt]).decode


class Wanted(NamedTuple):
    """A job that somebody asks for: of which tenant, in which batch, at which place in it."""

    tenant: str
    batch_id: str
    place: int


@dataclass(frozen=True, slots=True)
class JobLook:
    """One look at a job; times in unix seconds, `metadata` a JSON object or ''.

    `stored` is its result once it has ended, None where none is kept; `attempts` are those so far, also of a job that has
    not ended; `single` says that it was submitted alone.
    """

    job_id: str
    batch_id: str
    index: int
    state: JobState
    custom_id: str | None
    endpoint: str
    lane: str
    metadata: str
    callback: str
    created_at: float
    ended_at: float | None
    deadline_at: float | None
    not_before: float | None
    single: bool
    attempts: list[Attempt] = field(repr=False)
    stored: StoredResult | None = field(repr=False)


def look(client: Any, backend: ResultBackend, wanted: Sequence[Wanted]) -> list[JobLook | None]:
    """The jobs, None where the tenant has no such job; `backend` is where their results are."""
    if not wanted:
        return []
    arguments: list[Any] = [len(FIELDS), *FIELDS]
    for item in wanted:
        arguments += item
    with redis_errors():
        replies = _look(client, [keys.PREFIX], arguments)
    answers = _answers(backend, wanted, replies)
    return [
        None if reply is None else _job(client, item, reply, answer)
        for item, reply, answer in zip(wanted, replies, answers, strict=True)
    ]


def _answers(backend: ResultBackend, wanted: Sequence[Wanted], replies: list[Any]) -> list[StoredResult | None]:
    """Stored results of those that have ended, from wherever they are kept."""
    if backend.with_state:
        return [decode_result(reply[4]) if reply is not None and reply[4] else None for reply in replies]
    ended = [place for place, reply in enumerate(replies) if reply is not None and reply[0]]
    answers: list[StoredResult | None] = [None] * len(replies)
    found = backend.read([job_id(wanted[place].batch_id, wanted[place].place) for place in ended])
    for place, stored in zip(ended, found, strict=True):
        answers[place] = stored
    return answers


def _job(client: Any, item: Wanted, reply: list[Any], stored: StoredResult | None) -> JobLook:
    byte, claimed, not_before, attempts, _, block, *values = reply
    record = dict(zip(FIELDS, (value.decode() for value in values), strict=True))
    about = with_account(stored.mimoq, record["account"]) if stored is not None and stored.mimoq is not None else None
    if byte:
        state = TERMINAL[byte[0]]
    elif claimed:
        state = JobState.RUNNING
    else:
        # What nobody holds of a closing batch has ended with it, written down or not.
        state = TERMINAL[ord(record["closing"])] if record["closing"] else JobState.QUEUED
    endpoint, custom_id = record["endpoint"], record["custom_id"] or None
    if not endpoint and about is not None and stored is not None and stored.status != "REVOKED":
        endpoint, custom_id = about.endpoint, about.custom_id
    elif not endpoint and (request := _request(client, item, block, int(record["size"]))) is not None:
        endpoint, custom_id = request.endpoint, request.custom_id
    return JobLook(
        job_id=job_id(item.batch_id, item.place),
        batch_id=item.batch_id,
        index=item.place,
        state=state,
        custom_id=custom_id,
        endpoint=endpoint,
        lane=record["lane"],
        metadata=record["metadata"],
        callback=record["callback"],
        created_at=float(record["created_at"]),
        ended_at=_ended_at(state, stored, record["closing_at"] or record["finished_at"]),
        deadline_at=float(record["deadline_at"]) if record["deadline_at"] else None,
        not_before=float(not_before) if not_before else None,
        single=bool(record["single"]),
        attempts=about.attempts if about is not None else _decode_attempts(attempts) if attempts else [],
        stored=stored,
    )


def _ended_at(state: JobState, stored: StoredResult | None, otherwise: str) -> float | None:
    """When a job ended; what was cancelled or has expired ended with its batch's closing, whenever that is written down."""
    if not state.terminal:
        return None
    told = stored.ended_at if stored is not None else None
    return told if told is not None else float(otherwise) if otherwise else None


def _request(client: Any, item: Wanted, block: bytes, size: int) -> Request | None:
    if not block:
        return None
    found = decode_block(block)[item.place % size]
    if found is None:  # a large one, which stands by itself
        with redis_errors():
            raw = client.hget(keys.requests(item.batch_id), f"r{item.place}")
        found = decode_large(raw) if raw else None
    return found
