"""Random faults of every kind: what can be saved is, the rest fails for what it met, and no promise is broken."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from jobs.states import JobState
from ops.bench.limits.measures import early
from ops.bench.limits.report import Row, all_of, none_of
from ops.bench.limits.stand import GRACE_S, Stand, request
from ops.simulator.faults import FAULTS
from ops.simulator.ledger import Call

JOBS = 2_000
SHARE = 0.2
IN_FLIGHT = 50
MAX_ATTEMPTS = 5
CALL_TIMEOUT_S = 2.0  # ends the kinds that hang
RETRY_AFTER_S = 1.0
PATIENCE_S = 330.0
#: Every so many jobs one is always faulty, the kinds in turn.
DOOMED_EVERY = 37
DOOMS = ("400", "404", "421", "500", "thinking_only", "repetition")

#: Faults that end a job at once, and those that count as no attempt.
FINAL = ("400", "404", "421")
FREE = ("401", "402", "403", "429")
#: Codes of failures that are not `http_<status>`.
CODES = {
    "400_backend": "backend_refused",
    "421": "content_filter",
    "reset": "connection_lost",
    "stall": "timeout",
    "not_json": "invalid_response",
    "truncated": "invalid_response",
    "thinking_only": "empty_answer",
    "repetition": "degenerate_answer",
    "sse_error": "http_500",
    "stream_cut": "stream_cut",
}


def faults(scale: float) -> list[Row]:
    """A fifth of all calls meets one of every kind there is, in equal shares; some jobs are always faulty."""
    count = int(JOBS * scale)
    rates = [f"{kind}={SHARE / len(FAULTS)}" for kind in FAULTS]
    triggers = [f"{_doom_text(kind)}={kind}" for kind in DOOMS]
    options = [word for rate in rates for word in ("--fault", rate)]
    options += [word for trigger in triggers for word in ("--trigger", trigger)]
    settings = {"max_in_flight": IN_FLIGHT, "max_attempts": MAX_ATTEMPTS, "call_timeout_s": CALL_TIMEOUT_S}
    with Stand("--retry-after", f"{RETRY_AFTER_S:g}", *options, **settings) as stand:
        stand.workers("bulk", 2)
        began = time.monotonic()
        batch = stand.producer.submit_many(_request(number) for number in range(count))
        stand.finished(batch, PATIENCE_S)
        took = time.monotonic() - began
        results = {job.custom_id: job for job in stand.producer.results(batch, follow=False)}
        stand.sleep_until(time.time() + GRACE_S)
        calls = stand.calls()
    met: dict[str, list[Call]] = defaultdict(list)
    for call in calls:
        met[call.tag["job"]].append(call)
    fates = {custom_id: _fate(of_job) for custom_id, of_job in met.items()}
    savable = [custom_id for custom_id, code in fates.items() if code is None]
    others = {custom_id: code for custom_id, code in fates.items() if code is not None}
    saved = sum(results[custom_id].state is JobState.SUCCEEDED for custom_id in savable if custom_id in results)
    failed = {custom_id: job.error.code for custom_id, job in results.items() if job.error is not None}
    right = sum(failed.get(custom_id) == code for custom_id, code in others.items())
    kinds = Counter(call.fault for call in calls if call.fault is not None)
    return [
        all_of("jobs ended", len(results), count),
        all_of("savable jobs succeeded", saved, len(savable)),
        all_of("others failed with the code of what they met last", right, len(others)),
        none_of(f"calls earlier than a Retry-After of {RETRY_AFTER_S:g} s lets any call be", early(calls)),
        none_of("calls earlier than the Retry-After of their own job", early(calls, same_request=True)),
        Row(
            "calls, and faults among them",
            "",
            f"{len(calls):,}, {kinds.total():,} of {len(kinds)} of {len(FAULTS)} kinds",
        ),
        Row("seconds", "", f"{took:.0f}"),
    ]


def _request(number: int) -> dict[str, Any]:
    """Both endpoints, streamed and not, in turn; the custom id is the number."""
    doomed = number % DOOMED_EVERY == DOOMED_EVERY - 1
    words = _doom_text(DOOMS[number // DOOMED_EVERY % len(DOOMS)]) if doomed else "ok"
    body = request(number, stream=number % 2 == 0)
    body["messages"][0]["content"] += words
    url = "/v1/chat/completions"
    if number % 4 < 2:
        url, body = "/v1/messages", {**body, "max_tokens": 4096}
    return {"custom_id": str(number), "method": "POST", "url": url, "body": body}


def _doom_text(kind: str) -> str:
    return f"always-{kind}"


def _fate(calls: Sequence[Call]) -> str | None:
    """The code with which a job has to fail that was called so; None for one that is to be saved."""
    for call in calls:
        if call.fault in FINAL:
            return _code(call)
    counted = sum(call.fault is not None and call.fault not in FREE for call in calls)
    return _code(calls[-1]) if calls[-1].fault is not None and counted >= MAX_ATTEMPTS else None


def _code(call: Call) -> str:
    assert call.fault is not None
    if call.fault == "truncated" and call.stream:
        return "stream_cut"
    return CODES.get(call.fault) or f"http_{FAULTS[call.fault].status}"
