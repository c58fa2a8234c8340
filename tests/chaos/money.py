"""The books of a batch: every answer that the upstream was paid for, and what became of it.

An answer that was paid for is one of these: the one that is stored; one that the job's record names, by its request id, as
no good; one of those that the record marks `maybe_billed` because nothing whole came of it; or it was in flight when its
worker was killed, or suspended for longer than its lease, or when its batch was stopped. Anything else is money lost.
"""

from __future__ import annotations

from collections import Counter

from jobs.results import Attempt
from jobs.states import JobState
from ops.simulator.ledger import Call
from producers.producer import JobResult
from tests.chaos.evidence import Batch
from tests.chaos.plan import REFUSED
from tests.chaos.times import Times, tag_of, worker_of

#: Faults whose answer arrives whole, with its usage, though it is no good.
_WHOLE = (None, "thinking_only", "repetition")
#: Codes of failures that are final at once.
_FINAL = {"content_filter"}
WORKER_LOST = "worker_lost"
KILLED = "worker killed"


class Books:
    """Audits one batch; what is wrong goes into `wrong`, what there is into `totals`."""

    def __init__(
        self,
        batch: Batch,
        by_job: dict[str, list[Call]],
        times: Times,
        max_attempts: int,
        wrong: list[str],
        totals: Counter[str],
    ) -> None:
        self._batch = batch
        self._by_job = by_job
        self._times = times
        self._max_attempts = max_attempts
        self._stop = times.stopped(batch)
        self._wrong = wrong
        self._totals = totals
        self._whole_tokens = 0  # of answers that were delivered whole to a worker
        self._lost_tokens = 0  # of those among them whose worker did not live to tell
        self._unrecorded: list[Call] = []  # answers that were delivered whole, for a job that ended otherwise
        self._cut_tokens = 0  # of streams that were cut, perhaps when they had told their usage

    def judge(self) -> None:
        """Every job, then the batch's usage."""
        stored_tokens = 0
        for job in self._batch.jobs:
            index = job.job_id.rpartition("-")[2]
            tag = f"b{self._batch.spec.number}-{index}"
            if job.custom_id not in (tag, None):
                self._wrong.append(f"{tag} has the outcome of {job.custom_id}")
            self._job(tag, job, self._by_job.get(tag, []))
            stored_tokens += job.usage.total_tokens if job.usage is not None else 0
        name, counted = f"batch {self._batch.spec.number}", self._batch.status.usage.total_tokens
        if counted > self._whole_tokens + self._cut_tokens:
            self._wrong.append(f"{name} counts {counted} tokens, {self._whole_tokens} were billed with what it got")
        if counted < self._whole_tokens - self._lost_tokens:
            self._wrong.append(
                f"{name} counts {counted} tokens, {self._whole_tokens} were billed with what it got, of which only "
                f"{self._lost_tokens} were lost; not in a job's record: "
                + (", ".join(_describe(call) for call in self._unrecorded[:5]) or "none")
            )
        if counted < stored_tokens:
            self._wrong.append(f"{name} counts {counted} tokens, its jobs {stored_tokens}")
        self._totals["tokens lost with workers"] += max(0, self._whole_tokens - counted)

    def _job(self, tag: str, job: JobResult, calls: list[Call]) -> None:
        by_id = {call.number: call for call in calls}
        attempts = {_number(a.request_id): a for a in job.attempts if a.request_id is not None}
        paid = [call for call in calls if call.paid]
        told = [call for call in paid if call.number in attempts]
        untold = [call for call in paid if call.number not in attempts]
        for number, attempt in attempts.items():
            self._attempt(tag, attempt, self._times.by_number.get(number))
        answers = [call for call in told if call.fault is None and call.delivered]
        revoked = job.state in (JobState.CANCELLED, JobState.EXPIRED)
        if job.state is JobState.SUCCEEDED:
            self._answer(tag, job, by_id)
        elif answers:
            self._wrong.append(f"{tag} has {len(answers)} good answers and is {job.state}")
        if job.state is JobState.FAILED:
            self._failure(tag, job, calls)

        marked = sum(a.times for a in job.attempts if a.maybe_billed and a.request_id is None)
        lost = sum(a.times for a in job.attempts if a.verdict == WORKER_LOST)
        self._totals["attempts marked as lost with their worker"] += lost
        self._totals["answers paid: stored"] += job.state is JobState.SUCCEEDED
        self._totals["answers paid: no good, recorded"] += len(told) - (job.state is JobState.SUCCEEDED)
        unexplained = []
        killed = 0
        for call in untold:
            if reason := self._excuse(call, revoked):
                self._totals[f"answers paid: {reason}"] += 1
                killed += reason == KILLED
            else:
                unexplained.append(call)
        self._totals["in flight at a kill, and not marked"] += max(0, killed - lost)
        # Of what was broken off, and of what a killed worker had called, the record holds no request id, only that it may be
        # on the bill. A worker that was gone may have had its answer stored after all; then another's is the one too many.
        recorded = 0 if revoked else marked - min(killed, lost)
        spare = sum(call in told and self._times.excuse(call) != "" for call in paid)
        self._totals["answers paid: broken off, recorded"] += min(len(unexplained), recorded)
        self._totals["answers paid: another's was stored"] += min(max(0, len(unexplained) - recorded), spare)
        if len(unexplained) > recorded + spare:
            self._wrong.append(
                f"{tag} ({job.state}): {len(unexplained)} paid answers are unaccounted for, {recorded} were recorded: "
                + ", ".join(_describe(call) for call in unexplained[:5])
            )
        for call in paid:
            tokens = call.prompt_tokens + call.completion_tokens
            record = attempts.get(call.number)
            if (call.delivered and call.fault in _WHOLE) or (record is not None and record.usage is not None):
                self._whole_tokens += tokens
                unknown = record is None and (lost > 0 or self._excuse(call, revoked) != "")
                self._lost_tokens += tokens if unknown else 0
                self._unrecorded += [call] if record is None else []
            elif record is None and call.stream and call.fault is None:
                self._cut_tokens += tokens

    def _excuse(self, call: Call, revoked: bool) -> str:
        """Why a paid answer need not be in the job's record; '' for no reason. A job that was revoked has no record."""
        if reason := self._times.excuse(call):
            return f"worker {reason}"
        if revoked and (not call.delivered or self._times.broken_off(call, self._stop)):
            return "batch stopped"
        if revoked and self._times.died(call):
            return KILLED
        return ""

    def _attempt(self, tag: str, attempt: Attempt, call: Call | None) -> None:
        """An attempt with a request id is a call of that job, and its usage what that call was billed for."""
        if call is None or tag_of(call) not in (tag, ""):
            self._wrong.append(f"{tag}: an attempt ({attempt.verdict}) names a call that was not made for it")
            return
        tokens = call.prompt_tokens + call.completion_tokens
        if attempt.usage is not None and attempt.usage.total_tokens != tokens:
            self._wrong.append(
                f"{tag}: call {call.number} cost {tokens} tokens, {attempt.usage.total_tokens} are recorded"
            )
        if call.paid and attempt.usage is None and not attempt.maybe_billed:
            self._wrong.append(
                f"{tag}: {_describe(call)} was billed, which its attempt ({attempt.verdict}) does not say"
            )

    def _answer(self, tag: str, job: JobResult, by_id: dict[int, Call]) -> None:
        """What is stored is the answer to a good call of this very job."""
        call = by_id.get(_number(job.request_id))
        if call is None or call.fault is not None or not call.paid:
            self._wrong.append(f"{tag} succeeded with an answer that it was not given")
        elif job.response is not None and call.digest not in str(job.response.get("id")):
            self._wrong.append(f"{tag} succeeded with another request's answer")

    def _failure(self, tag: str, job: JobResult, calls: list[Call]) -> None:
        """A job fails for good reason: it was refused, or its attempts are used up."""
        code = job.error.code if job.error is not None else ""
        refused = self._batch.spec.number % 3 == 0 and int(tag.rpartition("-")[2]) % 40 == 7
        counted = sum(attempt.times for attempt in job.attempts if attempt.counted)
        self._totals[f"failed: {code}"] += 1
        if code == "poison":
            self._wrong.append(f"{tag} was taken for poison, and its workers were killed from outside")
        elif refused != (code in _FINAL):
            self._wrong.append(f"{tag} failed as {code}, {'with' if refused else 'without'} {REFUSED} in it")
        elif code not in _FINAL and counted < self._max_attempts:
            self._wrong.append(f"{tag} failed as {code} after {counted} attempts that count, of {len(calls)} calls")


def _number(request_id: str | None) -> int:
    """The call's number in the ledger, by the request id that the simulator gave it; 0 for none."""
    return int((request_id or "").rpartition("-")[2] or 0)


def _describe(call: Call) -> str:
    delivered = "delivered" if call.delivered else "not delivered"
    return f"call {call.number} of {tag_of(call)} by {worker_of(call)}, {call.fault or 'good'}, {delivered}"
