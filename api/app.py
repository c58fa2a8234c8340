"""The application: routes behind their door, and the OpenAPI file that is made from them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from api import batch_routes, calls, job_routes, operations, webhook_routes
from api.core import Core
from api.door import Door, handle
from api.problems import Problem
from api.shapes import SHAPES
from jobs.chat import ChatBody
from jobs.errors import MimoqError
from jobs.messages import MessagesBody

DESCRIPTION = """\
Completions of the MaaS MiMo API through a durable queue: submit, poll, wait, be told. Native jobs and batches speak the
shapes below; `/v1/chat/completions` and `/v1/messages` are the calls that OpenAI's and Anthropic's SDKs make.
"""
ROUTERS = (job_routes.router, batch_routes.router, calls.router, webhook_routes.router, operations.router)


def make_app(core: Core | None = None) -> FastAPI:
    """The routes; without a core, for their documents only."""
    app = FastAPI(
        title="mimoq",
        version=version("mimoq"),
        description=DESCRIPTION,
        redoc_url=None,
        lifespan=_lifespan,
        separate_input_output_schemas=False,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
    )
    app.state.core = core
    for router in ROUTERS:
        app.include_router(router)
    for kind in (Problem, MimoqError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, handle)
    app.openapi = lambda: _openapi(app, FastAPI.openapi(app))  # type: ignore[method-assign]
    return app


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
    _, shapes = msgspec.json.schema_components(SHAPES, ref_template=template)
    schemas: dict[str, Any] = dict(shapes)
    for model in (ChatBody, MessagesBody):
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        for name, inner in schema.pop("$defs", {}).items():
            schemas.setdefault(name, inner)
        schemas[model.__name__] = schema
    either = [{"$ref": f"#/components/schemas/{name}"} for name in ("ChatBody", "MessagesBody")]
    schemas["NewJob"]["properties"]["request"] = {"description": "The body of a call, sent as it is.", "anyOf": either}
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
