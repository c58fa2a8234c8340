"""What schemathesis is told of this API, in its own process: see `test_api_schema`, which says which things are there."""

from __future__ import annotations

import json
import os
from typing import Any

import httpx
import schemathesis

#: Ids of things that are there, by the names that paths have for them, or, of the several kinds of batches, by what their
#: paths begin with; the token; the operations that give out streams.
THERE: dict[str, str] = json.loads(os.environ.get("THERE", "{}"))
TOKEN = os.environ.get("TOKEN", "")
STREAMS = ("/v1/job-batches/{batch}/events", "/v1/job-batches/{batch}/results")


@schemathesis.hook
def map_path_parameters(context: Any, path_parameters: dict[str, Any] | None) -> dict[str, Any] | None:
    """Also what is there is asked for: in place of every other id that is made up."""
    if path_parameters is None:
        return None
    path = context.operation.path
    there = {**THERE, "batch": next((THERE[start] for start in THERE if path.startswith(f"{start}/")), "")}
    return {
        name: there[name] if name in there and len(str(value)) % 2 else value for name, value in path_parameters.items()
    }


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """What no schema can say: 1.0 is no integer for the upstream, nor for us, and a tool that is chosen must be there."""
    if isinstance(body, dict):
        return {
            name: _chosen(value) if name == "tool_choice" else map_body(context, value) for name, value in body.items()
        }
    if isinstance(body, list):
        return [map_body(context, value) for value in body]
    return int(body) if isinstance(body, float) and body.is_integer() else body


def _chosen(value: Any) -> Any:
    """A choice that names no tool, if it is a good one."""
    if isinstance(value, dict) and value.get("type") == "tool":
        return {"type": "auto"}
    return "auto" if isinstance(value, str) else value


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """A stream ends with its batch, and one that was paused a step before would never end."""
    if case.operation.path in STREAMS and (batch := case.path_parameters.get("batch", "")).isalnum():
        headers = {"Authorization": f"Bearer {TOKEN}"}
        httpx.post(f"{case.operation.base_url}/v1/job-batches/{batch}/cancel", headers=headers, trust_env=False)
