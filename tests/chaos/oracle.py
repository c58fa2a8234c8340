"""The oracle: what must be true of the evidence, however much was killed, and what is not.

`judge` takes plain data, so that it can be shown that it finds what is wrong.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from jobs.states import TERMINAL, BatchState, JobState
from ops.simulator.ledger import Call
from tests.chaos.evidence import Batch, Evidence
from tests.chaos.money import Books
from tests.chaos.times import Times, tag_of

#: Of these the stored outcome is there, but holds nothing.
_REVOKED = (JobState.CANCELLED, JobState.EXPIRED)


@dataclass
class Findings:
    """What is wrong, if anything, and what was counted."""

    wrong: list[str] = field(default_factory=list)
    totals: Counter[str] = field(default_factory=Counter)


def judge(evidence: Evidence) -> Findings:
    """Everything that is promised, held against the evidence."""
    findings = Findings()
    times = Times(evidence)
    by_job: dict[str, list[Call]] = defaultdict(list)
    for call in evidence.calls:
        by_job[tag_of(call)].append(call)
    _judge_submits(evidence, findings)
    known: set[str] = set()
    for batch in evidence.batches:
        _judge_states(batch, findings)
        known.update(f"b{batch.spec.number}-{index}" for index in range(batch.status.total))
        Books(batch, by_job, times, evidence.max_attempts, findings.wrong, findings.totals).judge()
        _judge_stop(batch, by_job, times, findings)
    if strangers := sum(len(calls) for tag, calls in by_job.items() if tag and tag not in known):
        findings.wrong.append(f"{strangers} calls are of jobs that are in no batch")
    _judge_workers(evidence, times, findings)
    _judge_limit(evidence, times, findings)
    findings.wrong += [f"left over: {name}" for name in evidence.leftovers]
    _count(evidence, findings.totals)
    return findings


def _judge_submits(evidence: Evidence, findings: Findings) -> None:
    """A submit leaves a whole batch or none, and one however often it was made."""
    there = {batch.spec.number: batch for batch in evidence.batches}
    findings.wrong += [f"a producer met {error}" for error in evidence.raised]
    findings.wrong += [f"in the store, but not ours, or twice: {what}" for what in evidence.unknown]
    for number, batch_id in evidence.acknowledged.items():
        if number not in there:
            findings.wrong.append(f"batch {number} was acknowledged as {batch_id} and is not there")
        elif there[number].batch_id != batch_id:
            findings.wrong.append(f"batch {number} was acknowledged as {batch_id} and is {there[number].batch_id}")
    for number, batch in there.items():
        if batch.status.total != batch.spec.jobs:
            findings.wrong.append(f"batch {number} has {batch.status.total} of {batch.spec.jobs} jobs")
        if number not in evidence.acknowledged:
            findings.totals["batches that nobody was told of"] += 1
            if number not in evidence.abandoned:
                findings.wrong.append(f"batch {number} is there and its producer never knew")


def _judge_states(batch: Batch, findings: Findings) -> None:
    """Each job has ended once, with one outcome, and the counters say so."""
    name, status, wrong = f"batch {batch.spec.number}", batch.status, findings.wrong
    if status.state is not BatchState.FINISHED:
        wrong.append(f"{name} is {status.state}: {status.queued} queued, {status.running} running")
    ended = Counter(job.job_id for job in batch.jobs)
    for index in range(status.total):
        job_id = f"{batch.batch_id}-{index}"
        if ended[job_id] != 1:
            wrong.append(f"{name}: job {index} ended {ended[job_id]} times")
    if len(ended) > status.total:
        wrong.append(f"{name}: more jobs ended than it has")
    letters = Counter(TERMINAL.get(byte) for byte in batch.states)
    told = Counter(job.state for job in batch.jobs)
    for state in TERMINAL.values():
        counts = {getattr(status, state.value), letters[state], told[state]}
        if len(counts) > 1:
            wrong.append(
                f"{name}: {state} is {getattr(status, state.value)} by its counter, {letters[state]} by its states, "
                f"{told[state]} by its outcomes"
            )
    for job in batch.jobs:
        if job.state is JobState.SUCCEEDED and job.response is None:
            wrong.append(f"{name}: {job.job_id} succeeded without a response")
        elif job.state is JobState.FAILED and job.error is None:
            wrong.append(f"{name}: {job.job_id} failed without a reason")
        elif job.state in _REVOKED and (job.response is not None or job.error is not None):
            wrong.append(f"{name}: {job.job_id} was {job.state} and has an outcome all the same")
    if told[JobState.CANCELLED] and batch.cancelled_at is None:
        wrong.append(f"{name}: {told[JobState.CANCELLED]} jobs were cancelled by nobody")
    if told[JobState.EXPIRED] and batch.spec.deadline_s is None:
        wrong.append(f"{name}: {told[JobState.EXPIRED]} jobs expired without a deadline")


def _judge_stop(batch: Batch, by_job: dict[str, list[Call]], times: Times, findings: Findings) -> None:
    """After a cancel, or a deadline, calls are broken off and none begins."""
    stop = times.stopped(batch)
    if stop is None:
        return
    for index in range(batch.status.total):
        for call in by_job.get(f"b{batch.spec.number}-{index}", ()):
            late_s = times.late_s(call, stop)
            name = "slowest stop of a call, ms"
            findings.totals[name] = max(findings.totals[name], round(late_s * 1000))
            if late_s > stop.within_s:
                findings.wrong.append(
                    f"batch {batch.spec.number}: call {call.number} of job {index} ended {late_s:.1f} s after it was "
                    f"{stop.why}"
                )


def _judge_workers(evidence: Evidence, times: Times, findings: Findings) -> None:
    """Whoever was told to end did, with 0; nobody else did."""
    for life in evidence.lives.values():
        if life.alive:
            findings.wrong.append(f"worker {life.name} still lives")
        elif life.ended_by_itself:
            findings.wrong.append(f"worker {life.name} ended by itself with {life.status}: {life.last_words()}")
        elif life.drained and life.status != 0:
            excused = times.excuses_exit(life)
            findings.totals["drains that could not write"] += excused
            if not excused:
                took_s = life.ended_at - life.told_at
                findings.wrong.append(
                    f"worker {life.name} drained with {life.status} in {took_s:.1f} s: {life.last_words()}"
                )


def _judge_limit(evidence: Evidence, times: Times, findings: Findings) -> None:
    """Calls in flight never exceed the limit."""
    over = [call for call in evidence.calls if call.in_flight > evidence.limit]
    excused = [call for call in over if times.excuses_excess(call)]
    findings.totals["calls over the limit of a suspended worker"] = len(excused)
    if len(over) > len(excused):
        most = max(call.in_flight for call in over)
        findings.wrong.append(
            f"{len(over) - len(excused)} calls began over the limit of {evidence.limit} in flight, {most} at most"
        )


def _count(evidence: Evidence, totals: Counter[str]) -> None:
    for batch in evidence.batches:
        totals["batches"] += 1
        totals["jobs"] += batch.status.total
        for state in TERMINAL.values():
            totals[state.value] += getattr(batch.status, state.value)
        totals["late answers"] += batch.status.late_answers
        totals["tokens counted"] += batch.status.usage.total_tokens
    totals["calls"] = len(evidence.calls)
    totals["answers paid"] = sum(call.paid for call in evidence.calls)
    totals["tokens billed"] = sum(call.prompt_tokens + call.completion_tokens for call in evidence.calls)
    totals["most in flight"] = max((call.in_flight for call in evidence.calls), default=0)
    totals["workers"] = len(evidence.lives)
