"""The application: routes behind their door, and the OpenAPI file that is made from them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from api import batch_routes, calls, job_routes, operations, webhook_routes
from api.anthropic import batches as message_batches
from api.anthropic import shapes as anthropic_shapes
from api.core import Core
from api.door import Door, handle
from api.openai import batches as openai_batches
from api.openai import files as openai_files
from api.openai import shapes as openai_shapes
from api.problems import Problem
from api.routing import ref
from api.shapes import SHAPES
from jobs.chat import ChatBody
from jobs.errors import MimoqError
from jobs.messages import MessagesBody
from jobs.requests import CHAT, MESSAGES

DESCRIPTION = """\
Completions of the MaaS MiMo API through a durable queue: submit, poll, wait, be told. Native jobs and batches speak the
shapes below; `/v1/chat/completions` and `/v1/messages` are the calls that OpenAI's and Anthropic's SDKs make.
"""
#: The forms of a request in a batch. One without an address is for the endpoint of the batch.
FORMS: list[dict[str, Any]] = [
    *(
        {
            "type": "object",
            "properties": {"custom_id": {"type": "string"}, "url": {"const": url}, "body": ref(body)},
            "required": ["url", "body"],
        }
        for url, body in ((CHAT, "ChatBody"), (MESSAGES, "MessagesBody"))
    ),
    {"type": "object", "properties": {"prompt": {"type": "string"}}, "required": ["prompt"]},
    {"type": "object", "description": "A bare body."},
]
ROUTERS = (
    job_routes.router,
    batch_routes.router,
    calls.router,
    openai_files.router,
    openai_batches.router,
    message_batches.router,
    webhook_routes.router,
    operations.router,
)


def make_app(core: Core | None = None) -> FastAPI:
    """The routes; without a core, for their documents only."""
    app = FastAPI(
        title="mimoq",
        version=version("mimoq"),
        description=DESCRIPTION,
        redoc_url=None,
        lifespan=_lifespan,
        separate_input_output_schemas=False,
        telemetry={"tracing": False, "metrics": False, "logs": False},
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
    )
    app.state.core = core
    for router in ROUTERS:
        # Not by include_router, which puts another router before each: 30 µs a request.
        app.router.routes.extend(router.routes)
    for kind in (Problem, MimoqError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, handle)
    app.add_exception_handler(405, _other_method)
    app.openapi = lambda: _openapi(app, FastAPI.openapi(app))  # type: ignore[method-assign]
    return app


async def _other_method(request: Request, error: Exception) -> Response:
    """Starlette's Allow names the methods of one route alone; here it names those of all at this address."""
    assert isinstance(error, HTTPException)
    routes = [route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)]
    allowed = {
        method for route in routes if route.path_regex.match(request.scope["path"]) for method in route.methods or ()
    }
    if allowed:
        error.headers = {"Allow": ", ".join(sorted(allowed))}
    return await handle(request, error)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    core: Core = app.state.core
    async with core.running():
        yield


def guarded(app: FastAPI, core: Core) -> Door:
    """The application behind its door."""
    return Door(app, core.auth, core.rates, core.counts.request)


def _openapi(app: FastAPI, made: dict[str, Any]) -> dict[str, Any]:
    """FastAPI's document with our shapes in it, and tokens."""
    template = "#/components/schemas/{name}"
    _, shapes = msgspec.json.schema_components(
        SHAPES + openai_shapes.SHAPES + anthropic_shapes.SHAPES, ref_template=template
    )
    schemas: dict[str, Any] = dict(shapes)
    for model in (ChatBody, MessagesBody):
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        for name, inner in schema.pop("$defs", {}).items():
            schemas.setdefault(name, inner)
        schemas[model.__name__] = schema
    job, batch = schemas["NewJob"], schemas["NewBatchBody"]
    job["properties"]["request"] = {"description": "The body of a call, sent as it is.", "type": "object"}
    job["oneOf"] = [
        {"properties": {"endpoint": {"const": CHAT}, "request": ref("ChatBody")}},
        {"properties": {"endpoint": {"const": MESSAGES}, "request": ref("MessagesBody")}, "required": ["endpoint"]},
    ]
    batch["properties"]["requests"]["items"] = {"anyOf": FORMS}
    components = made.setdefault("components", {})
    components["schemas"] = dict(sorted(schemas.items()))
    components["securitySchemes"] = {
        "token": {"type": "http", "scheme": "bearer"},
        "key": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
    }
    for path, methods in made["paths"].items():
        for operation in methods.values():
            if path.startswith("/v1/"):
                operation["security"] = [{"token": []}, {"key": []}]
            # FastAPI adds its own shape of this answer; ours is another.
            if operation["responses"].get("422", {}).get("description") == "Validation Error":
                del operation["responses"]["422"]
    return made
