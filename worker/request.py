"""How a job's request is put to the upstream: its address, its header, and the body with `stream` as we want it."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any, Literal, NamedTuple

import httpx
import msgspec

from jobs.settings import Settings
from worker.answers import MESSAGES, NOT_JSON

CHAT = "/v1/chat/completions"
AUTO_STREAM_TOKENS = 4096


class BodyFields(msgspec.Struct):
    """The fields of a request body that decide how it is called."""

    stream: Any = None
    max_completion_tokens: Any = None
    max_tokens: Any = None


class Call(NamedTuple):
    """How one job is asked of the upstream."""

    endpoint: str
    body: bytes
    stream: bool


_fields = msgspec.json.Decoder(BodyFields)
_raw_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_TRUE, _FALSE = msgspec.Raw(b"true"), msgspec.Raw(b"false")


def wants_stream(fields: BodyFields, streaming: Literal["auto", "always", "never"]) -> bool:
    """Whether to stream: `auto` does if the body says so, or allows over 4,096 tokens."""
    if streaming != "auto":
        return streaming == "always"
    limits = (fields.max_completion_tokens, fields.max_tokens)
    return fields.stream is True or any(isinstance(n, int | float) and n > AUTO_STREAM_TOKENS for n in limits)


def prepare(endpoint: str, body: bytes, streaming: Literal["auto", "always", "never"]) -> Call:
    """The body as it is sent: as it came, but for `stream` and, for chat, the usage that must be asked for."""
    try:
        fields = _fields.decode(body)
        stream = wants_stream(fields, streaming)
        if not stream and not fields.stream:
            return Call(endpoint, body, False)
        raw = _raw_fields.decode(body)  # values as they came, numbers to the last digit
        raw["stream"] = _TRUE if stream else _FALSE
        if not stream:
            raw.pop("stream_options", None)
        elif endpoint == CHAT:
            options = raw.get("stream_options")
            given = _raw_fields.decode(options) if options is not None and bytes(options) != b"null" else {}
            raw["stream_options"] = msgspec.Raw(msgspec.json.encode({**given, "include_usage": _TRUE}))
        return Call(endpoint, msgspec.json.encode(raw), stream)
    except NOT_JSON:
        return Call(endpoint, body, False)  # no body of ours; the upstream will say what it thinks of it


def address(settings: Settings, endpoint: str) -> str:
    """Where the calls of an endpoint go: the unified address, or with an endpoint path that of its model."""
    base, path = settings.base_url, settings.endpoint_path
    if path is None:
        return base + endpoint
    return f"{base}/{path}{MESSAGES}" if endpoint == MESSAGES else f"{base}/v1/ai/{path}/chat/completions"


def headers(settings: Settings, endpoint: str) -> httpx.Headers:
    lines = {
        "Content-Type": "application/json",
        "Accept": "application/json, text/event-stream",
        # Answers are small, and what is compressed on its way through a gateway arrives late when streamed.
        "Accept-Encoding": "identity",
        "User-Agent": f"mimoq/{version('mimoq')}",
    }
    if settings.api_key is not None:
        lines["Authorization"] = f"Bearer {settings.api_key.get_secret_value()}"
    if endpoint == MESSAGES:
        lines["anthropic-version"] = "2023-06-01"
    return httpx.Headers(lines)
