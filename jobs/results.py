"""The stored result of a job: a Celery result of the job's id, readable by any Celery app on the same backend.

The value is what Celery's Redis backend would write (JSON, optionally compressed) but for members that say nothing, with the
upstream's body put in as it came and one more member, `mimoq`, that Celery's readers pass over: custom id, endpoint, usage
and the record of every attempt. Success: `get()` gives the body. Failure: `get()` raises `RuntimeError(code, status,
message)`. Cancelled or expired: it raises `TaskRevokedError`.
"""

from __future__ import annotations

import time
import zlib
from datetime import UTC, datetime
from typing import Any, NamedTuple

import msgspec

from jobs.about import NO_BODY as NO_BODY
from jobs.about import NO_BODY_JSON as NO_BODY_JSON
from jobs.about import About as About
from jobs.about import Attempt as Attempt
from jobs.about import Failure as Failure
from jobs.about import decode_about as decode_about
from jobs.about import encode_about
from jobs.compression import deflated, inflated
from jobs.states import JobState
from jobs.usage import NO_USAGE as NO_USAGE
from jobs.usage import Usage as Usage

#: What Celery puts before a compressed result (`celery.backends.base.COMPRESSED_PAYLOAD_MAGIC`), with the shortest name that
#: kombu has for this compression, and with its full one, as Celery itself and an earlier mimoq write it.
MAGIC = b"\x00celery-compressed\x00"
ZLIB = MAGIC + b"zlib\x00"
GZIP = MAGIC + b"application/x-gzip\x00"
#: Of libdeflate: 6 takes a fifth less time for 0.2% more bytes of Redis, 10 about three times as much for 1% fewer.
LEVEL = 8
#: Said of a job that has ended and whose result is not there.
NOT_KEPT = "The result is no longer kept: see MIMOQ_RESULT_TTL_S."
#: In OpenAI's words, of a job that ended without an answer.
_NOT_EXECUTED = {
    JobState.CANCELLED: "This request was not executed because the batch was cancelled.",
    JobState.EXPIRED: "This request could not be executed before the completion window expired.",
}
#: What Anthropic's SDKs know an error object by (not the `request_too_large` of the protocol), and for which status.
_ANTHROPIC_STATUSES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "api_error",
    504: "timeout_error",
    529: "overloaded_error",
}
_ANTHROPIC_TYPES = frozenset(_ANTHROPIC_STATUSES.values())


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


class _Value(msgspec.Struct):
    """A stored value as it lies there."""

    status: str
    task_id: str
    result: msgspec.Raw
    mimoq: msgspec.Raw = NO_BODY
    date_done: str | None = None


class _Refusal(msgspec.Struct):
    error: dict[str, Any]


#: What the error object of OpenAI's protocol has.
_ERROR_KEYS = frozenset({"message", "type", "param", "code"})

#: What stands between the parts of a stored value.
_BEGIN = b'{"status":"'
_RESULT = b'","result":'
_REST = b',"date_done":'
#: What Celery and an earlier mimoq write as well: to Celery's readers it is the same if it is missing.
_NOTHING = b',"traceback":null,"children":[]'
_TASK_ID = b',"task_id":"'
_ABOUT = b'","mimoq":'

_encode = msgspec.json.Encoder().encode
_decode_any = msgspec.json.Decoder().decode
_decode = msgspec.json.Decoder(_Value).decode
_decode_refusal = msgspec.json.Decoder(_Refusal).decode


def success_payload(job_id: str, body: bytes, about: About, compress: bool, account: str = "") -> bytes:
    """The stored value of a job that succeeded with this upstream body; `account` is its batch's."""
    return _pack(job_id, b"SUCCESS", body, about, compress, account)


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


def _pack(job_id: str, status: bytes, result: bytes, about: About, compress: bool, account: str = "") -> bytes:
    ended, beside = encode_about(about, time.time(), result, account)
    value = b"".join(
        (
            _BEGIN,
            status,
            _RESULT,
            result,
            _REST,
            b'"',
            ended.encode(),
            b'"',
            _TASK_ID,
            job_id.encode(),
            _ABOUT,
            beside,
            b"}",
        )
    )
    return compressed(value) if compress else value


