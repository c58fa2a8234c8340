"""The workers' side of the store: claim slices, renew their leases, end jobs, give them back.

A lease is a worker's time-limited claim on the jobs of a slice, with a random fencing token. All functions are one round
trip of one Lua script; they are idempotent, so a caller that does not know whether a call arrived makes it again.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jobs import keys
from jobs.blocks import decode_block, decode_large
from jobs.requests import Request
from jobs.results import Usage
from jobs.scripts import Call, Script

#: Seconds a lease lasts unless it is renewed; what a dead worker held is free again after this and a reaper's round.
LEASE_S = 10.0

_claim = Script("claim")
_finish = Script("finish")
_give_back = Script("give_back")
_renew = Script("renew")
_reap = Script("reap")
_unheard = Script("unheard")


@dataclass(slots=True)
class Job:
    """One claimed job; `attempts` is the stored JSON of earlier attempts, `request` never shows."""

    batch_id: str
    index: int
    token: str
    request: Request = field(repr=False)
    attempts: bytes = field(repr=False)
    crashes: int
    max_attempts: int | None
    ttl_s: int
    lane: str = "bulk"

    @property
    def job_id(self) -> str:
        return f"{self.batch_id}-{self.index}"


@dataclass(frozen=True, slots=True)
class End:
    """How a job ended: `letter` is `s` or `f`, `code` a failure's; usage and attempts over all its calls."""

    job: Job
    letter: str
    payload: bytes = field(repr=False)
    calls: int
    usage: Usage
    code: str = ""


async def claim(
    client: Any, worker_id: str, lane: str, labels: Iterable[str], wanted: int, lease_s: float = LEASE_S
) -> list[Job]:
    """Up to `wanted` ready jobs of the lane, the batches in turn, leased to this worker."""
    token = secrets.token_hex(8)
    lanes = [keys.lane(lane, label) for label in labels]
    slices = await _claim(client, [keys.PREFIX, keys.turn(lane), *lanes], [worker_id, token, lease_s, wanted])
    found: list[Job] = []
    for batch_id, fence, indexes, crashes, block, first, history, large, most, ttl in slices:
        requests = decode_block(block) if block else []
        attempts = dict(zip(history[::2], history[1::2], strict=True))
        fields = dict(zip(large[::2], large[1::2], strict=True))
        for raw in indexes.split(b","):
            index = int(raw)
            request = decode_large(fields[raw]) if raw in fields else requests[index - first]
            assert request is not None  # a gap in a block always has its field
            found.append(
                Job(
                    batch_id=batch_id.decode(),
                    index=index,
                    token=fence.decode(),
                    request=request,
                    attempts=attempts.get(raw, b""),
                    crashes=int(crashes),
                    max_attempts=int(most) if most else None,
                    ttl_s=int(ttl),
                    lane=lane,
                )
            )
    return found


def finish_call(batch_id: str, ends: list[End], stored_elsewhere: bool = False) -> Call:
    """Stores ends of jobs of one batch; one word each, as bytes: `ended`, `again`, `late` or `fenced` (see finish.lua)."""
    args: list[Any] = [batch_id]
    for end in ends:
        usage = end.usage
        args += (
            end.job.index,
            end.job.token,
            end.letter,
            b"" if stored_elsewhere else end.payload,
            end.calls,
            usage.prompt_tokens,
            usage.completion_tokens,
            usage.reasoning_tokens,
            usage.cached_tokens,
            usage.total_tokens,
            end.job.ttl_s,
            end.code,
        )
    return Call(_finish, [keys.PREFIX], args)


async def finish(client: Any, batch_id: str, ends: list[End], stored_elsewhere: bool = False) -> list[str]:
    """`finish_call`, made alone."""
    script, names, args = finish_call(batch_id, ends, stored_elsewhere)
    return [word.decode() for word in await script(client, names, args)]


def give_back_call(batch_id: str, jobs: Iterable[tuple[Job, float, bytes]]) -> Call:
    """Gives jobs of one batch back: `(job, seconds to wait, JSON of its attempts so far)`; replies how many are ready."""
    args: list[Any] = [batch_id]
    for job, delay_s, attempts in jobs:
        args += (job.index, job.token, delay_s, attempts)
    return Call(_give_back, [keys.PREFIX], args)


async def give_back(client: Any, batch_id: str, jobs: Iterable[tuple[Job, float, bytes]]) -> int:
    """`give_back_call`, made alone."""
    script, names, args = give_back_call(batch_id, jobs)
    return int(await script(client, names, args))


class Renewed(NamedTuple):
    """What a renewal found: tokens that are lost, whose batch is being cancelled or has expired, whose batch is paused."""

    lost: set[str]
    closing: set[str]
    paused: set[str]


async def renew(client: Any, tokens: Iterable[str], lease_s: float = LEASE_S) -> Renewed:
    """Renews leases."""
    found = await _renew(client, [keys.PREFIX], [lease_s, *tokens])
    return Renewed(*({token.decode() for token in tokens} for tokens in found))


async def reap(client: Any, leases: int = 200, batches: int = 100) -> tuple[int, int]:
    """Makes what nobody holds ready again; returns `(jobs taken back, batches with due retries)`."""
    taken, woken = await _reap(client, [keys.PREFIX], [leases, batches])
    return int(taken), int(woken)


async def unheard(client: Any, most: int) -> list[tuple[str, str, str, int]]:
    """`(lane, label, a batch, ready slices up to most)` of every lane with ready work."""
    found = await _unheard(client, [keys.PREFIX], [most])
    return [(lane.decode(), label.decode(), batch.decode(), int(slices)) for lane, label, batch, slices in found]
