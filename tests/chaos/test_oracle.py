"""The oracle finds what is wrong, and excuses what must be excused."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from jobs.requests import CHAT
from jobs.results import Attempt, Failure, Usage
from jobs.states import LETTERS, BatchState, JobState
from jobs.store import BatchStatus
from ops.simulator.ledger import Call
from producers.producer import JobResult
from tests.chaos import plan
from tests.chaos.evidence import Batch, Evidence
from tests.chaos.oracle import judge
from tests.chaos.spans import Span, joined, overlap_s
from tests.chaos.workers import Life

#: When everything began, and what an answer costs.
T = 1_780_000_000.0
TOKENS = 30


def call(number: int, index: int, at: float, end: float, worker: str = "w0", **more: Any) -> Call:
    """A good call, paid and delivered; times since `T`."""
    made = Call(
        number=number,
        at=T + at,
        end=T + end,
        path=f"/v1/ai/{worker}/chat/completions",
        digest=f"d{index}",
        tag={"job": f"b1-{index}"},
        in_flight=1,
        status=200,
        paid=True,
        prompt_tokens=10,
        completion_tokens=20,
        delivered=True,
    )
    return msgspec.structs.replace(made, **more)


def attempt(number: int | None, verdict: str = "succeeded", **more: Any) -> Attempt:
    """The record of a call; without a number it has no request id, and no usage."""
    usage = Usage(10, 20, 0, 0, TOKENS) if number is not None else None
    request_id = f"sim-0-{number}" if number is not None else None
    return Attempt(at=T, latency_s=1.0, verdict=verdict, request_id=request_id, usage=usage, **more)


def job(index: int, attempts: list[Attempt]) -> JobResult:
    """A job that succeeded with the last of these attempts."""
    return JobResult(
        job_id=f"x-{index}",
        custom_id=f"b1-{index}",
        state=JobState.SUCCEEDED,
        response={"id": f"chatcmpl-d{index}"},
        usage=sum((a.usage for a in attempts if a.usage is not None), Usage()),
        attempts=attempts,
        request_id=attempts[-1].request_id,
    )


def revoked(index: int, state: JobState) -> JobResult:
    return JobResult(job_id=f"x-{index}", custom_id=None, state=state)


def failed(index: int, code: str, attempts: list[Attempt]) -> JobResult:
    return JobResult(f"x-{index}", f"b1-{index}", JobState.FAILED, error=Failure(code, ""), attempts=attempts)


def batch(jobs: list[JobResult], tokens: int, **more: Any) -> Batch:
    """A finished batch of these jobs, with the counters that they make."""
    counts = {state.value: sum(job.state is state for job in jobs) for state in LETTERS}
    status = BatchStatus(
        batch_id="x",
        state=BatchState.FINISHED,
        lane="bulk",
        label="",
        total=len(jobs),
        queued=0,
        running=0,
        attempts=0,
        late_answers=0,
        usage=Usage(total_tokens=tokens),
        created_at=T,
        started_at=T,
        finished_at=T + 99,
        slice_size=50,
        reason="",
        **counts,  # type: ignore[arg-type]  # numbers all, by names of fields that are
    )
    states = b"".join(LETTERS[job.state] for job in jobs)
    spec = plan.Batch(1, len(jobs), "bulk", CHAT, False, None)
    return replace(Batch(spec, "x", status, states, jobs), **more)


def evidence(batch: Batch, calls: list[Call], lives: list[Life] | None = None, **more: Any) -> Evidence:
    """What is known when that was all there was; the workers were told to end at last, and did."""
    workers = {"w0": Life("w0", "bulk", T), "w1": Life("w1", "bulk", T)} | {life.name: life for life in lives or ()}
    for life in workers.values():
        if life.alive:
            life.told_at, life.ended_at, life.status = T + 100, T + 101, 0
    known = Evidence(
        limit=4,
        max_attempts=3,
        calls=calls,
        lives=workers,
        batches=[batch],
        acknowledged={1: "x"},
        abandoned=set(),
        away=[],
    )
    return replace(known, **more)


def two() -> tuple[Batch, list[Call]]:
    """Two jobs that were answered at once."""
    return batch([job(0, [attempt(1)]), job(1, [attempt(2)])], 2 * TOKENS), [call(1, 0, 1, 2), call(2, 1, 1, 2)]


def found(known: Evidence) -> str:
    return "\n".join(judge(known).wrong)


def test_what_is_right_is_right() -> None:
    assert found(evidence(*two())) == ""


def _status(**changes: Any) -> Callable[[Batch], Batch]:
    return lambda batch: replace(batch, status=replace(batch.status, **changes))


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda b: replace(b, jobs=b.jobs[:1]), "job 1 ended 0 times"),
        (lambda b: replace(b, jobs=[*b.jobs, b.jobs[0]]), "job 0 ended 2 times"),
        (lambda b: replace(b, states=b"s\0"), "succeeded is 2 by its counter, 1 by its states, 2 by its outcomes"),
        (lambda b: replace(b, jobs=[b.jobs[0], replace(b.jobs[1], response=None)]), "succeeded without a response"),
        (lambda b: replace(b, jobs=[b.jobs[0], revoked(1, JobState.CANCELLED)]), "cancelled by nobody"),
        (lambda b: replace(b, jobs=[b.jobs[0], revoked(1, JobState.EXPIRED)]), "expired without a deadline"),
        (lambda b: replace(b, spec=b.spec._replace(jobs=3)), "has 2 of 3 jobs"),
        (lambda b: replace(b, batch_id="y"), "acknowledged as x and is y"),
        (_status(state=BatchState.RUNNING, queued=1), "is running: 1 queued"),
        (_status(succeeded=1), "succeeded is 1 by its counter"),
        (_status(usage=Usage(total_tokens=61)), "counts 61 tokens, 60 were billed"),
        (_status(usage=Usage(total_tokens=59)), "of which only 0 were lost"),
    ],
)
def test_a_batch_that_is_not_as_it_should_be(harm: Callable[[Batch], Batch], says: str) -> None:
    good, calls = two()
    assert says in found(evidence(harm(good), calls))


def test_batches_that_are_missing_or_too_many() -> None:
    good, calls = two()
    assert "acknowledged as z and is not there" in found(evidence(good, calls, acknowledged={1: "x", 2: "z"}))
    assert "its producer never knew" in found(evidence(good, calls, acknowledged={}))
    assert found(evidence(good, calls, acknowledged={}, abandoned={1})) == ""
    assert "not ours, or twice: y" in found(evidence(good, calls, unknown=["y"]))
    assert "1 calls are of jobs that are in no batch" in found(evidence(good, [*calls, call(3, 7, 1, 2)]))
    assert "left over: lease:1" in found(evidence(good, calls, leftovers=["lease:1"]))
    assert "a producer met a.B" in found(evidence(good, calls, raised=["a.B"]))


def test_an_answer_of_another_job() -> None:
    good, calls = two()
    calls[0] = call(1, 0, 1, 2, digest="other")
    assert "another request's answer" in found(evidence(good, calls))
    good, calls = two()
    good.jobs[0] = replace(good.jobs[0], request_id="sim-0-2")
    assert "an answer that it was not given" in found(evidence(good, calls))


# -- what is paid twice


def again(end: float = 2.0, **more: Any) -> tuple[Batch, list[Call]]:
    """A job that was answered by worker w1, after w0 had called it too."""
    return batch([job(0, [attempt(2)])], TOKENS), [call(1, 0, 1, end, **more), call(2, 0, 20, 21, "w1")]


def killed(at: float) -> Life:
    return Life("w0", "bulk", T, killed_at=T + at, ended_at=T + at, status=-signal.SIGKILL)


def suspended(start: float, end: float) -> Life:
    return Life("w0", "bulk", T, suspended=[Span(T + start, T + end)])


def test_what_was_in_flight_at_a_kill_may_be_paid_again() -> None:
    assert "1 paid answers are unaccounted for" in found(evidence(*again()))
    # While it was on its way, when it had just come, and long after.
    assert found(evidence(*again(delivered=False), [killed(1.5)])) == ""
    assert found(evidence(*again(), [killed(2.5)])) == ""
    assert "unaccounted for" in found(evidence(*again(), [killed(4)]))
    # Another's death does not excuse it.
    other = Life("w1", "bulk", T, killed_at=T + 60, ended_at=T + 60, status=-signal.SIGKILL)
    assert "unaccounted for" in found(evidence(*again(), [other]))


def test_an_answer_waits_for_the_store_until_its_worker_is_killed() -> None:
    assert found(evidence(*again(), [killed(9)], away=[Span(T + 2.2, T + 8.5)])) == ""
    assert "unaccounted for" in found(evidence(*again(), [killed(9)], away=[Span(T + 2.2, T + 6)]))


def test_a_pause_of_the_store_pays_nothing_twice() -> None:
    assert "unaccounted for" in found(evidence(*again(), away=[Span(T + 1.5, T + 31)]))


def test_what_a_worker_held_that_was_suspended_for_longer_than_a_lease_may_be_paid_again() -> None:
    assert found(evidence(*again(), [suspended(1.5, 14)])) == ""
    assert "unaccounted for" in found(evidence(*again(), [suspended(1.5, 6)]))
    # Its own answer may be the one that is stored; then the other's is the one too many.
    late = batch([job(0, [attempt(1)])], 2 * TOKENS)
    assert found(evidence(late, again()[1], [suspended(1.5, 22)])) == ""
    # That one's usage is known to somebody who lives.
    assert "counts 30 tokens" in found(
        evidence(batch([job(0, [attempt(1)])], TOKENS), again()[1], [suspended(1.5, 22)])
    )


def test_what_is_recorded_is_accounted_for() -> None:
    bad = attempt(1, "empty_answer", maybe_billed=True)
    calls = [call(1, 0, 1, 2, fault="thinking_only"), call(2, 0, 3, 4)]
    assert found(evidence(batch([job(0, [bad, attempt(2)])], 2 * TOKENS), calls)) == ""
    cut = attempt(None, "connection_lost", maybe_billed=True)
    calls[0] = call(1, 0, 1, 2, delivered=False)
    assert found(evidence(batch([job(0, [cut, attempt(2)])], TOKENS), calls)) == ""
    unmarked = attempt(None, "connection_lost")
    assert "unaccounted for" in found(evidence(batch([job(0, [unmarked, attempt(2)])], TOKENS), calls))
    # One mark stands for one call.
    calls.append(call(3, 0, 1, 2, delivered=False))
    assert "unaccounted for" in found(evidence(batch([job(0, [cut, attempt(2)])], TOKENS), calls))
    lost = attempt(None, "worker_lost", maybe_billed=True, times=2)
    assert found(evidence(batch([job(0, [lost, attempt(2)])], TOKENS), calls, [killed(2.5)])) == ""


def test_a_record_that_does_not_agree_with_the_ledger() -> None:
    calls = [call(1, 0, 1, 2, completion_tokens=99)]
    assert "call 1 cost 109 tokens, 30 are recorded" in found(evidence(batch([job(0, [attempt(1)])], 109), calls))
    unsaid = msgspec.structs.replace(attempt(1, "invalid_response"), usage=None)
    calls = [call(1, 0, 1, 2, fault="truncated"), call(2, 0, 3, 4)]
    assert "was billed, which its attempt" in found(evidence(batch([job(0, [unsaid, attempt(2)])], TOKENS), calls))
    strange = batch([job(0, [attempt(9, "http_500"), attempt(2)])], TOKENS)
    assert "names a call that was not made for it" in found(evidence(strange, calls[1:]))


# -- how jobs may fail, and batches be stopped


def test_a_job_fails_only_for_good_reason() -> None:
    calls = [call(number, 0, number, number + 0.5, status=500, fault="500", paid=False) for number in (1, 2, 3)]
    attempts = [msgspec.structs.replace(attempt(number, "http_500"), usage=None) for number in (1, 2, 3)]

    def failing(code: str, attempts: list[Attempt]) -> str:
        return found(evidence(batch([failed(0, code, attempts)], 0), calls))

    assert failing("http_500", attempts) == ""
    assert "after 2 attempts that count" in failing("http_500", attempts[:2])
    assert "taken for poison" in failing("poison", attempts)
    assert "failed as content_filter, without" in failing("content_filter", attempts)


def stopped(end: float, **more: Any) -> str:
    """What is found when a batch was cancelled at 5, and a call of its job ended then."""
    cancelled = batch([revoked(0, JobState.CANCELLED)], 0, cancelled_at=T + 5)
    return found(evidence(cancelled, [call(1, 0, 1, end, delivered=False, **more)]))


def test_a_cancel_breaks_off_what_is_in_flight() -> None:
    assert stopped(6.5) == ""
    assert "ended 4.0 s after it was cancelled" in stopped(9)


def test_an_answer_that_came_is_not_thrown_away() -> None:
    cancelled = batch([revoked(0, JobState.CANCELLED)], TOKENS, cancelled_at=T + 50)
    assert "unaccounted for" in found(evidence(cancelled, [call(1, 0, 1, 2)]))


# -- workers and the limit


def test_workers_end_when_they_are_told_and_only_then() -> None:
    good, calls = two()

    def ended(log: Path = Path("/dev/null"), **more: Any) -> str:
        return found(evidence(good, calls, [Life("w0", "bulk", T, ended_at=T + 60, log=log, **more)]))

    assert "w0 ended by itself with 70" in ended(status=70)
    assert "w0 drained with 1 in 5.0 s" in ended(told_at=T + 55, status=1)
    assert ended(told_at=T + 55, status=0) == ""
    living = evidence(good, calls)
    living.lives["w0"].ended_at = math.inf
    assert "w0 still lives" in found(living)


def test_the_limit_is_never_exceeded() -> None:
    good, calls = two()
    calls[1].in_flight = 5
    assert "1 calls began over the limit of 4 in flight, 5 at most" in found(evidence(good, calls))


def test_spans() -> None:
    spans = joined([Span(5, 6), Span(1, 3), Span(2, 4)])
    assert spans == [Span(1, 4), Span(5, 6)]
    assert joined(spans, 1.0) == [Span(1, 6)]
    assert overlap_s(spans, 2, 5.5) == 2.5