def compressed(value: bytes) -> bytes:
    """A value as Celery compresses it, for readers from Celery 5.7 on."""
    return ZLIB + deflated(value, LEVEL)


def unpack(payload: bytes) -> bytes:
    """What was packed, without its compression. Raises `zlib.error` where that is spoilt."""
    for head in (ZLIB, GZIP):
        if payload.startswith(head):
            return inflated(payload[len(head) :])
    return payload


class Parts(NamedTuple):
    """A stored value taken apart: `result` and `about` are JSON as it came, `date_done` is ISO 8601 in UTC, '' for none."""

    status: str
    result: bytes
    about: bytes
    date_done: str


def split(payload: bytes) -> Parts:
    """Takes apart what was packed here, or written by a script (common.lua, revoke), without parsing any JSON.

    Raises `ValueError` when it is neither.
    """
    try:
        value = unpack(payload)
        status = value[len(_BEGIN) : value.index(b'"', len(_BEGIN))]
        start = len(_BEGIN) + len(status) + len(_RESULT)
        # Of a success the body may hold the very same text, of all others what is beside it: the upstream's error.
        end = value.rindex(_REST, start) if status == b"SUCCESS" else value.index(_REST, start)
        date_done, _, rest = value[end + len(_REST) :].partition(_TASK_ID)
        about = rest.partition(_ABOUT)[2]
    except (zlib.error, ValueError):
        raise ValueError("a result is not one of ours") from None
    result = value[start:end].removesuffix(_NOTHING)
    return Parts(status.decode(), result, about[:-1], date_done.decode().strip('"').replace("null", ""))


