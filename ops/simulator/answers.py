"""The simulated model: what it answers depends on the seed and the request, on nothing else."""

from __future__ import annotations

import math
from itertools import product
from random import Random
from typing import Any

import msgspec
from msgspec import Struct

from ops.simulator.asks import CHARS_PER_TOKEN, Ask, Endpoint
from ops.simulator.config import Config, read_text

# Bytes of a response around its texts, by endpoint.
FRAME_BYTES = {"chat": 570, "messages": 270}
REASONING_SHARE = 0.4
P99_SIGMAS = 2.3263478740408408  # the standard normal's 99th percentile

_SUBJECTS = (
    "A small team", "The careful reader", "An early draft", "Every good plan", "The old harbour town", "A quiet café",
    "The second experiment", "A patient teacher", "The longest river", "An honest summary", "The night train",
    "A well-kept garden", "The first measurement", "一杯绿茶",
)  # fmt: skip
_VERBS = (
    "explains", "gently changes", "depends on", "makes room for", "reminds us of", "follows", "improves",
    "leads back to", "is worth", "begins with",
)  # fmt: skip
_OBJECTS = (
    "the shape of the problem", "a clearer question", "the weather of the coast", "two simple ideas",
    "the habits of its neighbours", "a list of open points", "the price of a mistake", "a naïve first guess",
    "the people who use it", "one more careful look", "the sound of rain on a roof", "an answer that fits 😊",
)  # fmt: skip
_SENTENCES = [" ".join(words) + ". " for words in product(_SUBJECTS, _VERBS, _OBJECTS)]
_MEAN_BYTES = sum(len(s.encode()) for s in _SENTENCES) / len(_SENTENCES)


class ToolCall(Struct):
    id: str
    name: str
    arguments: dict[str, Any]


class Answer(Struct, kw_only=True):
    """An answer before it is put into the shape of an endpoint."""

    endpoint: Endpoint
    id: str
    created: int
    model: str
    content: str
    reasoning: str
    tool_call: ToolCall | None
    finish: str  # in the words of chat completions
    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


def latency_s(config: Config, digest: str, asked_before: int) -> float:
    """Seconds that a call takes."""
    if config.latency_p99 is None:
        return config.latency
    sigma = math.log(config.latency_p99 / config.latency) / P99_SIGMAS
    return Random(f"latency {config.seed} {digest} {asked_before}").lognormvariate(math.log(config.latency), sigma)


def make_answer(config: Config, ask: Ask, fault: str | None = None) -> Answer:
    """The answer to a request, degenerate if the fault says so."""
    rng = Random(f"answer {config.seed} {ask.digest}")
    size = max(60, config.answer_bytes - FRAME_BYTES[ask.endpoint]) * rng.uniform(0.8, 1.2)
    reasoning = _text(config, rng, size * REASONING_SHARE)
    content = _text(config, rng, size * (1 - REASONING_SHARE))
    finish, tool_call = "stop", None
    if not ask.thinking:
        reasoning = ""
    if fault == "thinking_only":
        content = ""
    elif fault == "repetition":
        content, finish = content[:40] * (len(content) // 40 + 1), "repetition_truncation"
    elif ask.tool is not None:
        tool_call = ToolCall(f"call_{ask.digest}", ask.tool.name, _arguments(rng, ask.tool.schema))
        content, finish = "", "tool_calls"
    for stop in ask.stops:
        content = content.partition(stop)[0]

    reasoning_tokens, content_tokens = _tokens(reasoning), _tokens(content)
    if reasoning_tokens + content_tokens > ask.max_tokens:
        # A model that is short of room thinks less, so that half of it is left to answer.
        reasoning_tokens = min(reasoning_tokens, max(ask.max_tokens // 2, ask.max_tokens - content_tokens))
        content_tokens = ask.max_tokens - reasoning_tokens if content else 0
        reasoning = reasoning[: reasoning_tokens * CHARS_PER_TOKEN]
        content = content[: content_tokens * CHARS_PER_TOKEN]
        finish = "length" if finish == "stop" else finish
    tool_tokens = _tokens(str(tool_call.arguments)) if tool_call else 0
    return Answer(
        endpoint=ask.endpoint,
        id=f"chatcmpl-{ask.digest}" if ask.endpoint == "chat" else f"{ask.digest:0<32}",
        created=1_780_000_000 + int(ask.digest[:4], 16),
        model=ask.model,
        content=content,
        reasoning=reasoning,
        tool_call=tool_call,
        finish=finish,
        prompt_tokens=ask.prompt_tokens,
        completion_tokens=reasoning_tokens + content_tokens + tool_tokens,
        reasoning_tokens=reasoning_tokens,
    )


def _text(config: Config, rng: Random, size: float) -> str:
    if config.text is not None:
        whole, length = read_text(config.text), max(1, round(size))
        start = rng.randrange(max(1, len(whole) - length))
        piece = whole[start : start + length].strip()
        written = len(msgspec.json.encode(piece)) - 2  # what JSON escapes takes two bytes
        return piece[: math.ceil(len(piece) * min(1.0, size / written))]
    return "".join(rng.choices(_SENTENCES, k=max(1, round(size / _MEAN_BYTES)))).rstrip()


def _tokens(text: str) -> int:
    return -(-len(text) // CHARS_PER_TOKEN)


def _arguments(rng: Random, schema: dict[str, Any]) -> dict[str, Any]:
    value = _example(rng, {"type": "object", **schema})
    return value if isinstance(value, dict) else {}


def _example(rng: Random, schema: object) -> Any:
    """A value that fits the plain parts of a JSON Schema: type, enum, properties, items."""
    if not isinstance(schema, dict):
        return None
    options = schema.get("enum")
    if isinstance(options, list) and options:
        return rng.choice(options)
    match schema.get("type"):
        case "object":
            properties = schema.get("properties")
            return {k: _example(rng, v) for k, v in properties.items()} if isinstance(properties, dict) else {}
        case "array":
            return [_example(rng, schema.get("items"))]
        case "integer":
            return rng.randint(1, 9)
        case "number":
            return rng.randint(1, 99) / 10
        case "boolean":
            return rng.random() < 0.5
        case "null":
            return None
        case _:
            return rng.choice(_OBJECTS)
