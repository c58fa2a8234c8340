"""Requests: which address and which endpoint, whether the body keeps the provider's rules, and what it asks for."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

Endpoint = Literal["chat", "messages"]

DEFAULT_MODEL = "MaaS_Mimo_V2.5_20260423"
DEFAULT_MAX_TOKENS = 32_768
CHARS_PER_TOKEN = 4

Number = Annotated[float, Meta(ge=-2, le=2)]
Temperature = Annotated[float, Meta(ge=0, le=1.5)]
TopP = Annotated[float, Meta(gt=0, le=1)]
Limit = Annotated[int, Meta(ge=1, le=131_072)]
ToolName = Annotated[str, Meta(min_length=1, max_length=64)]
Content = str | list[dict[str, Any]]


class BadRequest(ValueError):
    """The body breaks a rule; the message names field and rule, never a value."""


class Thinking(Struct):
    type: Literal["enabled", "disabled"]


class ResponseFormat(Struct):
    type: Literal["text"]


class StreamOptions(Struct):
    include_usage: bool | None = None


class Function(Struct):
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChatTool(Struct):
    type: Literal["function"]
    function: Function


class ChatMessage(Struct):
    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None


class ChatBody(Struct):
    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    model: str | None = None
    frequency_penalty: Number | None = None
    presence_penalty: Number | None = None
    max_completion_tokens: Limit | None = None
    max_tokens: Limit | None = None
    response_format: ResponseFormat | None = None
    stop: str | Annotated[list[str], Meta(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    thinking: Thinking | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    tool_choice: str | dict[str, Any] | None = None
    tools: list[ChatTool] | None = None
    metadata: Any = None
    user: str | None = None


class MessagesTool(Struct):
    name: ToolName
    description: str | None = None
    input_schema: dict[str, Any] | None = None


class MessagesMessage(Struct):
    role: Literal["user", "assistant"]
    content: Content


class SystemPart(Struct):
    type: Literal["text"]
    text: str


class MessagesBody(Struct):
    messages: Annotated[list[MessagesMessage], Meta(min_length=1)]
    max_tokens: Limit
    model: str | None = None
    system: str | list[SystemPart] | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    thinking: Thinking | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    tool_choice: dict[str, Any] | None = None
    tools: list[MessagesTool] | None = None
    metadata: Any = None
    user: str | None = None


class Tool(Struct):
    name: str
    schema: dict[str, Any]


class Ask(Struct, kw_only=True):
    """What a valid request asks for."""

    endpoint: Endpoint
    model: str
    digest: str
    prompt_tokens: int
    max_tokens: int
    thinking: bool
    stream: bool
    include_usage: bool
    tool: Tool | None  # the one to be called
    stops: list[str]
    tag: Any


def address(path: str) -> tuple[Endpoint, str | None] | None:
    """Endpoint and endpoint path (None on the unified domain) of a URL path, or None for an unknown one."""
    if path == "/v1/chat/completions":
        return "chat", None
    if path == "/v1/messages":
        return "messages", None
    if path.startswith("/v1/ai/") and path.endswith("/chat/completions") and (name := path[7:-17]):
        return "chat", name
    if path.endswith("/v1/messages") and (name := path[1:-12]):
        return "messages", name
    return None


def digest(body: bytes | Mapping[str, Any]) -> str:
    """24 hex digits that stand for a request, however its keys are ordered and whether it is streamed or not."""
    return _digest(_canonical(msgspec.json.decode(body) if isinstance(body, bytes) else dict(body)))


def _canonical(body: dict[str, Any]) -> bytes:
    body.pop("stream", None)
    body.pop("stream_options", None)
    return msgspec.json.encode(body, order="deterministic")


def _digest(canonical: bytes) -> str:
    return blake2b(canonical, digest_size=12).hexdigest()


def read_ask(endpoint: Endpoint, endpoint_path: str | None, raw: bytes) -> Ask:
    """The request of a body. Raises `BadRequest`."""
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise BadRequest("the body is not valid JSON") from None
    typed: ChatBody | MessagesBody
    try:
        typed = msgspec.convert(body, ChatBody) if endpoint == "chat" else msgspec.convert(body, MessagesBody)
    except msgspec.ValidationError as error:
        raise BadRequest(_rule(str(error))) from None
    if not typed.model and endpoint_path is None:
        raise BadRequest("model is required")
    canonical = _canonical(body)
    if isinstance(typed, ChatBody):
        if any(message.content is None and message.role != "assistant" for message in typed.messages):
            raise BadRequest("messages: content is required")
        max_tokens = typed.max_completion_tokens or typed.max_tokens or DEFAULT_MAX_TOKENS
        stops = [typed.stop] if isinstance(typed.stop, str) else typed.stop or []
        tools = [Tool(t.function.name, t.function.parameters or {}) for t in typed.tools or ()]
        include_usage = typed.stream_options is not None and bool(typed.stream_options.include_usage)
    else:
        max_tokens, stops, include_usage = typed.max_tokens, typed.stop_sequences or [], True
        tools = [Tool(t.name, t.input_schema or {}) for t in typed.tools or ()]
    return Ask(
        endpoint=endpoint,
        model=typed.model or (endpoint_path if (endpoint_path or "").startswith("MaaS_") else None) or DEFAULT_MODEL,
        digest=_digest(canonical),
        prompt_tokens=len(canonical) // CHARS_PER_TOKEN,
        max_tokens=max_tokens,
        thinking=typed.thinking is None or typed.thinking.type == "enabled",
        stream=bool(typed.stream),
        include_usage=include_usage,
        tool=_chosen(tools, typed.tool_choice) if tools else None,
        stops=[stop for stop in stops if stop],
        tag=typed.metadata if typed.metadata is not None else typed.user,
    )


def _chosen(tools: list[Tool], choice: str | dict[str, Any] | None) -> Tool | None:
    """The tool that `tool_choice` makes the model call; both the provider's plain words and the SDKs' objects."""
    if isinstance(choice, dict):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else choice.get("name")
        choice = name if isinstance(name, str) else choice.get("type")
    if choice in (None, "auto", "none"):
        return None
    if choice in ("required", "any"):
        return tools[0]
    for tool in tools:
        if tool.name == choice:
            return tool
    raise BadRequest("tool_choice names no tool of the request")


def _rule(message: str) -> str:
    """msgspec's message without its quotes, field first; an unknown value that it would name is left out."""
    rule, _, where = message.replace("`", "").partition(" - at $")
    if rule.startswith("Invalid enum value"):
        rule = "Invalid value"
    return f"{where.lstrip('.')}: {rule}" if where else rule
