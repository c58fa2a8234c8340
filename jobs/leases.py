"""The workers' side of the store: claim slices, renew their leases, end jobs, give them back.

A lease is a worker's time-limited claim on the jobs of a slice, with a random fencing token. All functions are one round
trip of one Lua script; they are idempotent, so a caller that does not know whether a call arrived makes it again.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jobs import keys
from jobs.blocks import decode_block, decode_large
from jobs.requests import Request
from jobs.results import NO_USAGE, Usage
from jobs.scripts import Call, Script

#: Seconds a lease lasts unless it is renewed; what a dead worker held is free again after this and a reaper's round.
LEASE_S = 10.0
#: Seconds without a reaper's round after which live workers may have lost leases for no fault of theirs.
GAP_S = 6.0
#: Seconds after which a worker that says nothing is no longer listed.
LISTED_S = 15

_claim = Script("claim")
_quarantine = Script("quarantine")
_finish = Script("finish")
_give_back = Script("give_back")
_beat = Script("beat")
_reap = Script("reap")
_audit = Script("audit")
_unheard = Script("unheard")


@dataclass(slots=True)
class Job:
    """One claimed job; `attempts` is the stored JSON of earlier attempts, `request` never shows.

    `crashes` counts workers that died holding its slice; `alone`: it is in quarantine; `leads`: it is the first of several,
    and shows at once what is wrong with them all; `account` is the batch's.
    """

    batch_id: str
    index: int
    token: str
    request: Request = field(repr=False)
    attempts: bytes = field(repr=False)
    crashes: int
    max_attempts: int | None
    ttl_s: int
    account: str = ""
    lane: str = "bulk"
    alone: bool = False
    leads: bool = False

    @property
    def job_id(self) -> str:
        return f"{self.batch_id}-{self.index}"

    @property
    def poison(self) -> bool:
        """Whether it has killed so many workers that were alone with it that it is to be ended, not called."""
        return self.crashes < 0


@dataclass(frozen=True, slots=True)
class End:
    """How a job ended: `letter` is `s` or `f`, `code` a failure's; `calls` made under this lease, and their usage."""

    job: Job
    letter: str
    payload: bytes = field(repr=False)
    calls: int
    usage: Usage
    code: str = ""


class Back(NamedTuple):
    """A job that goes back to its batch after `delay_s`; JSON of all its attempts, and what those of this lease cost."""

    job: Job
    delay_s: float = 0.0
    attempts: bytes = b""
    calls: int = 0
    usage: Usage = NO_USAGE


def _spent(calls: int, usage: Usage) -> str:
    """What common.lua calls spent; '' for nothing. Of calls that were counted before, as lost, the usage may come later."""
    if not calls and usage == NO_USAGE:
        return ""
    return (
        f"{calls},{usage.prompt_tokens},{usage.completion_tokens},{usage.reasoning_tokens},{usage.cached_tokens},"
        f"{usage.total_tokens}"
    )


async def claim(
    client: Any,
    worker_id: str,
    lane: str,
    labels: Iterable[str],
    wanted: int,
    lease_s: float = LEASE_S,
    leads: bool = False,
    account: str = "",
) -> list[Job]:
    """Up to `wanted` ready jobs of the lane, the batches in turn, leased to this worker of `account`.

    With `leads` none but the first job of a new batch; else one such job, if there are to be others.
    """
    lanes = [keys.lane(lane, label) for label in labels]
    names = [keys.PREFIX, *lanes]
    args = [worker_id, secrets.token_hex(8), lease_s, wanted, "1" if leads else "", account]
    return _jobs(await _claim(client, names, args), lane)


async def claim_quarantined(
    client: Any, worker_id: str, lane: str, labels: Iterable[str], lease_s: float = LEASE_S, account: str = ""
) -> list[Job]:
    """A job of the lane that may kill its worker, if there is one; for a worker that holds nothing else."""
    lanes = [keys.quarantine(lane, label) for label in labels]
    slices = await _quarantine(client, [keys.PREFIX, *lanes], [worker_id, secrets.token_hex(8), lease_s, account])
    return _jobs(slices, lane, alone=True)


