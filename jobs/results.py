"""The stored result of a job: a Celery result of the job's id, readable by any Celery app on the same backend.

The value is what Celery's Redis backend would write (JSON, optionally compressed), with the upstream's body put in as it
came and one more member, `mimoq`, that Celery's readers pass over: custom id, endpoint, usage and the record of every
attempt. Success: `get()` gives the body. Failure: `get()` raises `RuntimeError(code, status, message)`. Cancelled or
expired: it raises `TaskRevokedError`.
"""

from __future__ import annotations

import zlib
from datetime import UTC, datetime
from typing import Any

import msgspec

#: What Celery puts before a compressed result (`celery.backends.base.COMPRESSED_PAYLOAD_MAGIC`) and the type's name.
MAGIC = b"\x00celery-compressed\x00"
GZIP = MAGIC + b"application/x-gzip\x00"
#: Stands for a body that is not there: msgspec can't read a `Raw | None`, and writes an empty `Raw` as no JSON at all.
NO_BODY_JSON = b"null"
NO_BODY = msgspec.Raw(NO_BODY_JSON)


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


class StoredResult(msgspec.Struct, frozen=True):
    """A result as read back; `body` is the upstream's answer as it came (JSON `null` where there is none)."""

    status: str
    task_id: str
    result: msgspec.Raw
    mimoq: About | None = None
    date_done: str | None = None

    @property
    def ended_at(self) -> float | None:
        """When it was made, unix seconds; None for what a script wrote."""
        if self.date_done is None:
            return None
        return datetime.fromisoformat(self.date_done).replace(tzinfo=UTC).timestamp()

    def __repr__(self) -> str:
        return f"StoredResult({self.task_id!r}, {self.status})"


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(StoredResult).decode


def success_payload(job_id: str, body: bytes, about: About, compress: bool) -> bytes:
    """The stored value of a job that succeeded with this upstream body."""
    return _pack(job_id, b"SUCCESS", body, about, compress)


def failure_payload(job_id: str, about: About, compress: bool) -> bytes:
    """The stored value of a failed job; `about.error` says why."""
    error = about.error
    assert error is not None
    exception = {
        "exc_type": "RuntimeError",
        "exc_message": [error.code, error.status, error.message],
        "exc_module": "builtins",
    }
    return _pack(job_id, b"FAILURE", _encode(exception), about, compress)


def _pack(job_id: str, status: bytes, result: bytes, about: About, compress: bool) -> bytes:
    done = datetime.now(UTC).replace(tzinfo=None).isoformat().encode()
    value = b"".join(
        (
            b'{"status":"',
            status,
            b'","result":',
            result,
            b',"traceback":null,"children":[],"date_done":"',
            done,
            b'","task_id":"',
            job_id.encode(),
            b'","mimoq":',
            _encode(about),
            b"}",
        )
    )
    return GZIP + zlib.compress(value, 6) if compress else value


def decode_result(payload: bytes) -> StoredResult:
    """Reads a stored value back. Raises `ValueError` when it is not one of ours."""
    try:
        if payload.startswith(GZIP):
            payload = zlib.decompress(payload[len(GZIP) :])
        return _decode(payload)
    except (zlib.error, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"a stored result can't be read: {type(error).__name__}") from None


def one_line(raw: bytes | msgspec.Raw) -> bytes:
    """JSON without line breaks: outside strings they are only space, inside strings JSON does not allow them raw."""
    data = bytes(raw)
    if b"\n" in data or b"\r" in data:
        return data.replace(b"\r", b" ").replace(b"\n", b" ")
    return data


def output_line(job_id: str, custom_id: str | None, stored: StoredResult | None) -> bytes:
    """The line of an OpenAI batch output or error file for one ended job, with its line break.

    `stored` is None for a job whose result is no longer kept.
    """
    about = stored.mimoq if stored is not None else None
    response: Any = None
    error: Any = None
    if stored is None:
        error = {"code": "result_expired", "message": "The result is no longer kept: see MIMOQ_RESULT_TTL_S."}
    elif stored.status == "SUCCESS":
        response = {
            "status_code": (about and about.status) or 200,
            "request_id": about and about.request_id,
            "body": msgspec.Raw(one_line(stored.result)),
        }
    elif about is not None and about.error is not None:
        failure = about.error
        if failure.status is not None and bytes(failure.body) != NO_BODY_JSON:
            response = {
                "status_code": failure.status,
                "request_id": about.request_id,
                "body": msgspec.Raw(one_line(failure.body)),
            }
        if response is None or failure.status is None or failure.status < 400:
            # An HTTP error speaks for itself in the protocol; a bad answer with status 200 does not.
            error = {"code": failure.code, "message": failure.message}
    else:
        why = "expired" if b'"expired"' in bytes(stored.result) else "cancelled"
        error = {"code": f"batch_{why}", "message": f"This request was not executed because the batch was {why}."}
        if why == "expired":
            error["message"] = "This request could not be executed before the batch expired."
    return _encode({"id": f"batch_req_{job_id}", "custom_id": custom_id, "response": response, "error": error}) + b"\n"


def error_line(row_id: str, custom_id: str | None, code: str, message: str) -> bytes:
    """A line of an error file for something that was never a job, with its line break."""
    error = {"code": code, "message": message}
    return _encode({"id": f"batch_req_{row_id}", "custom_id": custom_id, "response": None, "error": error}) + b"\n"
