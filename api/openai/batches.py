"""OpenAI's batches: create, look, list, cancel; and beyond the protocol retry, pause and resume.

A batch is created at once and validated afterwards (`clerk`), as the protocol has it. Requests that come inline are written
down as an input file, and are a batch as any other from there on.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from api import uploads
from api.core import CANCEL_STEPS
from api.openai.creating import REST_BYTES, create
from api.openai.shapes import BatchObject, BatchObjectList
from api.openai.views import PREFIX, batch_object, shown
from api.problems import FINAL, Problem
from api.retries import Made, Retry, is_retry
from api.routing import Route, answer, caller_of, core_of, gives, openai_problems, takes
from api.shapes import encode
from api.submitting import Key
from jobs import openai_batches
from jobs.cursors import Asked
from jobs.errors import NotFound
from jobs.openai_batches import OpenAIBatch, Wish
from jobs.store import Store

#: Batches of a page.
MOST_BATCHES = 100
#: Bytes of errors with which a page ends.
ERRORS_BYTES = 4_000_000

_BATCH_ID = re.compile(PREFIX + "([0-9a-f]{24})")

router = APIRouter(prefix="/v1/batches", tags=["openai batches"], route_class=Route)

_FOUND = gives("The batch.", "BatchObject")


# -- creating


@router.post(
    "",
    response_class=Response,
    summary="Create a batch",
    openapi_extra=takes("NewBatchObject"),
    responses={200: _FOUND, 202: _FOUND, **openai_problems(400, 404, 408, 409, 413, 415, 507)},
)
async def create_batch(request: Request, key: Key = None, retry: Retry = None) -> Response:
    """Of an uploaded file, or of `requests` inline, read as a stream. Its lines are validated afterwards, all or nothing."""
    core, tenant = core_of(request), caller_of(request).tenant
    again = is_retry(retry)
    most = core.settings.batch_max_bytes + REST_BYTES
    batch = await uploads.read_in(request, most, lambda store, stream: create(core, store, stream, tenant, key, again))
    core.clerk.wake()
    return Made(core, batch.batch_id, batch_object(batch, b""), 202 if batch.lenient else 200)


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
        asked = Asked(limit, _id_of(after) if after else None)
        return Response(
            await core.threads.call(lambda store: _page(store, tenant, asked)), media_type="application/json"
        )
    except NotFound:
        raise Problem(400, "invalid_cursor", "after: there is no such batch", param="after") from None


def _page(store: Store, tenant: str, asked: Asked) -> bytes:
    """A page; one with many errors ends early, and is made in a thread, because it is large."""
    found, more = store.patience.call(openai_batches.batches_page, store.client, tenant, asked)
    size = 0
    data: list[BatchObject] = []
    for batch in found:
        size += batch.errors_bytes
        if data and size > ERRORS_BYTES:
            more = True
            break
        data.append(shown(store, batch))
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return encode(BatchObjectList(data=data, first_id=first, last_id=last, has_more=more))


@router.get(
    "/{batch}", response_class=Response, summary="Look at a batch", responses={200: _FOUND, **openai_problems(404)}
)
async def get_batch(request: Request, batch: str) -> Response:
    """Its state, times and counts."""
    core, tenant = core_of(request), caller_of(request).tenant
    return answer(await core.threads.call(lambda store: shown(store, _get(store, tenant, batch))))


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
        if found.status not in ("cancelling", "cancelled"):
            _apply(store, found, "cancel", "cancelled", lambda id: store.cancel(id, CANCEL_STEPS))

    return await _change(request, batch, work)


@router.post(
    "/{batch}/pause",
    response_class=Response,
    summary="Pause a batch",
    responses={200: _FOUND, **openai_problems(400, 404)},
)
async def pause_batch(request: Request, batch: str) -> Response:
    """Nothing more of it is called; calls in flight end, its window goes on. Its status stays as it is."""
    return await _change(request, batch, lambda store, found: _apply(store, found, "pause", "paused", store.pause))


@router.post(
    "/{batch}/resume",
    response_class=Response,
    summary="Resume a batch",
    responses={200: _FOUND, **openai_problems(400, 404)},
)
async def resume_batch(request: Request, batch: str) -> Response:
    """A paused batch goes on, whatever it paused for."""
    return await _change(request, batch, lambda store, found: _apply(store, found, "resume", "running", store.resume))


@router.post(
    "/{batch}/retry",
    response_class=Response,
    summary="Retry the failed requests of a batch",
    responses={200: _FOUND, **openai_problems(400, 404)},
)
async def retry_batch(request: Request, batch: str) -> Response:
    """Those that failed are called again, and no others; one that was completed goes on, with a new window."""

    def work(store: Store, found: OpenAIBatch) -> None:
        if found.made is None or found.made.closing:
            raise _refused(found, "retry", "; submit what is missing as a new batch")
        store.requeue_failed(found.batch_id, found.window_s)

    return await _change(request, batch, work)


def _apply(store: Store, batch: OpenAIBatch, what: str, wish: Wish, change: Callable[[str], object]) -> None:
    """Does this to a batch that runs; of one that is being validated it is noted, and done once it is one."""
    if batch.status not in ("validating", "in_progress"):
        raise _refused(batch, what)
    if not store.patience.call(openai_batches.wish, store.client, batch.batch_id, wish):
        change(batch.batch_id)


def _refused(batch: OpenAIBatch, what: str, rest: str = "") -> Problem:
    return Problem(400, "invalid_status", f"can't {what} a batch that is {batch.status}{rest}", headers=FINAL)


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
    return answer(await core.threads.call(lambda store: shown(store, batch)))
