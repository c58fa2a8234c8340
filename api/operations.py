"""What operators ask for, without a token: whether this process serves, what it stands on, and metrics."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response

from api.core import Core
from api.routing import Route, answer, core_of, gives
from api.shapes import Health
from jobs.connections import check_schema
from jobs.errors import MimoqError

#: Seconds that an answer is waited for.
CHECK_S = 2.0

router = APIRouter(tags=["operations"], route_class=Route)


@router.get(
    "/healthz",
    response_class=Response,
    summary="Whether this process serves",
    responses={200: gives("It does.", "Health")},
)
async def healthz(request: Request) -> Response:
    """Looks at nothing but itself."""
    return answer(Health("ok", {"process": "ok"}))


@router.get(
    "/readyz",
    response_class=Response,
    summary="Whether it can do its work",
    responses={200: gives("All answer.", "Health"), 503: gives("One does not; `checks` says which.", "Health")},
)
async def readyz(request: Request) -> Response:
    """Asks Redis, the schema in it, and the broker. Without a broker jobs are still taken, and workers find them."""
    core = core_of(request)
    checks = {"redis": "ok", "schema": "ok", "broker": "ok"}
    store, broker = await asyncio.gather(_store(core), _broker(core))
    if store:
        checks |= {"redis": store, "schema": "unknown"} if "schema" not in store else {"schema": store}
    if broker:
        checks["broker"] = broker
    ready = all(check == "ok" for check in checks.values())
    return answer(Health("ok" if ready else "unavailable", checks), 200 if ready else 503)


async def _store(core: Core) -> str:
    """What is wrong with the store, '' for nothing."""
    try:
        async with asyncio.timeout(CHECK_S):
            await core.checks.call(lambda store: check_schema(store.client))
    except MimoqError as error:
        return str(error)
    except TimeoutError:
        return "Redis does not answer in time"
    return ""


async def _broker(core: Core) -> str:
    try:
        async with asyncio.timeout(CHECK_S):
            await core.checks.call(lambda _: core.ringer.depth("bulk", core.label))
    except MimoqError as error:
        return str(error)
    except TimeoutError:
        return "the broker does not answer in time"
    return ""


@router.get(
    "/metrics",
    response_class=Response,
    summary="Metrics for Prometheus",
    responses={
        200: {
            "description": "Of all processes, and of this one.",
            "content": {"text/plain": {"schema": {"type": "string"}}},
        }
    },
)
async def metrics(request: Request) -> Response:
    """What docs/metrics.md lists; a look at the store serves for a second."""
    text, kind = await core_of(request).scrapes.exposition(request.headers.get("accept", ""))
    return Response(text, headers={"Content-Type": kind})
