"""What the benchmarks read out of the simulator's ledger."""

from __future__ import annotations

from random import Random

import pytest

from ops.bench.limits.measures import answered, arrived, early, mean_in_flight, most_in_any, reached, refused
from ops.bench.limits.report import MISSED, Row, Share, at_least, at_most, none_of, table
from ops.simulator.ledger import Call


def call(at: float, end: float = 0.0, *, fault: str | None = None, admitted: bool = True, status: int = 200) -> Call:
    """A call that went out whole."""
    return Call(
        number=1, at=at, path="", end=end or at, fault=fault, status=status, in_flight=int(admitted), delivered=True
    )


def told(end: float, retry_after: float, digest: str = "a", delivered: bool = True) -> Call:
    return Call(
        number=1,
        at=end - 0.2,
        path="",
        end=end,
        status=429,
        retry_after=retry_after,
        digest=digest,
        delivered=delivered,
    )


def asked(at: float, digest: str = "a") -> Call:
    return Call(number=2, at=at, path="", digest=digest)


def test_calls_are_answered_or_refused_or_neither() -> None:
    good, broken, over = call(1), call(2, fault="truncated"), call(3, fault="rpm", status=429, admitted=False)
    cut = Call(number=4, at=4.0, path="", status=200)
    assert answered([good, broken, over, cut]) == [good]
    assert refused([good, broken, over, call(5, fault="429", status=429)]) == [over]
    assert arrived([good, broken, over], 1.0, 3.0) == [good, broken]


@pytest.mark.parametrize("seed", range(3))
def test_the_most_in_any_span_is_that_of_every_span_tried(seed: int) -> None:
    rng = Random(seed)
    marks = [(rng.randint(0, 100) / 2, rng.randint(1, 9)) for _ in range(80)]
    spans = [sum(amount for at, amount in marks if end - 10 < at <= end) for end, _ in marks]
    assert most_in_any(10, marks) == max(spans)
    assert most_in_any(10, []) == 0


def test_the_mean_in_flight_weighs_by_time_and_leaves_refusals_out() -> None:
    calls = [call(0, 4), call(3, 5), call(9, 30), call(2, 8, fault="concurrency", admitted=False)]
    assert mean_in_flight(calls, 2, 10) == (2 + 2 + 1) / 8


def test_a_rate_is_reached_when_a_whole_span_holds_it() -> None:
    slow_then_fast = [0.0, 10.0, 11.0, 11.2, 11.4, 11.6]
    assert reached(slow_then_fast, since=5.0, rate=2.0, span_s=2.0) == pytest.approx(6.4)
    assert reached(slow_then_fast, since=5.0, rate=9.0, span_s=2.0) is None
    assert reached([4.0, 4.5, 4.9], since=5.0, rate=1.0, span_s=2.0) is None


def test_calls_are_early_between_the_slack_and_the_promise() -> None:
    refusal = told(10.0, 2.0)
    others = [asked(10.1), asked(10.2), asked(11.9, "b"), asked(12.0)]
    assert early([refusal, *others]) == 2
    assert early([refusal, *others], same_request=True) == 1
    assert early([told(10.0, 2.0, delivered=False), *others]) == 0
    assert early([told(10.0, 0.0), *others]) == 0


def test_a_table_says_which_targets_were_missed() -> None:
    rows = [
        at_least("used", 0.97, Share(97, 100)),
        at_most("refused", 0.002, Share(1, 100)),
        none_of("early", 0),
        Row("seconds", "", "7"),
        at_least("nothing", 0.5, Share(0, 0)),
    ]
    lines = table("name", rows).splitlines()[2:]
    assert [MISSED in line for line in lines] == [False, True, False, False, True]
    assert lines[0] == "| name | used | ≥ 97% | 97.00% (97 of 100) |"
