"""OpenAI's files: upload, look, list, read, delete. What is uploaded lies on a disk; a batch's are made as they are read.

The output of a batch that still runs can be read too, with `X-Incomplete: true`; `offset` goes on where the last reading
ended.
"""

from __future__ import annotations

from array import array
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse

from api import bodies, output_rows, uploads
from api.core import Core
from api.openai.multipart import Form, receive
from api.openai.shapes import EXPIRES_S, PURPOSES, FileDeleted, FileList, FileObject, file_object
from api.openai.spool import Incoming
from api.problems import Problem
from api.routing import Route, answer, caller_of, core_of, gives, openai_problems, takes
from api.streams import Stream
from jobs import files, openai_batches
from jobs.cursors import Asked
from jobs.errors import NotFound, StoreFull, StoreUnavailable
from jobs.files import File, Part
from jobs.openai_batches import OpenAIBatch
from jobs.store import Store

#: Bytes of a form beside its file.
FORM_BYTES = 1_000_000
#: Files of a page.
MOST_FILES = 10_000
#: Type of the lines of a batch.
LINES = "application/jsonl"

router = APIRouter(prefix="/v1/files", tags=["files"], route_class=Route)

_FOUND = gives("The file.", "FileObject")


@router.post(
    "",
    response_class=Response,
    summary="Upload a file",
    openapi_extra=takes("FileForm", "multipart/form-data"),
    responses={200: _FOUND, **openai_problems(400, 408, 413, 415, 507)},
)
async def create_file(request: Request) -> Response:
    """A form, written to the disk as it comes. The input of a batch has the purpose `batch` and is called `*.jsonl`."""
    core, tenant = core_of(request), caller_of(request).tenant
    most = max(core.settings.file_max_bytes, core.settings.batch_max_bytes)

    async def write(incoming: Incoming, data: bytes) -> None:
        await core.disk.call(lambda _: incoming.write(data))

    async with uploads.place(request):
        incoming = await core.disk.call(lambda _: core.spool.new())
        try:
            body = bodies.chunks(request, most + FORM_BYTES)
            form = await receive(body, request.headers.get("content-type", ""), incoming, most, write)
            purpose, kept_s = _check(core, form, incoming.size)
            file = await core.disk.call(
                lambda store: keep(core, store, incoming, tenant, purpose, form.filename, kept_s)
            )
        finally:
            await core.disk.call(lambda _: incoming.discard())
    return answer(file_object(file))


def keep(
    core: Core, store: Store, incoming: Incoming, tenant: str, purpose: str, filename: str, kept_s: float | None
) -> File:
    """Makes what has come in a file of the tenant's."""
    file_id, size = files.new_id(), incoming.size
    incoming.commit(file_id)
    try:
        return store.patience.call(files.add, store.client, file_id, tenant, purpose, filename, size, kept_s)
    except StoreUnavailable as error:
        if isinstance(error, StoreFull):  # else it may be known: what is not is taken away as a stray
            core.spool.remove(file_id)
        raise


def _check(core: Core, form: Form, size: int) -> tuple[str, float | None]:
    """What a file is for, and for how long it is kept. Raises a `Problem`."""
    fields = dict(form.fields)
    purpose = fields.pop("purpose", "")
    if purpose not in PURPOSES:
        raise Problem(400, "invalid_purpose", f"purpose: must be one of {', '.join(PURPOSES)}", param="purpose")
    anchor, seconds = fields.pop("expires_after[anchor]", None), fields.pop("expires_after[seconds]", None)
    if fields:
        told = "the form has fields beside file, purpose, expires_after[anchor] and expires_after[seconds]"
        raise Problem(400, "unknown_parameter", told, param=next(iter(fields)))
    kept_s: float | None = files.BATCH_KEPT_S if purpose == "batch" else None
    if anchor is not None or seconds is not None:
        least, most = EXPIRES_S
        good = seconds is not None and seconds.isascii() and seconds.isdecimal() and len(seconds) < 10
        if anchor != "created_at" or not good or not least <= int(seconds or 0) <= most:
            told = f"expires_after: anchor must be created_at, seconds {least:,} to {most:,}"
            raise Problem(400, "invalid_value", told, param="expires_after")
        kept_s = int(seconds or 0)
    if size == 0:
        raise Problem(400, "empty_file", "the file is empty", param="file")
    limit = core.settings.batch_max_bytes if purpose == "batch" else core.settings.file_max_bytes
    if size > limit:
        raise Problem(413, "file_too_large", f"a file of this purpose may have {limit:,} bytes", param="file")
    # A name without an ending is what SDKs send for bytes.
    if purpose == "batch" and "." in form.filename and not form.filename.lower().endswith(".jsonl"):
        raise Problem(400, "invalid_file_format", "the input of a batch must be a .jsonl file", param="file")
    return purpose, kept_s


