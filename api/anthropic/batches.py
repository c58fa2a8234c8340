"""Anthropic's message batches: create, look, list, cancel, delete, results; each is a batch on the bulk lane, due in a day.

A body is read as a stream and submitted at once, all or nothing; all that is shown comes from the batch's own record.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, BinaryIO

from fastapi import APIRouter, Query, Request, Response

from api import output_rows, uploads
from api.anthropic.requests import messages
from api.anthropic.shapes import PREFIX, WINDOW_S, DeletedMessageBatch, MessageBatchList, message_batch
from api.auth import Caller
from api.core import CANCEL_STEPS, Core
from api.elements import Elements
from api.problems import FINAL, Problem, not_found
from api.retries import Made, Retry, is_retry
from api.routing import Route, answer, caller_of, core_of, gives, takes
from api.streams import Stream
from api.submitting import Key, checked_key
from jobs import batches, cursors, keys
from jobs.cursors import Asked
from jobs.errors import Conflict, NotFound
from jobs.identity import key_identity
from jobs.states import BatchState
from jobs.store import BatchStatus, Store
from jobs.submission import NewBatch, Submitted

PROTOCOL = "anthropic"
LINES = "application/x-jsonl"
#: Bytes of a message batch beside its requests, where nothing is expected.
REST_BYTES = 16_384
#: Batches of a page.
MOST_BATCHES = 1_000

_NAMED = re.compile(rf"{PREFIX}([0-9a-f]{{24}})")
#: A host as it can stand in an address. The SDKs take braces for the names of parts that they are to fill in.
_HOST = re.compile(r"[A-Za-z0-9._-]+(:\d+)?|\[[0-9A-Fa-f:.]+\](:\d+)?")

router = APIRouter(prefix="/v1/messages/batches", tags=["message batches"], route_class=Route)

_ERROR = gives("Anthropic's error object.", "AnthropicErrorAnswer")
_ERRORS: dict[int | str, dict[str, Any]] = {"4XX": _ERROR, "5XX": _ERROR}
_FOUND: dict[int | str, dict[str, Any]] = {200: gives("The batch.", "MessageBatch"), **_ERRORS}

Cursor = Annotated[str | None, Query(max_length=200, description="Of a batch: the page right behind or before it.")]


@router.post(
    "",
    response_class=Response,
    summary="Create a message batch",
    openapi_extra=takes("NewMessageBatch"),
    responses=_FOUND,
)
async def create_message_batch(
    request: Request,
    key: Key = None,
    retry: Retry = None,
) -> Response:
    """Read as a stream. All or nothing: a request that breaks a rule is named, and nothing is submitted."""
    core, caller = core_of(request), caller_of(request)
    settings = core.settings
    new = NewBatch(
        label=core.label,
        slice_size=settings.slice_size,
        ttl_s=settings.result_ttl_s,
        deadline_s=WINDOW_S,
        identity=_identity(caller, key) if key is not None else "",
        tenant=caller.tenant,
        protocol=PROTOCOL,
        alike=f"{PROTOCOL}\n{caller.tenant}" if key is None else "",
        again=is_retry(retry),
    )
    try:
        submitted = await _submit(request, new)
    except Conflict:
        detail = "this Idempotency-Key came before with other requests; nothing was submitted: use a new key"
        raise Problem(409, "conflict", detail, headers=FINAL) from None
    status = await core.status(caller, submitted.batch_id)
    return Made(core, status.batch_id, message_batch(status, _base(request)))


async def _submit(request: Request, new: NewBatch) -> Submitted:
    """Submits the body of a new message batch, `{"requests": [{"custom_id", "params"}, ...]}`.

    Raises a `Problem` in Anthropic's words that names the first requests that break a rule, or what the store raises.
    """
    core = core_of(request)

    def work(store: Store, stream: BinaryIO) -> Submitted:
        elements = Elements(stream, "requests", core.settings.max_line_bytes, REST_BYTES)
        return store.submit(messages(elements, core.settings, core.model), new)

    return uploads.rung(core, new, await uploads.read_in(request, core.settings.message_batch_max_bytes, work))


def _identity(caller: Caller, key: str) -> str:
    """What a key stands under: apart from native ones."""
    return key_identity(f"{PROTOCOL}\n{caller.tenant}\n{checked_key(key)}")


@router.get(
    "",
    response_class=Response,
    summary="List message batches",
    responses={200: gives("A page of batches, newest first.", "MessageBatchList"), **_ERRORS},
)
async def list_message_batches(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=MOST_BATCHES, description="Batches of a page, at most.")] = 20,
    after_id: Cursor = None,
    before_id: Cursor = None,
) -> Response:
    """Newest first: the first page, or the one right behind (`after_id`), or right before (`before_id`), a batch."""
    core, caller = core_of(request), caller_of(request)
    if after_id and before_id:
        raise Problem(400, "invalid_request", "before_id: give it or after_id, not both")
    asked = Asked(limit, _cursor("after_id", after_id), _cursor("before_id", before_id))

    def work(store: Store) -> tuple[list[BatchStatus], bool]:
        name = keys.tenant_protocol(caller.tenant, PROTOCOL)
        return cursors.page(store.client, name, asked, lambda ids: batches.statuses(store.client, ids))

    try:
        found, more = await core.threads.call(lambda store: store.patience.call(work, store))
    except NotFound:
        raise _no_cursor("after_id" if after_id else "before_id") from None
    base = _base(request)
    data = [message_batch(status, base) for status in found]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return answer(MessageBatchList(data, more, first, last))


def _cursor(name: str, shown: str | None) -> str | None:
    if not shown:
        return None
    named = _NAMED.fullmatch(shown)
    if named is None:
        raise _no_cursor(name)
    return named[1]


def _no_cursor(name: str) -> Problem:
    return Problem(400, "invalid_request", f"{name}: is no message batch of yours")


@router.get("/{batch}", response_class=Response, summary="Look at a message batch", responses=_FOUND)
async def get_message_batch(request: Request, batch: str) -> Response:
    """Its state; its counts, once it has ended."""
    return _shown(request, await _look(core_of(request), caller_of(request), batch))


@router.post("/{batch}/cancel", response_class=Response, summary="Cancel a message batch", responses=_FOUND)
async def cancel_message_batch(request: Request, batch: str) -> Response:
    """Queued requests at once, those that are being called within seconds. Answers that have come are kept."""
    core, caller = core_of(request), caller_of(request)
    status = await _look(core, caller, batch)
    if status.state is BatchState.FINISHED:
        raise Problem(400, "invalid_request", "the batch has ended; there is nothing left to cancel")
    await core.threads.call(lambda store: store.cancel(status.batch_id, CANCEL_STEPS))
    return _shown(request, await _look(core, caller, batch))


@router.delete(
    "/{batch}",
    response_class=Response,
    summary="Delete a message batch",
    responses={200: gives("It is no more.", "DeletedMessageBatch"), **_ERRORS},
)
async def delete_message_batch(request: Request, batch: str) -> Response:
    """One that has ended, with its results."""
    core, caller = core_of(request), caller_of(request)
    status = await _look(core, caller, batch)
    try:
        await core.threads.call(lambda store: store.delete(status.batch_id, caller.tenant))
    except Conflict:
        raise Problem(400, "invalid_request", "the batch has not ended; cancel it first") from None
    except NotFound:
        raise not_found("batch") from None
    return answer(DeletedMessageBatch(batch))


@router.get(
    "/{batch}/results",
    response_class=Response,
    summary="Read a message batch's results",
    responses={
        200: {"description": "A request a line.", "content": {LINES: {"schema": {"type": "string"}}}},
        **_ERRORS,
    },
)
async def get_message_batch_results(request: Request, batch: str) -> Response:
    """Of one that has ended: `{custom_id, result}` a line, in the order in which requests ended."""
    core, caller = core_of(request), caller_of(request)
    status = await _look(core, caller, batch)
    if status.state is not BatchState.FINISHED:
        raise Problem(400, "invalid_request", "the batch has not ended; its results come with its end")
    ended = await core.streams.call(lambda store: output_rows.rows(store, status.batch_id, "all"))
    return Stream(core, caller, output_rows.stream(core, status, ended, output_rows.message_block), LINES)


async def _look(core: Core, caller: Caller, batch: str) -> BatchStatus:
    """A message batch of the caller's. Raises a `Problem` (404)."""
    named = _NAMED.fullmatch(batch)
    if named is None:
        raise not_found("batch")
    status = await core.status(caller, named[1])
    if status.protocol != PROTOCOL:
        raise not_found("batch")
    return status


def _shown(request: Request, status: BatchStatus) -> Response:
    return answer(message_batch(status, _base(request)))


def _base(request: Request) -> str:
    """The address that this client calls the API by; '' where it has not told a good one."""
    if core_of(request).settings.api_url is not None:
        return str(core_of(request).settings.api_url).rstrip("/")
    host = request.headers.get("host", "")
    return f"{request.scope['scheme']}://{host}" if _HOST.fullmatch(host) else ""
