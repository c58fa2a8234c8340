"""What is stored beside a job's answer: custom id, endpoint, usage and the record of every attempt, as JSON.

The first call of nearly all jobs succeeds, and their number is what fills a store. Of such a one what goes without saying is
left out, see `encode_about`; a reader gets it all the same. Values that say everything, as they once did, are read as well.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

import msgspec

from jobs.requests import CHAT
from jobs.usage import Usage, told_by

#: Stands for a body that is not there: msgspec can't read a `Raw | None`, and writes an empty `Raw` as no JSON at all.
NO_BODY_JSON = b"null"
NO_BODY = msgspec.Raw(NO_BODY_JSON)
#: The verdict of an attempt that was the job's answer.
SUCCEEDED: Final = "succeeded"
#: Seconds after its only call's end in which a job's own end is taken for the same.
JUST_NOW_S: Final = 5.0


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


class _Plain(msgspec.Struct, omit_defaults=True):
    """What is written of a job whose one call succeeded."""

    request_id: str | None
    latency_s: float
    usage: Usage | None = None
    model: str | None = None
    account: str | None = None
    custom_id: str | None = None
    endpoint: str | None = None
    wait_s: float | None = None


class _Read(msgspec.Struct):
    """Anything that was ever written."""

    usage: Usage | None = None
    custom_id: str | None = None
    endpoint: str = CHAT
    attempts: list[Attempt] | None = None
    status: int | None = None
    request_id: str | None = None
    error: Failure | None = None
    model: str | None = None
    latency_s: float = 0.0
    account: str = ""
    # A new object each time: where msgspec writes an `Attempt`, it leaves out what is its very default.
    wait_s: float = msgspec.field(default_factory=float)


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(_Read).decode


def encode_about(about: About, now: float, body: bytes = b"", account: str = "") -> tuple[str, bytes]:
    """When the job ended, ISO 8601 in UTC, and the rest as JSON, everything by its name; `now` in unix seconds.

    Of a job whose one call succeeded, `attempts`, `status` and the verdict are left out. The call is told by `latency_s`,
    `wait_s` and what it shares with the job; its status was 200, and it began `latency_s` before the end. Also left out are
    what its `body`, the answer, tells (usage, model), its account where that is `account`, which the batch's record names,
    and what is nothing or the default: no custom id, chat completions, no wait.
    """
    if not _is_plain(about, now):
        return _iso(now), _encode(about)
    (call,) = about.attempts
    told = told_by(body)
    plain = _Plain(
        about.request_id,
        call.latency_s,
        None if about.usage == told.usage else about.usage,
        None if about.model == told.model else about.model,
        None if account and call.account == account else call.account,
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


def decode_about(raw: bytes | msgspec.Raw, ended: str | None, body: bytes | msgspec.Raw = b"") -> About:
    """Reads it back, of a job that `ended` then with this answer. An account that was left out is ''.

    Raises `ValueError` or a `MsgspecError` when it is not one of ours.
    """
    read = _decode(raw)
    usage, model, status, attempts = read.usage, read.model, read.status, read.attempts
    if attempts is None:
        if usage is None or model is None:
            told = told_by(body)
            usage, model = usage or told.usage, told.model if model is None else model
        if usage is not None:
            ended_at = datetime.fromisoformat(ended or "").replace(tzinfo=UTC).timestamp()
            began_at = round(ended_at - read.latency_s, 3)
            status = 200
            attempts = [
                Attempt(began_at, read.latency_s, SUCCEEDED, read.account, 200, read.request_id, read.wait_s, usage)
            ]
    if usage is None or attempts is None:
        raise ValueError("nothing tells the usage")
    return About(read.custom_id, read.endpoint, usage, attempts, status, read.request_id, read.error, model or "")


def with_account(about: About, account: str) -> About:
    """The same with the account, its batch's, that was left out."""
    if not account or not any(attempt.account == "" for attempt in about.attempts):
        return about
    named = [msgspec.structs.replace(item, account=item.account or account) for item in about.attempts]
    return msgspec.structs.replace(about, attempts=named)


def _iso(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).replace(tzinfo=None).isoformat()
