"""Native batches: submit inline or as JSON lines, look, list, follow, pause, cancel."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query, Request, Response

from api import bodies, progress, submitting, uploads
from api.auth import Caller
from api.core import CANCEL_STEPS, Core
from api.problems import Problem, not_found
from api.routing import After, Limit, Route, answer, caller_of, core_of, gives, problems, ref
from api.shapes import MOST_DEADLINE_S, BatchList, Endpoint, Lane, NewBatchBody, NewBatchOptions
from api.streams import Stream
from api.submitting import Key
from api.views import batch_view
from jobs.errors import NotFound
from jobs.pages import batches_page
from jobs.requests import CHAT
from jobs.store import BatchStatus, Store
from jobs.submission import NewBatch

#: Types that JSON lines are sent as.
LINES = ("application/jsonl", "application/x-jsonl", "application/x-ndjson", "application/ndjson")

#: One event of its progress, as documented.
EVENT = {
    "type": "object",
    "properties": {
        "event": {"enum": ["progress", "finished"]},
        "data": {"type": "string", "contentMediaType": "application/json", "contentSchema": ref("Progress")},
    },
    "required": ["event", "data"],
}

router = APIRouter(prefix="/v1/job-batches", tags=["batches"], route_class=Route)

_inline = msgspec.json.Decoder(NewBatchBody)
_anything = msgspec.json.Decoder()
_FOUND = gives("The batch.", "Batch")

_TAKES: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": ref("NewBatchBody")},
            LINES[0]: {
                "schema": {
                    "type": "string",
                    "description": "One request a line, in any form that an input file may have; options as parameters.",
                }
            },
        },
    }
}


@router.post(
    "",
    status_code=202,
    response_class=Response,
    summary="Submit a batch",
    openapi_extra=_TAKES,
    responses={
        200: gives("This idempotency key's batch.", "Batch", Location="Its address."),
        202: gives("It is in the store and will be called.", "Batch", Location="Its address."),
        **problems(400, 408, 409, 413, 415, 507),
    },
)
async def submit_batch(
    request: Request,
    key: Key = None,
    endpoint: Annotated[Endpoint, Query(description="Of JSON lines: of those that name none.")] = CHAT,
    lane: Annotated[Lane, Query(description="Of JSON lines: their lane.")] = "bulk",
    deadline_s: Annotated[
        float | None,
        Query(
            gt=0,
            le=MOST_DEADLINE_S,
            allow_inf_nan=False,
            description="Of JSON lines: seconds until it expires.",
        ),
    ] = None,
    max_attempts: Annotated[int | None, Query(ge=1, le=1000, description="Of JSON lines: attempts of one job.")] = None,
    callback_url: Annotated[
        str | None, Query(max_length=2048, description="Of JSON lines: who is told of the end.")
    ] = None,
    metadata: Annotated[
        str | None, Query(max_length=12_000, description="Of JSON lines: pairs of your own, a JSON object.")
    ] = None,
    link: Annotated[
        str | None, Query(max_length=12_000, description="Of JSON lines: the task that follows each, a JSON object.")
    ] = None,
) -> Response:
    """As JSON, its requests inline; or as JSON lines (`application/jsonl`), read as a stream. All or nothing."""
    core, caller = core_of(request), caller_of(request)
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind in LINES:
        given = {
            "endpoint": endpoint,
            "lane": lane,
            "deadline_s": deadline_s,
            "max_attempts": max_attempts,
            "callback_url": callback_url,
            "metadata": None if metadata is None else bodies.decode(metadata.encode(), _anything),
            "link": None if link is None else bodies.decode(link.encode(), _anything),
        }
        try:
            options = msgspec.convert(given, NewBatchOptions)
        except msgspec.ValidationError as error:
            raise Problem(422, "invalid", str(error)) from None
        # For a key the requests themselves tell, as they come, and beside them the options.
        new = submitting.new_batch(core, caller, options, key, beside=submitting.digest(given))
        submitted = await uploads.submit_lines(request, new, options.endpoint)
    elif kind.endswith("json"):
        async with uploads.place(request):
            raw = await bodies.read(request, core.settings.api_max_body_bytes)
            # In a thread: a body of 30 MB takes a second.
            inline, new = await core.inline.call(lambda _: _read_inline(core, caller, raw, key))
            submitted = await uploads.submit_inline(core, inline.requests, new, inline.endpoint)
    else:
        raise Problem(415, "media_type", f"send application/json, or JSON lines as {LINES[0]}")
    status = await core.status(caller, submitted.batch_id)
    headers = {"Location": f"/v1/job-batches/{status.batch_id}"}
    return answer(batch_view(status), 202 if submitted.created else 200, headers)


def _read_inline(core: Core, caller: Caller, raw: bytes, key: str | None) -> tuple[NewBatchBody, NewBatch]:
    inline = bodies.decode(raw, _inline)
    content = submitting.digest(bodies.decode(raw, _anything)) if key is not None else ""
    return inline, submitting.new_batch(core, caller, inline, key, content)


@router.get(
    "",
    response_class=Response,
    summary="List batches",
    responses={200: gives("A page of batches, newest first.", "BatchList"), **problems(404)},
)
async def list_batches(request: Request, limit: Limit = 20, after: After = None) -> Response:
    """Newest first, without jobs that were submitted alone."""
    core, caller = core_of(request), caller_of(request)

    def work(store: Store) -> tuple[list[BatchStatus], str | None]:
        page = store.patience.call(batches_page, store.client, caller.tenant, limit, after)
        found = [
            status for status in store.statuses(page.items) if status is not None
        ]  # of some the retention just ended
        return found, page.after

    try:
        found, behind = await core.threads.call(work)
    except NotFound:
        raise not_found("batch to go on behind") from None
    return answer(BatchList(data=[batch_view(status) for status in found], has_more=behind is not None, after=behind))


@router.get("/{batch}", response_class=Response, summary="Look at a batch", responses={200: _FOUND, **problems(404)})
async def get_batch(request: Request, batch: str) -> Response:
    """Its state and counts, which always add up."""
    return answer(batch_view(await core_of(request).status(caller_of(request), batch)))


@router.post(
    "/{batch}/cancel", response_class=Response, summary="Cancel a batch", responses={200: _FOUND, **problems(404)}
)
async def cancel_batch(request: Request, batch: str) -> Response:
    """Queued jobs at once, those that are being called within seconds. Answers that have come are kept."""
    return await _change(request, batch, lambda store: store.cancel(batch, CANCEL_STEPS))


@router.post(
    "/{batch}/pause", response_class=Response, summary="Pause a batch", responses={200: _FOUND, **problems(404)}
)
async def pause_batch(request: Request, batch: str) -> Response:
    """Nothing more of it is called; calls in flight end."""
    return await _change(request, batch, lambda store: store.pause(batch))


@router.post(
    "/{batch}/resume", response_class=Response, summary="Resume a batch", responses={200: _FOUND, **problems(404)}
)
async def resume_batch(request: Request, batch: str) -> Response:
    """A paused batch goes on, whatever it paused for."""
    return await _change(request, batch, lambda store: store.resume(batch))


async def _change(request: Request, batch: str, work: Any) -> Response:
    core, caller = core_of(request), caller_of(request)
    before = await core.status(caller, batch)
    await core.threads.call(work)
    status = await core.status(caller, batch)
    if before.state != status.state == "running":
        core.ringer.ring(batch, status.lane, status.label, status.queued)
    return answer(batch_view(status))


@router.get(
    "/{batch}/results",
    response_class=Response,
    summary="Read results",
    responses={
        200: {
            "description": "A job a line, with its `cursor`.",
            "content": {LINES[0]: {"schema": {"type": "string"}}},
        },
        **problems(404),
    },
)
async def get_results(
    request: Request,
    batch: str,
    after: Annotated[
        str | None, Query(max_length=200, description="Go on behind this `cursor`, or behind the job of this id.")
    ] = None,
    follow: Annotated[bool, Query(description="Stay until the batch is finished.")] = False,
) -> Response:
    """What has ended so far, in the order of its ends, also while the batch runs; a job that was called again by wish, and
    has ended again, comes again."""
    core, caller = core_of(request), caller_of(request)
    start = await progress.position(core, await core.status(caller, batch), after)
    return Stream(core, caller, progress.results(core, caller, batch, start, follow), LINES[0])


@router.get(
    "/{batch}/events",
    response_class=Response,
    summary="Follow progress",
    responses={
        200: {
            "description": "Server-sent events `progress` and, at last, `finished`; each holds a `Progress`.",
            "content": {"text/event-stream": {"schema": EVENT}},
        },
        **problems(404),
    },
)
async def get_events(request: Request, batch: str) -> Response:
    """Counts, jobs a second, and what holds the batch back: at once, when something has changed, at most once a second."""
    core, caller = core_of(request), caller_of(request)
    await core.status(caller, batch)
    return Stream(core, caller, progress.events(core, batch), "text/event-stream")
