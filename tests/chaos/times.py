"""What the times say: who was in flight when something happened, and what that excuses.

"In flight" is from a job's reservation until its result is stored, which the ledger does not see: so a call counts as in
flight for `STORED_S` after its end, and for as long as its worker could not store it.
"""

from __future__ import annotations

import math
import signal
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

from jobs.leases import LEASE_S
from tests.chaos.spans import Span, joined, overlap_s

if TYPE_CHECKING:
    from ops.simulator.ledger import Call
    from tests.chaos.evidence import Batch, Evidence
    from tests.chaos.workers import Life

#: Seconds from the end of a call at the upstream until its result is stored, on a busy machine.
STORED_S = 1.0
#: A worker renews every second; with the store or itself away for so long it may have lost its leases.
SILENT_S = LEASE_S - 2.0
#: Silences so close to one another leave no time for a heartbeat.
BREATH_S = 2.5
#: Seconds until a call of a cancelled batch has ended (promised: 2) ...
CANCEL_S = 3.0
#: ... and of an expired one: who reaps may have been killed, and another takes over after 4 s.
EXPIRE_S = 8.0
#: An answer that comes so long before or after its batch is stopped may be taken for one of those broken off.
STOPPING_S = 4.0
#: Seconds after its resumption in which a suspended worker may send what it was about to send.
RESUMED_S = 1.0
#: Seconds that the store must be away for a drain that can't write to be forgiven.
DRAIN_WRITE_S = 4.0


class Stop(NamedTuple):
    """When a batch was stopped, why, and within how many seconds its calls must have ended."""

    at: float
    why: str
    within_s: float


class Times:
    """The times of one evidence."""

    def __init__(self, evidence: Evidence) -> None:
        self._away = joined(evidence.away)
        self._lives = evidence.lives
        self._silences = {name: self._silences_of(life) for name, life in evidence.lives.items()}
        self._calls: dict[str, list[Call]] = defaultdict(list)
        self.by_number = {call.number: call for call in evidence.calls}
        for call in evidence.calls:
            self._calls[worker_of(call)].append(call)

    def _silences_of(self, life: Life) -> list[Span]:
        """Spans in which the worker, suspended for some of them, could not renew its leases for too long."""
        silences = joined([*life.suspended, *self._away], BREATH_S)
        return [
            silence
            for silence in silences
            if silence.length_s > SILENT_S and overlap_s(life.suspended, silence.start, silence.end) > 0
        ]

    def _deaf_s(self, life: Life, start: float, end: float) -> float:
        """Seconds in which the worker could store nothing."""
        return overlap_s(joined([*life.suspended, *self._away]), start, end)

    def _stored_by(self, call: Call, life: Life) -> float:
        """When its result should have been stored at the latest."""
        at = call.end + STORED_S
        for span in joined([*life.suspended, *self._away]):
            if span.start < at and span.end > call.end:
                at = max(at, span.end + STORED_S + (at - max(call.end, span.start)))
        return at

    def excuse(self, call: Call) -> str:
        """Why the answer to this call may not be stored: its worker was `killed` or `suspended` meanwhile; else ''."""
        life = self._lives.get(worker_of(call))
        if life is None:
            return ""
        stored_by = self._stored_by(call, life)
        died_at = life.killed_at
        if life.told_at < math.inf and life.status not in (0, None):
            died_at = min(died_at, life.ended_at)  # it could not write
        if died_at <= stored_by:  # a call may also arrive when its worker has just died
            return "killed"
        for silence in self._silences[life.name]:
            if call.at <= silence.end + RESUMED_S and stored_by >= silence.start:
                return "suspended"
        return ""

    def died(self, call: Call) -> bool:
        """Whether its worker was killed at any time after it: what it remembered of the call is gone."""
        life = self._lives.get(worker_of(call))
        return life is not None and life.killed_at < math.inf

    # -- the ends of batches

    @staticmethod
    def stopped(batch: Batch) -> Stop | None:
        """When its jobs were cancelled or expired, if they were."""
        if batch.status.cancelled and batch.cancelled_at is not None:
            return Stop(batch.cancelled_at, "cancelled", CANCEL_S)
        if batch.status.expired and batch.spec.deadline_s is not None:
            return Stop(batch.status.created_at + batch.spec.deadline_s, "expired", EXPIRE_S)
        return None

    def late_s(self, call: Call, stop: Stop) -> float:
        """Seconds by which a call outlasted its batch, but for those in which its worker could not know."""
        life = self._lives.get(worker_of(call))
        if life is None or call.end <= stop.at:
            return 0.0
        return call.end - stop.at - self._deaf_s(life, stop.at, call.end + BREATH_S)

    def broken_off(self, call: Call, stop: Stop | None) -> bool:
        """Whether it may have been broken off because its batch was stopped."""
        if stop is None or call.end < stop.at - STOPPING_S:
            return False
        return self.late_s(call, stop) < stop.within_s + STOPPING_S

    # -- workers

    def excuses_exit(self, life: Life) -> bool:
        """Whether a drain may have failed: the store was away, or nothing had begun yet."""
        if life.status == -signal.SIGTERM and not life.log.read_bytes() and not self._calls[life.name]:
            return True
        return overlap_s(self._away, life.told_at, life.ended_at) > DRAIN_WRITE_S

    def excuses_excess(self, call: Call) -> bool:
        """Whether a call may exceed the limit: a worker that was suspended for longer than its reservations live had begun
        to send calls whose places are others' by then, so they are counted twice for a moment.
        """
        for name, silences in self._silences.items():
            for silence in silences:
                if silence.start + SILENT_S <= call.at and any(
                    other.at <= call.at <= other.end
                    and (other.at < silence.start or silence.end <= other.at <= silence.end + RESUMED_S)
                    for other in self._calls[name]
                ):
                    return True
        return False


def worker_of(call: Call) -> str:
    """The name of the worker that made a call: it is in the path."""
    parts = call.path.split("/")
    return parts[3] if call.path.startswith("/v1/ai/") else parts[1]


def tag_of(call: Call) -> str:
    """The job that a call was made for, by its name in the plan; '' for one that was refused unread, as in an outage."""
    return str(call.tag["job"]) if isinstance(call.tag, dict) and "job" in call.tag else ""