def decode_result(payload: bytes) -> StoredResult:
    """Reads a stored value back. Raises `ValueError` when it is not one of ours."""
    try:
        value = _decode(unpack(payload))
        about = decode_about(value.mimoq, value.date_done, value.result) if bytes(value.mimoq) != NO_BODY_JSON else None
        return StoredResult(value.status, value.task_id, value.result, about, value.date_done)
    except (zlib.error, msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ValueError(f"a stored result can't be read: {type(error).__name__}") from None


def one_line(raw: bytes | msgspec.Raw) -> bytes:
    """JSON on one line, for those too who cut lines where Unicode does (NEL, U+2028, U+2029).

    Line breaks are only space outside strings, and not allowed raw inside them; the others stand in strings alone.
    """
    data = bytes(raw)
    # Two looks are cheaper than two copies, and most text is ASCII: exports are made of such lines.
    if b"\n" in data or b"\r" in data:
        data = data.replace(b"\n", b" ").replace(b"\r", b" ")
    if data.isascii():
        return data
    data = data.replace(b"\xc2\x85", b"\\u0085")
    return data.replace(b"\xe2\x80\xa8", b"\\u2028").replace(b"\xe2\x80\xa9", b"\\u2029")


def _line(members: dict[str, Any]) -> bytes:
    return one_line(_encode(members)) + b"\n"


def nameless(stored: StoredResult | None) -> bool:
    """Whether a result does not tell its job's custom id: none is kept, or a script wrote it."""
    return stored is None or stored.mimoq is None or stored.status == "REVOKED"


def upstream_error(failure: Failure) -> dict[str, Any] | None:
    """The error object of an upstream's refusal; None for what is no refusal, or holds none that SDKs can read."""
    if failure.status is None or failure.status < 400:
        return None
    try:
        return _decode_refusal(failure.body).error
    except (ValueError, RecursionError):
        return None


def output_line(
    job_id: str, custom_id: str | None, stored: StoredResult | None, state: JobState | None = None
) -> bytes:
    """The line of an OpenAI batch output or error file for one ended job, with its line break.

    `stored` is None for a job whose result is no longer kept, or not told yet: `state` says what became of it then.
    """
    about = stored.mimoq if stored is not None else None
    response: Any = None
    error: Any = None
    if stored is not None and stored.status == "SUCCESS":
        response = {
            "status_code": (about and about.status) or 200,
            "request_id": about and about.request_id,
            "body": stored.result,
        }
    elif about is not None and about.error is not None:
        failure = about.error
        if (body := _refused_body(failure)) is not None:
            response = {"status_code": failure.status, "request_id": about.request_id, "body": body}
        if response is None or failure.status is None or failure.status < 400:
            # An HTTP error speaks for itself in the protocol; a bad answer with status 200 does not.
            error = {"code": failure.code, "message": failure.message}
    elif (ended := _unanswered(stored, state)) is None:
        error = {"code": "result_expired", "message": NOT_KEPT}
    else:
        error = {"code": f"batch_{ended}", "message": _NOT_EXECUTED[ended]}
    return _line({"id": f"batch_req_{job_id}", "custom_id": custom_id, "response": response, "error": error})


def _refused_body(failure: Failure) -> Any:
    """What the upstream answered, an object in any case; None where there is nothing of it, or a bad answer is none."""
    if failure.status is None or bytes(failure.body) == NO_BODY_JSON:
        return None
    body: Any = failure.body
    try:
        told = _decode_any(failure.body)
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        if failure.status < 400:
            return None
        told = {"error": {"message": failure.message, "type": "upstream_error", "code": failure.code}}
        body = told
    error = told.get("error")
    if failure.status >= 400 and isinstance(error, dict) and not error.keys() >= _ERROR_KEYS:
        body = {**told, "error": {**dict.fromkeys(sorted(_ERROR_KEYS)), **error}}
    return body


def message_line(custom_id: str | None, stored: StoredResult | None, state: JobState | None = None) -> bytes:
    """The line of an Anthropic message batch's results for one ended job, with its line break.

    `stored` and `state` are as for `output_line`.
    """
    about = stored.mimoq if stored is not None else None
    result: dict[str, Any]
    if stored is not None and stored.status == "SUCCESS":
        result = {"type": "succeeded", "message": stored.result}
    elif about is not None and about.error is not None:
        result = _errored(_anthropic_error(about.error), about.request_id)
    elif (ended := _unanswered(stored, state)) is None:
        result = _errored({"type": "api_error", "message": NOT_KEPT}, None)
    else:
        result = {"type": "canceled" if ended is JobState.CANCELLED else "expired"}
    return _line({"custom_id": custom_id, "result": result})


def _unanswered(stored: StoredResult | None, state: JobState | None) -> JobState | None:
    """Whether a job without an answer and a failure was cancelled or has expired; None where nothing tells."""
    if stored is not None:
        return JobState.EXPIRED if b'"expired"' in bytes(stored.result) else JobState.CANCELLED
    return state if state in _NOT_EXECUTED else None


def _errored(error: dict[str, Any], request_id: str | None) -> dict[str, Any]:
    # Two levels: the inner one is what an HTTP answer's body would hold.
    return {"type": "errored", "error": {"type": "error", "error": error, "request_id": request_id}}


def _anthropic_error(failure: Failure) -> dict[str, Any]:
    """The upstream's own error object where it is one of Anthropic's, else one that says the same."""
    error = upstream_error(failure) or {}
    kind, message = error.get("type"), error.get("message")
    if not isinstance(message, str):
        error, message = {}, f"{failure.code}: {failure.message}"
    if error and isinstance(kind, str) and kind in _ANTHROPIC_TYPES:
        return {"type": kind, "message": message}  # and nothing else that an upstream may add
    status = failure.status if failure.status is not None and failure.status >= 400 else 500
    kind = _ANTHROPIC_STATUSES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": kind, "message": message}


def error_line(row_id: str, custom_id: str | None, code: str, message: str) -> bytes:
    """A line of an error file for something that was never a job, with its line break."""
    error = {"code": code, "message": message}
    return _line({"id": f"batch_req_{row_id}", "custom_id": custom_id, "response": None, "error": error})
