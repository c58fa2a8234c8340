"""What is stored beside a job's answer: custom id, endpoint, usage and the record of every attempt, as JSON.

The first call of nearly all jobs succeeds, and their number is what fills a store. Of such a one what goes without saying is
left out, see `encode_about`; a reader gets it all the same. Values that say everything, as they once did, are read as well.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

import msgspec

from jobs.requests import CHAT

#: Stands for a body that is not there: msgspec can't read a `Raw | None`, and writes an empty `Raw` as no JSON at all.
NO_BODY_JSON = b"null"
NO_BODY = msgspec.Raw(NO_BODY_JSON)
#: The verdict of an attempt that was the job's answer.
SUCCEEDED: Final = "succeeded"
#: Seconds after its only call's end in which a job's own end is taken for the same.
JUST_NOW_S: Final = 5.0


class Usage(msgspec.Struct, frozen=True):
    """Tokens that one call, or all calls of a job, were billed for, whichever protocol reported them.

    `cached_tokens` are part of `prompt_tokens`, `reasoning_tokens` of `completion_tokens`.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    cached_tokens: int = 0
    total_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.reasoning_tokens + other.reasoning_tokens,
            self.cached_tokens + other.cached_tokens,
            self.total_tokens + other.total_tokens,
        )

    def __sub__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt_tokens - other.prompt_tokens,
            self.completion_tokens - other.completion_tokens,
            self.reasoning_tokens - other.reasoning_tokens,
            self.cached_tokens - other.cached_tokens,
            self.total_tokens - other.total_tokens,
        )


#: Of no call.
NO_USAGE = Usage()


class Attempt(msgspec.Struct, frozen=True, omit_defaults=True):
    """One call of the upstream: when (unix seconds), by which account, what came back and what was made of it."""

    at: float
    latency_s: float
    verdict: str
    account: str = ""
    status: int | None = None
    request_id: str | None = None
    wait_s: float = 0.0
    usage: Usage | None = None
    maybe_billed: bool = False
    counted: bool = True
    times: int = 1
    """How many calls alike this record stands for: the first one's figures, but the usage of all."""


class Failure(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why a job failed: our code, and the upstream's status and body where there was one, else `null`."""

    code: str
    message: str
    status: int | None = None
    body: msgspec.Raw = NO_BODY


class About(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is stored beside the answer."""

    custom_id: str | None
    endpoint: str
    usage: Usage
    attempts: list[Attempt]
    status: int | None = None
    request_id: str | None = None
    error: Failure | None = None
    model: str = ""


class _Tokens(msgspec.Struct, omit_defaults=True):
    """A usage as it is written: in the order in which an upstream's body tells it, whose text is then repeated."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    reasoning_tokens: int = 0
    cached_tokens: int = 0


class _Plain(msgspec.Struct, omit_defaults=True):
    """What is written of a job whose one call succeeded."""

    usage: _Tokens
    request_id: str | None
    model: str
    latency_s: float
    account: str
    custom_id: str | None = None
    endpoint: str | None = None
    wait_s: float | None = None


class _Read(msgspec.Struct):
    """Anything that was ever written."""

    usage: Usage
    custom_id: str | None = None
    endpoint: str = CHAT
    attempts: list[Attempt] | None = None
    status: int | None = None
    request_id: str | None = None
    error: Failure | None = None
    model: str = ""
    latency_s: float = 0.0
    account: str = ""
    # A new object each time: where msgspec writes an `Attempt`, it leaves out what is its very default.
    wait_s: float = msgspec.field(default_factory=float)


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(_Read).decode


def encode_about(about: About, now: float) -> tuple[str, bytes]:
    """When the job ended, ISO 8601 in UTC, and the rest as JSON, everything by its name; `now` in unix seconds.

    Of a job whose one call succeeded, `attempts`, `status` and the verdict are left out. The call is told by `latency_s`,
    `account`, `wait_s` and what it shares with the job; its status was 200, and it began `latency_s` before the end. So is
    what is nothing or the default: no custom id, chat completions, no wait, tokens of which there were none.
    """
    if not _is_plain(about, now):
        return _iso(now), _encode(about)
    (call,) = about.attempts
    usage = about.usage
    plain = _Plain(
        _Tokens(
            usage.prompt_tokens,
            usage.completion_tokens,
            usage.total_tokens,
            usage.reasoning_tokens,
            usage.cached_tokens,
        ),
        about.request_id,
        about.model,
        call.latency_s,
        call.account,
        about.custom_id,
        None if about.endpoint == CHAT else about.endpoint,
        call.wait_s or None,
    )
    return _iso(call.at + call.latency_s), _encode(plain)


def _is_plain(about: About, now: float) -> bool:
    """Whether the job's one call succeeded, and all that is left out then can be told from the rest."""
    if len(about.attempts) != 1 or about.status != 200 or about.error is not None:
        return False
    (call,) = about.attempts
    return (
        call.verdict == SUCCEEDED
        and call.status == 200
        and call.request_id == about.request_id
        and call.usage == about.usage
        and call.times == 1
        and call.counted
        and not call.maybe_billed
        and round(call.at, 3) == call.at
        and abs(now - call.at - call.latency_s) < JUST_NOW_S
    )


def decode_about(raw: bytes | msgspec.Raw, ended: str | None) -> About:
    """Reads it back, of a job that `ended` then. Raises `ValueError` or a `MsgspecError` when it is not one of ours."""
    read = _decode(raw)
    status, attempts = read.status, read.attempts
    if attempts is None:
        ended_at = datetime.fromisoformat(ended or "").replace(tzinfo=UTC).timestamp()
        began_at = round(ended_at - read.latency_s, 3)
        status = 200
        attempts = [
            Attempt(began_at, read.latency_s, SUCCEEDED, read.account, 200, read.request_id, read.wait_s, read.usage)
        ]
    return About(read.custom_id, read.endpoint, read.usage, attempts, status, read.request_id, read.error, read.model)


def _iso(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).replace(tzinfo=None).isoformat()
