"""Native jobs: submit, look, wait, cancel, list."""

from __future__ import annotations

from typing import Annotated

import msgspec
from fastapi import APIRouter, Query, Request, Response

from api import bodies, submitting
from api.auth import Caller
from api.core import Core
from api.problems import Problem, not_found
from api.routing import After, Limit, Route, Wait, answer, caller_of, core_of, gives, problems, takes
from api.shapes import JobList, NewJob, State
from api.submitting import Key
from api.views import job_view
from jobs.errors import NotFound
from jobs.looks import JobLook
from jobs.pages import jobs_page
from jobs.requests import check_custom_id, parse_body
from jobs.singles import Single, queued
from jobs.states import JobState, job_id
from producers.producer import cancel

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], route_class=Route)

_new_job = msgspec.json.Decoder(NewJob)
_anything = msgspec.json.Decoder()


@router.post(
    "",
    status_code=202,
    response_class=Response,
    summary="Submit a job",
    openapi_extra=takes("NewJob"),
    responses={
        200: gives(
            "This idempotency key's job, or the job that has ended while it was waited for.",
            "Job",
            Location="Its address.",
        ),
        202: gives("It is in the store and will be called.", "Job", Location="Its address."),
        **problems(400, 408, 409, 413, 415, 507),
    },
)
async def submit_job(request: Request, wait: Wait = 0.0, key: Key = None) -> Response:
    """The job is durable before this answers. With `wait` it answers as soon as the job has ended, if that is in time."""
    core, caller = core_of(request), caller_of(request)
    if wait:
        caller.need("read")
    with bodies.place(request):
        body = await bodies.read(request, core.settings.api_max_body_bytes)
        single = await core.aside(len(body), lambda: _read(core, caller, body, key))
        submitted = await core.submit(single)
    if not wait and submitted.created_at:
        return _job(core, caller, queued(single, submitted), 202)
    look = await _waited(core, caller, job_id(submitted.batch_id, 0), wait)
    ended = look.state.terminal and wait > 0
    return _job(core, caller, look, 202 if submitted.created and not ended else 200)


def _read(core: Core, caller: Caller, body: bytes, key: str | None) -> Single:
    """The job that a body asks for. Raises a `Problem` or `InvalidRequest`."""
    new = bodies.decode(body, _new_job)
    if new.custom_id is not None:
        check_custom_id(new.custom_id)
    made = parse_body(bytes(new.request), new.endpoint, model=core.model, custom_id=new.custom_id)
    content = submitting.digest(bodies.decode(body, _anything)) if key is not None else ""
    return Single(submitting.new_batch(core, caller, new, key, content), made)


def _job(core: Core, caller: Caller, look: JobLook, status: int = 200) -> Response:
    headers = {"Location": f"/v1/jobs/{look.job_id}"}
    return answer(job_view(look, core.settings, answer=caller.reads), status, headers)


async def _waited(core: Core, caller: Caller, job: str, wait: float) -> JobLook:
    look = await core.look(caller, job)
    if not wait or look.state.terminal:
        return look
    async with core.waiters.on(look.batch_id, look.index) as waiter:
        return await core.wait(caller, waiter, job, wait)


@router.get(
    "/{job}",
    response_class=Response,
    summary="Look at a job",
    responses={200: gives("The job.", "Job", Location="Its address."), **problems(404)},
)
async def get_job(request: Request, job: str, wait: Wait = 0.0) -> Response:
    """Its state, every attempt, and what came of it. With `wait` it answers once that has ended, or time is up."""
    core, caller = core_of(request), caller_of(request)
    return _job(core, caller, await _waited(core, caller, job, wait))


@router.post(
    "/{job}/cancel",
    response_class=Response,
    summary="Cancel a job",
    responses={200: gives("The job as it is now.", "Job", Location="Its address."), **problems(404, 409)},
)
async def cancel_job(request: Request, job: str) -> Response:
    """A queued job at once, one that is being called within seconds. An answer that has come is kept."""
    core, caller = core_of(request), caller_of(request)
    look = await core.look(caller, job)
    if not look.single:
        raise Problem(
            409,
            "batch_job",
            f"this is one job of a batch, which is cancelled as a whole: /v1/job-batches/{look.batch_id}/cancel",
        )
    await core.threads.call(lambda store: cancel(store, look.batch_id))
    return _job(core, caller, await core.look(caller, job))


@router.get(
    "",
    response_class=Response,
    summary="List jobs",
    responses={200: gives("A page of jobs, without their responses.", "JobList"), **problems(404)},
)
async def list_jobs(
    request: Request,
    batch: Annotated[str | None, Query(max_length=100, description="Of this batch only.")] = None,
    state: Annotated[State | None, Query(description="In this state only.")] = None,
    limit: Limit = 20,
    after: After = None,
) -> Response:
    """By id: those of the newest batch first, within a batch in the order they came in. A page of one state may be short
    and still have others behind it: `has_more` says so."""
    core, caller = core_of(request), caller_of(request)
    wanted = None if state is None else JobState(state)
    try:
        page = await core.threads.call(
            lambda store: store.patience.call(jobs_page, store.client, caller.tenant, batch, wanted, limit, after)
        )
    except NotFound as error:
        raise not_found("batch" if not str(error).startswith("after") else "job to go on behind") from None
    looks = await core.looks(page.items)
    data = [job_view(look, core.settings, answer=False) for look in looks]
    return answer(JobList(data=data, has_more=page.after is not None, after=page.after))
