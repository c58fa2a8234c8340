"""How an OpenAI batch is created: its body read as a stream, judged, and written down to be validated.

Requests that come inline are written into an input file as they come, so that they are validated, read and kept as any
other input. What goes wrong: a rule is broken, the disk is full. Nothing is kept then. The store is away: the input
stays a file of its tenant's, because a batch of it may have been made.
"""

from __future__ import annotations

import hashlib
import re
from contextlib import ExitStack
from dataclasses import replace
from typing import BinaryIO

import msgspec

from api import bodies, submitting
from api.addresses import check_url
from api.core import Core
from api.elements import Elements
from api.openai.files import keep
from api.openai.shapes import BatchOptions
from api.openai.spool import Incoming
from api.problems import FINAL, Problem
from api.shapes import MOST_DEADLINE_S
from jobs import files, openai_batches
from jobs.errors import Conflict, NotFound, UsageError
from jobs.identity import key_identity
from jobs.openai_batches import NewOpenAIBatch, OpenAIBatch
from jobs.requests import ENDPOINTS
from jobs.store import Store
from jobs.submission import NewBatch

#: Bytes of a body beside its requests.
REST_BYTES = 1_000_000

WINDOW = "24h"
_WINDOW = re.compile(r"([1-9][0-9]{0,8})([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
#: Where in a body a decoder has found something wrong.
_MEMBER = re.compile(r"`\$\.([a-z_]+)")
_FIELD = re.compile(r"(?:missing required|unknown) field `([A-Za-z0-9_]+)`")

_raw = msgspec.json.Decoder(msgspec.Raw)
_options = msgspec.json.Decoder(BatchOptions)


def create(core: Core, store: Store, stream: BinaryIO, tenant: str, key: str | None, again: bool) -> OpenAIBatch:
    """The batch that a body asks for, or the one that its idempotency key stands for, or, `again`, that it made before.

    Raises a `Problem`.
    """
    with ExitStack() as stack:
        inline: Incoming | None = None
        lines = hashlib.blake2b(digest_size=16)
        elements = Elements(stream, "requests", core.settings.max_line_bytes, REST_BYTES)
        for index, raw in elements:
            if raw is None:
                told = f"requests.{index} is longer than {core.settings.max_line_bytes:,} bytes"
                raise Problem(400, "line_too_long", told, param=f"requests.{index}")
            if index >= core.settings.batch_max_requests:
                told = f"a batch may have {core.settings.batch_max_requests:,} requests"
                raise Problem(400, "too_many_requests", told, param="requests")
            if inline is None:
                inline = stack.enter_context(core.spool.new())
            line = _line(index, raw)
            lines.update(line)
            inline.write(line)
        if elements.found and inline is None:
            raise Problem(400, "empty_array", "requests: must not be empty", param="requests")
        options = _read(elements.rest)
        _check(core, options, elements.found)
        content = submitting.digest([options, lines.hexdigest()])
        new = _new(options, tenant, core.label, content, key, again)
        if inline is not None:
            file = keep(core, store, inline, tenant, "batch", "requests.jsonl", files.BATCH_KEPT_S)
            new = replace(new, input_file_id=file.file_id)
        elif not new.identity or store.batch_of_identity(new.identity) is None:
            _check_input(store, tenant, new.input_file_id)
        try:
            batch_id, _ = store.patience.call(openai_batches.create, store.client, new)
        except Conflict as error:
            _drop(core, store, inline, new.input_file_id)
            raise Problem(409, "idempotency_conflict", str(error), headers=FINAL) from None
        if batch_id != new.batch_id:  # its own may be there already: a call that was not answered is sent again
            _drop(core, store, inline, new.input_file_id)
        return store.patience.call(openai_batches.get, store.client, tenant, batch_id)


def _line(index: int, raw: bytes) -> bytes:
    """A request as a line of a file, with nothing of it changed but line breaks between its fields."""
    if b"\n" in raw or b"\r" in raw:
        try:
            _raw.decode(raw)  # within a string they are not allowed, and stay what they are
        except (ValueError, RecursionError):
            raise Problem(400, "not_json", f"requests.{index} is not JSON", param=f"requests.{index}") from None
        raw = raw.replace(b"\r", b" ").replace(b"\n", b" ")
    return raw + b"\n"


def _drop(core: Core, store: Store, inline: Incoming | None, file_id: str) -> None:
    """The requests that came are those of a batch that is there."""
    if inline is not None:
        core.spool.remove(file_id)
        store.patience.call(files.delete, store.client, file_id)


def _read(members: dict[str, bytes]) -> BatchOptions:
    body = b"{" + b",".join(msgspec.json.encode(name) + b":" + raw for name, raw in members.items()) + b"}"
    try:
        return _options.decode(body)
    except msgspec.ValidationError as error:
        told = str(error)
        where = _MEMBER.search(told) or _FIELD.search(told)
        param = None if where is None else where[1]
        code = "missing_required_parameter" if "missing required" in told else "invalid_value"
        if "unknown field" in told:
            code = "unknown_parameter"
        raise Problem(400, code, bodies.words(told), param=param) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError):
        raise Problem(400, "not_json", "the body is not JSON in UTF-8") from None


