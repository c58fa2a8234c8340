"""The outcome of one attempt: what came back from one call of the upstream, before anyone judges it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import msgspec

from jobs.results import Usage
from worker.answers import Answer

__all__ = ["MAX_RETRY_AFTER_S", "Outcome", "ResponseHead", "Usage"]

MAX_RETRY_AFTER_S = 600.0


class Outcome(msgspec.Struct, kw_only=True):
    """What one call came to. Either a whole response (`error` is None) or what kept it from coming.

    `error` is one of `connect_error`, `connect_timeout`, `timeout` (the whole call took too long), `idle_timeout`,
    `connection_lost`, `stream_cut`, `invalid_response`, `too_large`, `aborted`, `internal_error`.
    """

    started_at: float
    latency_s: float = 0.0
    status: int | None = None
    error: str | None = None
    detail: str | None = None
    """What kind of failure `error` was, for people; holds nothing of a request or an answer."""
    body: bytes | None = None
    """The body as it came; of a stream the joined object, of a cut one what had come. Error bodies end at 64 KB."""
    answer: Answer | None = None
    """What the body of a 2xx response says."""
    request_id: str | None = None
    retry_after_s: float | None = None
    """What the upstream asked for, at least 0 and at most 600."""
    retry_after_asked_s: float | None = None
    """The same as it was asked for, where that was more than 600."""
    usage: Usage | None = None
    sent: bool = False
    """Whether any byte of the request may have reached the upstream."""
    rate_limits: dict[str, float] | None = None
    """`{limit,remaining,reset}_{requests,tokens}` where the upstream reports them; resets in seconds from now."""
    streamed: bool = False

    def __repr__(self) -> str:
        size = "no body" if self.body is None else f"{len(self.body)} bytes"
        return f"<Outcome {self.error or self.status}, {self.latency_s:.3f} s, {size}>"


class ResponseHead(msgspec.Struct):
    """What the header of a response says that concerns us."""

    content_type: str = ""
    encoded: bool = False
    request_id: str | None = None
    retry_after_s: float | None = None
    retry_after_asked_s: float | None = None
    rate_limits: dict[str, float] | None = None

    @classmethod
    def read(cls, headers: Iterable[tuple[bytes, bytes]], now: float) -> ResponseHead:
        """Read raw header lines in one pass; `now` in Unix seconds, for dates."""
        head = cls()
        after_ms = after = None
        for raw_name, raw_value in headers:
            name = raw_name.lower()
            if name not in _HEADERS:
                continue
            value = raw_value.decode("latin-1").strip()
            if name == b"content-type":
                head.content_type = value.partition(";")[0].strip().lower()
            elif name == b"content-encoding":
                head.encoded = value.lower() not in ("", "identity")
            elif name == b"x-request-id":
                head.request_id = value or head.request_id
            elif name == b"request-id":
                head.request_id = head.request_id or value or None
            elif name == b"retry-after-ms":
                after_ms = _number(value)
            elif name == b"retry-after":
                after = _retry_after(value, now)
            elif (number := _rate_limit(_HEADERS[name], value, now)) is not None:
                head.rate_limits = head.rate_limits or {}
                head.rate_limits[_HEADERS[name]] = number
        asked = after if after_ms is None else after_ms / 1000
        if asked is not None:
            head.retry_after_s = min(max(asked, 0.0), MAX_RETRY_AFTER_S)
            head.retry_after_asked_s = asked if asked > MAX_RETRY_AFTER_S else None
        return head


_HEADERS = dict.fromkeys(
    (b"content-type", b"content-encoding", b"x-request-id", b"request-id", b"retry-after", b"retry-after-ms"), ""
) | {
    form % (a.encode(), b.encode()): f"{kind}_{what}"
    for kind in ("limit", "remaining", "reset")
    for what in ("requests", "tokens")
    for form, a, b in ((b"x-ratelimit-%s-%s", kind, what), (b"anthropic-ratelimit-%s-%s", what, kind))
}

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|us|µs|ns|h|m|s)")
_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}


def _number(value: str) -> float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _retry_after(value: str, now: float) -> float | None:
    """Seconds as an integer or a float, or an HTTP date."""
    if (seconds := _number(value)) is not None:
        return seconds
    try:
        return _since(parsedate_to_datetime(value), now)
    except (ValueError, TypeError, OverflowError):
        return None


def _rate_limit(name: str, value: str, now: float) -> float | None:
    """A count, or for a reset seconds: plain, as a duration (`6m0s`), or as an RFC 3339 time."""
    number = _number(value)
    if number is not None or not name.startswith("reset"):
        return None if number is None else max(number, 0.0)
    if _DURATION.sub("", value) == "":
        return sum(float(amount) * _UNITS[unit] for amount, unit in _DURATION.findall(value)) if value else None
    try:
        return max(_since(datetime.fromisoformat(value), now), 0.0)
    except (ValueError, OverflowError):
        return None


def _since(moment: datetime, now: float) -> float:
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() - now
