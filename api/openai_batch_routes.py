"""OpenAI's batches: create, look, list, cancel; and beyond the protocol retry, pause and resume.

A batch is created at once and validated afterwards (`api.clerk`), as the protocol has it. Requests that come inline are
written down as an input file, and are a batch as any other from there on.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from contextlib import ExitStack
from typing import Annotated, BinaryIO

import msgspec
from fastapi import APIRouter, Query, Request, Response

from api import bodies, submitting, uploads
from api.addresses import check_url
from api.batch_routes import CANCEL_STEPS, TENANT_UPLOADS
from api.core import Core
from api.elements import Elements
from api.file_routes import keep
from api.job_routes import Key
from api.openai_shapes import BatchObjectList, BatchOptions
from api.openai_views import PREFIX, batch_object
from api.problems import FINAL, Problem
from api.routing import Route, answer, caller_of, core_of, gives, openai_problems, takes
from api.shapes import MOST_DEADLINE_S
from api.spool import Incoming
from jobs import files, openai_batches
from jobs.cursors import Asked
from jobs.errors import Conflict, NotFound
from jobs.identity import key_identity
from jobs.openai_batches import NewOpenAIBatch, OpenAIBatch
from jobs.requests import ENDPOINTS
from jobs.store import Store
from jobs.submission import NewBatch

#: Bytes of a body beside its requests.
REST_BYTES = 1_000_000
#: Batches of a page.
MOST_BATCHES = 100

WINDOW = "24h"
_WINDOW = re.compile(r"([1-9][0-9]{0,8})([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
_BATCH_ID = re.compile(PREFIX + "([0-9a-f]{24})")
#: Where in a body a decoder has found something wrong.
_MEMBER = re.compile(r"`\$\.([a-z_]+)|(?:missing required|unknown) field `([A-Za-z0-9_]+)`")

router = APIRouter(prefix="/v1/batches", tags=["openai batches"], route_class=Route)

_FOUND = gives("The batch.", "BatchObject")
_raw = msgspec.json.Decoder(msgspec.Raw)
_options = msgspec.json.Decoder(BatchOptions)


# -- creating


@router.post(
    "",
    response_class=Response,
    summary="Create a batch",
    openapi_extra=takes("NewBatchObject"),
    responses={200: _FOUND, **openai_problems(400, 404, 408, 409, 413, 415, 507)},
)
async def create_batch(request: Request, key: Key = None) -> Response:
    """Of an uploaded file, or of `requests` inline, read as a stream. Its lines are validated afterwards, all or nothing."""
    core, tenant = core_of(request), caller_of(request).tenant
    with core.turn(tenant, "uploads", TENANT_UPLOADS):
        body = bodies.chunks(request, core.settings.batch_max_bytes + REST_BYTES)
        batch = await uploads.carried(core, body, lambda store, stream: _create(core, store, stream, tenant, key))
    core.clerk.wake()
    return answer(batch_object(batch))


def _create(core: Core, store: Store, stream: BinaryIO, tenant: str, key: str | None) -> OpenAIBatch:
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
        input_file_id = options.input_file_id or ""
        content = submitting.digest([options, lines.hexdigest()])
        if inline is not None:
            input_file_id = keep(core, store, inline, tenant, "batch", "requests.jsonl", files.BATCH_KEPT_S).file_id
        else:
            _check_input(store, tenant, input_file_id)
        new = _new(options, tenant, input_file_id, content, key)
        try:
            batch_id, created = store.patience.call(openai_batches.create, store.client, new)
        except Conflict as error:
            _drop(core, store, inline, input_file_id)
            raise Problem(409, "idempotency_conflict", str(error), headers=FINAL) from None
        if not created:
            _drop(core, store, inline, input_file_id)
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
        where = _MEMBER.search(told)
        param = None if where is None else where[1] or where[2]
        code = "missing_required_parameter" if "missing required" in told else "invalid_value"
        if "unknown field" in told:
            code = "unknown_parameter"
        raise Problem(400, code, bodies.words(told), param=param) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError):
        raise Problem(400, "not_json", "the body is not JSON in UTF-8") from None


def _check(core: Core, options: BatchOptions, inline: bool) -> None:
    if inline == (options.input_file_id is not None):
        told = "give input_file_id, the id of an uploaded file, or requests, not both"
        code = "invalid_value" if inline else "missing_required_parameter"
        raise Problem(400, code, told, param="input_file_id")
    if options.endpoint not in ENDPOINTS:
        raise Problem(400, "invalid_endpoint", f"endpoint: must be one of {', '.join(ENDPOINTS)}", param="endpoint")
    if options.completion_window is None and not inline:
        told = f"completion_window: is missing; {WINDOW} is usual"
        raise Problem(400, "missing_required_parameter", told, param="completion_window")
    if options.model is not None and not inline:
        raise Problem(400, "invalid_value", "model: is for requests inline; lines of a file name theirs", param="model")
    if options.callback_url is not None:
        check_url(options.callback_url, core.settings)


def _check_input(store: Store, tenant: str, file_id: str) -> None:
    try:
        file = store.patience.call(files.get, store.client, tenant, file_id)
    except NotFound:
        raise Problem(404, "not_found", "there is no such file", param="input_file_id") from None
    if file.purpose != "batch":
        told = "input_file_id: the file was not uploaded with the purpose batch"
        raise Problem(400, "invalid_purpose", told, param="input_file_id")


def _new(options: BatchOptions, tenant: str, input_file_id: str, content: str, key: str | None) -> NewOpenAIBatch:
    window = options.completion_window or WINDOW
    return NewOpenAIBatch(
        batch_id=NewBatch().batch_id,
        tenant=tenant,
        endpoint=options.endpoint,
        input_file_id=input_file_id,
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
    )


def window_s(window: str) -> float:
    """Seconds of a completion window as `24h`, `30m` or `7d`. Raises a `Problem`."""
    found = _WINDOW.fullmatch(window)
    seconds = int(found[1]) * _SECONDS[found[2]] if found is not None else 0
    if not 0 < seconds <= MOST_DEADLINE_S:
        told = f"completion_window: a number and s, m, h or d, as {WINDOW}; at most {MOST_DEADLINE_S // 86_400} days"
        raise Problem(400, "invalid_completion_window", told, param="completion_window")
    return float(seconds)


# -- looking


@router.get(
    "",
    response_class=Response,
    summary="List batches",
    responses={200: gives("A page of batches.", "BatchObjectList"), **openai_problems(400)},
)
async def list_batches(
    request: Request,
    after: Annotated[str | None, Query(max_length=200, description="Go on behind this id.")] = None,
    limit: Annotated[int, Query(ge=1, le=MOST_BATCHES, description="Batches of a page, at most.")] = 20,
) -> Response:
    """Newest first."""
    core, tenant = core_of(request), caller_of(request).tenant
    try:
        asked = Asked(limit, None if after is None else _id_of(after))
        found, more = await core.threads.call(
            lambda store: store.patience.call(openai_batches.batches_page, store.client, tenant, asked)
        )
    except NotFound:
        raise Problem(400, "invalid_cursor", "after: there is no such batch", param="after") from None
    data = [batch_object(batch) for batch in found]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return answer(BatchObjectList(data=data, first_id=first, last_id=last, has_more=more))


@router.get(
    "/{batch}", response_class=Response, summary="Look at a batch", responses={200: _FOUND, **openai_problems(404)}
)
async def get_batch(request: Request, batch: str) -> Response:
    """Its state, times and counts."""
    core, tenant = core_of(request), caller_of(request).tenant
    return answer(batch_object(await core.threads.call(lambda store: _get(store, tenant, batch))))


def _id_of(name: str) -> str:
    found = _BATCH_ID.fullmatch(name)
    if found is None:
        raise NotFound("there is no such batch")
    return found[1]


def _get(store: Store, tenant: str, name: str) -> OpenAIBatch:
    try:
        return store.patience.call(openai_batches.get, store.client, tenant, _id_of(name))
    except NotFound:
        raise Problem(404, "not_found", "there is no such batch", param="id") from None


# -- changing


@router.post(
    "/{batch}/cancel",
    response_class=Response,
    summary="Cancel a batch",
    responses={200: _FOUND, **openai_problems(400, 404)},
)
async def cancel_batch(request: Request, batch: str) -> Response:
    """What has been answered is kept, and has its lines in the output."""

    def work(store: Store, found: OpenAIBatch) -> None:
        if found.status in ("cancelling", "cancelled"):
            return
        _refuse(found, "cancel", found.status not in ("validating", "in_progress"))
        if not _wish(store, found, "cancelled"):
            store.cancel(found.batch_id, CANCEL_STEPS)

    return await _change(request, batch, work)


@router.post(
    "/{batch}/pause",
    response_class=Response,
    summary="Pause a batch",
    responses={200: _FOUND, **openai_problems(400, 404)},
)
async def pause_batch(request: Request, batch: str) -> Response:
    """Nothing more of it is called; calls in flight end, its window goes on. Its status stays as it is."""

    def work(store: Store, found: OpenAIBatch) -> None:
        _refuse(found, "pause", found.status not in ("validating", "in_progress"))
        if not _wish(store, found, "paused"):
            store.pause(found.batch_id)

    return await _change(request, batch, work)


@router.post(
    "/{batch}/resume",
    response_class=Response,
    summary="Resume a batch",
    responses={200: _FOUND, **openai_problems(400, 404)},
)
async def resume_batch(request: Request, batch: str) -> Response:
    """A paused batch goes on, whatever it paused for."""

    def work(store: Store, found: OpenAIBatch) -> None:
        _refuse(found, "resume", found.status not in ("validating", "in_progress"))
        if not _wish(store, found, "running"):
            store.resume(found.batch_id)

    return await _change(request, batch, work)


@router.post(
    "/{batch}/retry",
    response_class=Response,
    summary="Retry the failed requests of a batch",
    responses={200: _FOUND, **openai_problems(400, 404)},
)
async def retry_batch(request: Request, batch: str) -> Response:
    """Those that failed are called again, and no others; one that was completed goes on, with a new window."""

    def work(store: Store, found: OpenAIBatch) -> None:
        _refuse(found, "retry", found.made is None or found.made.closing != "")
        store.requeue_failed(found.batch_id, found.window_s)

    return await _change(request, batch, work)


def _wish(store: Store, batch: OpenAIBatch, what: openai_batches.Wish) -> bool:
    return store.patience.call(openai_batches.wish, store.client, batch.batch_id, what)


def _refuse(batch: OpenAIBatch, what: str, refused: bool) -> None:
    if refused:
        rest = "; submit what is missing as a new batch" if what == "retry" else ""
        raise Problem(400, "invalid_status", f"a batch that is {batch.status} can't {what}{rest}", headers=FINAL)


async def _change(request: Request, name: str, work: Callable[[Store, OpenAIBatch], None]) -> Response:
    core, tenant = core_of(request), caller_of(request).tenant

    def change(store: Store) -> OpenAIBatch:
        found = _get(store, tenant, name)
        work(store, found)
        return _get(store, tenant, name)

    batch = await core.threads.call(change)
    made = batch.made
    if batch.status == "in_progress" and made is not None and made.state == "running" and made.queued:
        core.ringer.ring(batch.batch_id, made.lane, made.label, made.queued)
    core.clerk.wake()
    return answer(batch_object(batch))