@router.get(
    "",
    response_class=Response,
    summary="List files",
    responses={200: gives("A page of files.", "FileList"), **openai_problems(400)},
)
async def list_files(
    request: Request,
    after: Annotated[str | None, Query(max_length=200, description="Go on behind this id.")] = None,
    limit: Annotated[int, Query(ge=1, le=MOST_FILES, description="Files of a page, at most.")] = MOST_FILES,
    order: Annotated[str, Query(pattern="^(asc|desc)$", description="By the time of creation.")] = "desc",
    purpose: Annotated[str | None, Query(max_length=64, description="Of this purpose only.")] = None,
) -> Response:
    """Uploaded ones, and the output and errors of batches that are over."""
    core, tenant = core_of(request), caller_of(request).tenant
    asked = Asked(limit, after or None, newest_first=order == "desc")
    if purpose and purpose not in (*PURPOSES, "batch_output"):
        raise Problem(400, "invalid_purpose", f"purpose: must be one of {', '.join(PURPOSES)}", param="purpose")
    try:
        found, more = await core.threads.call(
            lambda store: store.patience.call(files.files_page, store.client, tenant, asked, purpose or "")
        )
    except NotFound:
        raise Problem(400, "invalid_cursor", "after: there is no such file", param="after") from None
    data = [file_object(file) for file in found]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return answer(FileList(data=data, first_id=first, last_id=last, has_more=more))


@router.get(
    "/{file}", response_class=Response, summary="Look at a file", responses={200: _FOUND, **openai_problems(404)}
)
async def get_file(request: Request, file: str) -> Response:
    """Of the output of a batch that still runs the bytes are those it has so far."""
    core, tenant = core_of(request), caller_of(request).tenant
    try:
        found = await core.threads.call(lambda store: store.patience.call(files.get, store.client, tenant, file))
    except NotFound:
        # Of one that grows all lines are measured: who asks often waits for themselves.
        async with core.turns.soon(tenant, "looks at growing files", 1, uploads.TURN_S):
            return answer(await core.streams.call(lambda store: _measured(store, tenant, file)))
    return answer(file_object(found))


def _measured(store: Store, tenant: str, file_id: str) -> FileObject:
    batch, part = growing(store, tenant, file_id)
    assert batch.made is not None
    indexes = _rows(store, batch, part)
    return FileObject(
        id=file_id,
        bytes=output_rows.size(store, batch.made, indexes, output_rows.openai_block),
        created_at=int(batch.made.created_at),
        expires_at=None,
        filename=f"batch_{batch.batch_id}_{part}.jsonl",
        purpose="batch_output",
    )


def growing(store: Store, tenant: str, file_id: str) -> tuple[OpenAIBatch, Part]:
    """The batch whose file this is, of which the last line has not come yet. Raises a `Problem`: 404."""
    found = files.batch_of(file_id)
    if found is not None:
        try:
            batch = store.patience.call(openai_batches.get, store.client, tenant, found[0])
        except NotFound:
            raise no_file() from None
        if batch.made is not None and batch.finalized_at is None:
            return batch, found[1]
    raise no_file()