def _jobs(slices: list[Any], lane: str, alone: bool = False) -> list[Job]:
    found: list[Job] = []
    for batch_id, fence, indexes, crashes, block, first, history, large, most, ttl, total, account in slices:
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
                    account=account.decode(),
                    lane=lane,
                    alone=alone,
                    leads=index == 0 and int(total) > 1,
                )
            )
    return found


def finish_call(batch_id: str, ends: list[End], stored_elsewhere: bool = False) -> Call:
    """Stores ends of jobs of one batch; one word each, as bytes: `ended`, `again`, `late` or `fenced` (see finish.lua)."""
    args: list[Any] = [batch_id]
    for end in ends:
        payload = b"" if stored_elsewhere else end.payload
        args += (end.job.index, end.job.token, end.letter, payload, _spent(end.calls, end.usage), end.code)
    return Call(_finish, [keys.PREFIX], args)


async def finish(client: Any, batch_id: str, ends: list[End], stored_elsewhere: bool = False) -> list[str]:
    """`finish_call`, made alone."""
    script, names, args = finish_call(batch_id, ends, stored_elsewhere)
    return [word.decode() for word in await script(client, names, args)]


def give_back_call(batch_id: str, backs: Iterable[Back]) -> Call:
    """Gives jobs of one batch back; replies how many are ready."""
    args: list[Any] = [batch_id]
    for back in backs:
        args += (back.job.index, back.job.token, back.delay_s, back.attempts, _spent(back.calls, back.usage))
    return Call(_give_back, [keys.PREFIX], args)


async def give_back(client: Any, batch_id: str, backs: Iterable[Back]) -> int:
    """`give_back_call`, made alone."""
    script, names, args = give_back_call(batch_id, backs)
    return int(await script(client, names, args))


class Beat(NamedTuple):
    """What a heartbeat found: tokens that are lost, whose batch is being cancelled or has expired, whose batch is paused;
    the time from which the account's gate may be probed (None while it is open), and the server's time."""

    lost: set[str]
    closing: set[str]
    paused: set[str]
    gate_until: float | None
    now: float


async def beat(
    client: Any,
    worker_id: str,
    said: bytes,
    account: str,
    tokens: Collection[str],
    flights: Mapping[str, Collection[str]],
    reservation_s: float,
    lease_s: float = LEASE_S,
    interactive: bool = False,
) -> Beat:
    """Says that a worker lives, and if it serves the `interactive` lane that a share of the calls in flight is to be kept;
    renews its leases, and its reservations by the key that holds them."""
    args: list[Any] = [worker_id, said, LISTED_S, int(interactive), lease_s, len(tokens), *tokens, reservation_s]
    for ids in flights.values():
        args += (len(ids), *ids)
    names = [keys.PREFIX, keys.WORKERS, keys.worker(worker_id), keys.gate(account), keys.answering(account), *flights]
    *found, gate, now = await _beat(client, names, args)
    lost, closing, paused = ({token.decode() for token in tokens} for tokens in found)
    return Beat(lost, closing, paused, float(gate) if gate else None, float(now))


class Reaped(NamedTuple):
    """What one round of the reaper found: jobs taken back, batches with due retries, leases, seconds of a gap or 0."""

    jobs: int
    woken: int
    leases: int
    gap_s: float


async def reap(
    client: Any, leases: int = 200, batches: int = 100, gap_s: float = GAP_S, patience_s: float = LEASE_S
) -> Reaped:
    """Makes what nobody holds ready again. After a gap of `gap_s` between rounds it takes nothing for `patience_s`."""
    names = [keys.PREFIX, keys.ROUNDS, keys.WORKERS, keys.DEATHS]
    found, taken, woken, gap = await _reap(client, names, [leases, batches, gap_s, patience_s])
    return Reaped(int(taken), int(woken), int(found), float(gap))


async def audit(client: Any, batch_id: str, most: int) -> int:
    """Makes ready what is unfinished of a batch and nowhere to be found; returns how many jobs, looking at `most`."""
    return int(await _audit(client, [keys.PREFIX], [batch_id, most]))


async def unheard(client: Any, most: int) -> list[tuple[str, str, str, int]]:
    """`(lane, label, a batch, ready slices up to most)` of every lane with ready work."""
    found = await _unheard(client, [keys.PREFIX], [most])
    return [(lane.decode(), label.decode(), batch.decode(), int(slices)) for lane, label, batch, slices in found]
