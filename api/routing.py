"""What the routes share: who calls, what a route documents, and answers of encoded shapes."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import Query, Request, Response
from fastapi.routing import APIRoute

from api.auth import Caller
from api.core import Core
from api.shapes import MOST_WAIT_S, encode

Handler = Callable[[Request], Coroutine[Any, Any, Response]]

#: Items of a page.
MOST_ITEMS = 100

Wait = Annotated[
    float,
    Query(
        ge=0,
        le=MOST_WAIT_S,
        allow_inf_nan=False,
        description="Seconds to wait for the end; the answer comes as soon as it is there.",
    ),
]
Limit = Annotated[int, Query(ge=1, le=MOST_ITEMS, description="Items of a page, at most.")]
After = Annotated[str | None, Query(max_length=200, description="Go on behind this id.")]


#: What is told of errors.
_WORDS = {
    400: "The request is not what it should be.",
    401: "No valid token.",
    403: "The token lacks the scope.",
    404: "There is no such thing, or it is another tenant's.",
    408: "The body has stood still.",
    409: "It stands in the way of something else.",
    413: "The body is too large.",
    415: "The body is encoded, or of another type.",
    422: "A rule is broken; nothing was changed.",
    429: "The token has made its requests of this minute; see Retry-After.",
    431: "The headers are too large.",
    503: "The store does not answer; see Retry-After.",
    507: "The store would have no room for the answers.",
}


class Route(APIRoute):
    """A route that has FastAPI read parameters only of a request that has some: that takes as long as all the rest.

    Any other request means the endpoint's own defaults. So parameters of the path are texts, and all others may be left out.
    """

    def get_route_handler(self) -> Handler:
        """How a request is answered."""
        solved, endpoint, known = super().get_route_handler(), self.endpoint, self.dependant
        assert not any(parameter.field_info.is_required() for parameter in known.query_params + known.header_params)
        assert all(parameter.field_info.annotation is str for parameter in known.path_params)
        headers = {parameter.alias.lower().encode() for parameter in known.header_params}

        async def handle(request: Request) -> Response:
            scope = request.scope
            if scope["query_string"] or any(name in headers for name, _ in scope["headers"]):
                return await solved(request)
            answered: Response = await endpoint(request, **scope["path_params"])
            return answered

        return handle


def core_of(request: Request) -> Core:
    """The process's core."""
    core: Core = request.app.state.core
    return core


def caller_of(request: Request) -> Caller:
    """Who calls; the door has seen to it."""
    caller: Caller = request.scope["caller"]
    return caller


def answer(shape: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A shape as JSON."""
    return Response(encode(shape), status, headers=headers, media_type="application/json")


def ref(name: str) -> dict[str, str]:
    """A schema of the OpenAPI file."""
    return {"$ref": f"#/components/schemas/{name}"}


def gives(description: str, name: str, media_type: str = "application/json", **headers: str) -> dict[str, Any]:
    """How a route documents an answer of the shape `name`."""
    told: dict[str, Any] = {"description": description, "content": {media_type: {"schema": ref(name)}}}
    if headers:
        told["headers"] = {
            name.replace("_", "-"): {"description": text, "schema": {"type": "string"}}
            for name, text in headers.items()
        }
    return told


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """How a route documents its errors; those that every route may answer with are among them."""
    every = {401, 403, 422, 429, 431, 503, *statuses}
    return {status: gives(_WORDS[status], "ProblemDetails", "application/problem+json") for status in sorted(every)}


def openai_problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The same of a route of OpenAI's protocol."""
    every = {400, 401, 403, 429, 431, 503, *statuses}
    return {status: gives(_WORDS[status], "OpenAIErrorAnswer") for status in sorted(every)}


def takes(name: str, media_type: str = "application/json") -> dict[str, Any]:
    """How a route documents the body it reads by itself."""
    return {"requestBody": {"required": True, "content": {media_type: {"schema": ref(name)}}}}