def _rows(store: Store, batch: OpenAIBatch, part: Part) -> array[int]:
    """The jobs that have a line in the file; of an output that was deleted before a retry, those that came to it since."""
    return output_rows.rows(store, batch.batch_id, part, batch.output_from if part == "output" else 0)


def no_file() -> Problem:
    """There is none of this id, or it is another tenant's."""
    return Problem(404, "not_found", "there is no such file", param="id")


@router.delete(
    "/{file}",
    response_class=Response,
    summary="Delete a file",
    responses={200: gives("It is deleted.", "FileDeleted"), **openai_problems(400, 404)},
)
async def delete_file(request: Request, file: str) -> Response:
    """Of a batch's output the responses are deleted with it. A batch that has begun no longer needs its input."""
    core, tenant = core_of(request), caller_of(request).tenant
    await core.streams.call(lambda store: _delete(core, store, tenant, file))
    return answer(FileDeleted(id=file))


def _delete(core: Core, store: Store, tenant: str, file_id: str) -> None:
    try:
        store.patience.call(files.get, store.client, tenant, file_id)
    except NotFound:
        growing(store, tenant, file_id)
        told = "its batch has not ended; cancel it first"
        raise Problem(400, "file_in_use", told, param="id") from None
    of = files.batch_of(file_id)
    if of is None:
        core.spool.remove(file_id)
    else:
        batch = store.patience.call(openai_batches.get, store.client, tenant, of[0])
        indexes = _rows(store, batch, of[1])
        store.forget_results(of[0], indexes)  # first: who is cut off here asks again, and finds them again
        if of[1] == "output":
            store.patience.call(openai_batches.output_deleted, store.client, of[0])
    store.patience.call(files.delete, store.client, file_id)


@router.get(
    "/{file}/content",
    response_class=Response,
    summary="Read a file",
    responses={
        200: {
            "description": "Its bytes.",
            "headers": {
                "X-Incomplete": {
                    "description": "Of a batch's file: whether lines may follow.",
                    "schema": {"type": "string"},
                },
                "X-Last-Line": {"description": "The `offset` to go on with.", "schema": {"type": "string"}},
            },
            "content": {
                "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
                LINES: {"schema": {"type": "string"}},
            },
        },
        **openai_problems(400, 404),
    },
)
async def get_content(
    request: Request,
    file: str,
    offset: Annotated[int, Query(ge=0, le=2**31, description="Of a batch's file: lines to pass over.")] = 0,
    limit: Annotated[int | None, Query(ge=1, le=2**31, description="Of a batch's file: lines, at most.")] = None,
) -> Response:
    """Of a batch, a job a line: also while it runs, in the order of their ends, so that lines that were there stay."""
    core, caller = core_of(request), caller_of(request)
    headers: dict[str, str] = {}

    def work(store: Store) -> Any:
        of = files.batch_of(file)
        if of is None:
            try:
                return store.patience.call(files.get, store.client, caller.tenant, file)
            except NotFound:
                raise no_file() from None
        try:
            store.patience.call(files.get, store.client, caller.tenant, file)
            incomplete = False
        except NotFound:
            growing(store, caller.tenant, file)
            incomplete = True
        batch = store.patience.call(openai_batches.get, store.client, caller.tenant, of[0])
        indexes = _rows(store, batch, of[1])
        there = len(indexes)
        indexes = indexes[offset : None if limit is None else offset + limit]
        last = min(offset, there) + len(indexes)
        headers["X-Incomplete"] = "true" if incomplete or last < there else "false"
        headers["X-Last-Line"] = str(last)
        return store.status(of[0]), indexes

    found = await core.streams.call(work)
    if isinstance(found, File):
        try:
            path = core.spool.path(file)
        except NotFound:
            raise no_file() from None
        return FileResponse(path, media_type="application/octet-stream", filename=found.filename)
    status, indexes = found
    lines = output_rows.stream(core, status, indexes, output_rows.openai_block)
    return Stream(core, caller, lines, LINES, headers)