def _check(core: Core, options: BatchOptions, inline: bool) -> None:
    if inline == (options.input_file_id is not None):
        told = "stands beside requests; give one of them" if inline else "is missing; give the id of an uploaded file"
        code = "invalid_value" if inline else "missing_required_parameter"
        raise Problem(400, code, f"input_file_id: {told}", param="input_file_id")
    if options.endpoint not in ENDPOINTS:
        raise Problem(400, "invalid_endpoint", f"endpoint: must be one of {', '.join(ENDPOINTS)}", param="endpoint")
    if options.completion_window is None and not inline:
        told = f"completion_window: is missing; {WINDOW} is usual"
        raise Problem(400, "missing_required_parameter", told, param="completion_window")
    if options.model is not None and not inline:
        raise Problem(400, "invalid_value", "model: is for requests inline; lines of a file name theirs", param="model")
    if options.callback_url is not None:
        try:
            check_url(options.callback_url, core.settings)
        except UsageError as error:
            raise Problem(400, "invalid_value", str(error), param="callback_url") from None


def _check_input(store: Store, tenant: str, file_id: str) -> None:
    try:
        file = store.patience.call(files.get, store.client, tenant, file_id)
    except NotFound:
        raise Problem(404, "not_found", "there is no such file", param="input_file_id") from None
    if file.purpose != "batch":
        told = "input_file_id: the file was not uploaded with the purpose batch"
        raise Problem(400, "invalid_purpose", told, param="input_file_id")


def _new(options: BatchOptions, tenant: str, label: str, content: str, key: str | None, again: bool) -> NewOpenAIBatch:
    window = WINDOW if options.completion_window is None else options.completion_window
    return NewOpenAIBatch(
        batch_id=NewBatch().batch_id,
        tenant=tenant,
        endpoint=options.endpoint,
        input_file_id=options.input_file_id or "",
        window=window,
        window_s=window_s(window),
        content=content,
        identity="" if key is None else key_identity(f"openai\n{tenant}\n{submitting.checked_key(key)}"),
        metadata=msgspec.json.encode(options.metadata).decode() if options.metadata else "",
        callback=options.callback_url or "",
        output_ttl_s=options.output_expires_after.seconds if options.output_expires_after is not None else None,
        lenient=options.input_file_id is None,
        model=options.model or "",
        lane=options.lane,
        label=label,
        again=again,
    )


def window_s(window: str) -> float:
    """Seconds of a completion window as `24h`, `30m` or `7d`. Raises a `Problem`."""
    found = _WINDOW.fullmatch(window)
    seconds = int(found[1]) * _SECONDS[found[2]] if found is not None else 0
    if not 0 < seconds <= MOST_DEADLINE_S:
        told = f"completion_window: a number and s, m, h or d, as {WINDOW}; at most {MOST_DEADLINE_S // 86_400} days"
        raise Problem(400, "invalid_completion_window", told, param="completion_window")
    return float(seconds)
