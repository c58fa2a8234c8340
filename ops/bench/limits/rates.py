"""An upstream that enforces a limit: how much of it is used, and how often it is tripped."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ops.bench.limits.measures import (
    MINUTE_S,
    answered,
    arrived,
    mean_in_flight,
    most_in_any,
    refused,
    tokens,
)
from ops.bench.limits.report import Row, Share, at_least, at_most
from ops.bench.limits.stand import LATENCY_S, Stand, request
from ops.simulator.answers import make_answer
from ops.simulator.asks import read_ask
from ops.simulator.config import Config
from ops.simulator.ledger import Call

RPM = 900
WORKERS = 4
USED = 0.97
REFUSED = 0.002
CONCURRENCY = 37
CONCURRENCY_WORKERS = 2
#: Jobs beyond those that can be called in the observed time: workers hold some, and go on calling afterwards.
SPARE = 1_000


def rpm(scale: float) -> list[Row]:
    """Requests a minute, which mimoq is told."""
    seconds = 100 * scale
    permitted = RPM * seconds / MINUTE_S
    with Stand("--rpm", str(RPM), rpm=RPM) as stand:
        stand.workers("bulk", WORKERS)
        batch = stand.producer.submit_many(request(number) for number in range(int(permitted) + SPARE))
        calls = stand.observe(seconds)
        stand.not_dry(batch)
    most = most_in_any(MINUTE_S, ((call.at, 1) for call in calls if call.in_flight))
    return [
        at_least("calls answered / permitted", USED, Share(len(answered(calls)), permitted)),
        at_most("calls refused / made", REFUSED, Share(len(refused(calls)), len(calls))),
        Row("most calls admitted in any minute", "", f"{most:,.0f} of {RPM:,}"),
    ]


def tpm(scale: float) -> list[Row]:
    """Tokens a minute, as tight: prompts and answers vary in size, and mimoq learns theirs only from usage."""
    seconds = 100 * scale
    requests = [request(number, words=number * 7919 % 400) for number in range(int(RPM * seconds / MINUTE_S) + SPARE)]
    sizes = [_tokens(body) for body in requests]
    limit = round(RPM * sum(sizes) / len(sizes))
    permitted = limit * seconds / MINUTE_S
    with Stand("--tpm", str(limit), tpm=limit) as stand:
        stand.workers("bulk", WORKERS)
        batch = stand.producer.submit_many(requests)
        calls = stand.observe(seconds)
        stand.not_dry(batch)
    good = answered(calls)
    most = most_in_any(MINUTE_S, ((call.at, tokens(call)) for call in calls))
    return [
        at_least("tokens of answers / permitted", USED, Share(sum(map(tokens, good)), permitted)),
        at_most("calls refused / made", REFUSED, Share(len(refused(calls)), len(calls))),
        Row("most tokens in any minute", "", f"{most:,.0f} of {limit:,}"),
        Row("tokens of a call", "", f"{min(sizes):,} to {max(sizes):,}, mean {limit / RPM:,.0f}"),
    ]


def _tokens(body: dict[str, object]) -> int:
    """What the simulator will bill for a request."""
    return make_answer(Config(), read_ask("chat", None, msgspec.json.encode(body))).total_tokens


def concurrency(scale: float) -> list[Row]:
    """Calls in flight, which mimoq is told nothing of."""
    seconds = 60 * scale
    with Stand("--concurrency", str(CONCURRENCY)) as stand:
        stand.workers("bulk", CONCURRENCY_WORKERS)
        jobs = int(CONCURRENCY / LATENCY_S * seconds) + SPARE
        batch = stand.producer.submit_many(request(number) for number in range(jobs))
        calls = stand.observe(seconds)
        stand.not_dry(batch)
    first = calls[0].at
    half = first + seconds / 2
    mean = mean_in_flight(calls, half, first + seconds)
    return [
        Row(f"mean in flight after {seconds / 2:.0f} s, of {CONCURRENCY}", "≥ 33", f"{mean:.1f}", mean >= 33),
        _under("calls refused / made, the whole run", 0.01, calls),
        Row("the same after the first half", "", _refusals(arrived(calls, half, first + seconds))),
    ]


def _under(what: str, share: float, calls: Sequence[Call]) -> Row:
    found = Share(len(refused(calls)), len(calls))
    return Row(what, f"< {share:.0%}", str(found), found.value < share)


def _refusals(calls: Sequence[Call]) -> str:
    return str(Share(len(refused(calls)), len(calls)))
