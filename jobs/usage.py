"""Tokens that calls were billed for, as an upstream's body tells them."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

# A count beyond this is a fault of the upstream, and would overflow sums in the store.
_MOST_TOKENS = 10**12


class Usage(msgspec.Struct, frozen=True):
    """Tokens that one call, or all calls of a job, were billed for, whichever protocol reported them.

    `cached_tokens` are part of `prompt_tokens`, `reasoning_tokens` of `completion_tokens`.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    cached_tokens: int = 0
    total_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.reasoning_tokens + other.reasoning_tokens,
            self.cached_tokens + other.cached_tokens,
            self.total_tokens + other.total_tokens,
        )

    def __sub__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt_tokens - other.prompt_tokens,
            self.completion_tokens - other.completion_tokens,
            self.reasoning_tokens - other.reasoning_tokens,
            self.cached_tokens - other.cached_tokens,
            self.total_tokens - other.total_tokens,
        )


#: Of no call.
NO_USAGE = Usage()


class Told(NamedTuple):
    """What the body of an answer tells of its call: `usage` None and `model` '' where it does not."""

    usage: Usage | None
    model: str


class _Body(msgspec.Struct, gc=False):
    usage: msgspec.Raw = msgspec.Raw()
    model: Any = None


_any = msgspec.json.Decoder()
_body = msgspec.json.Decoder(_Body)


def told_by(body: bytes | msgspec.Raw) -> Told:
    """What a body of either protocol tells. Raises nothing, whatever the bytes."""
    try:
        found = _body.decode(body)
    except (ValueError, RecursionError):
        return Told(None, "")
    return Told(read_usage(found.usage), found.model if isinstance(found.model, str) else "")


def read_usage(raw: msgspec.Raw | bytes) -> Usage | None:
    """The usage object of either protocol; None where there is none, 0 for what is missing or odd."""
    try:
        usage = _any.decode(raw)
    except (ValueError, RecursionError):
        return None
    if not isinstance(usage, dict) or not usage:
        return None
    cached = _count(usage.get("cache_read_input_tokens"))
    if "prompt_tokens" in usage:
        prompt = _count(usage["prompt_tokens"])
        cached = cached or _detail(usage, "prompt_tokens_details", "cached_tokens")
    else:
        # Anthropic counts what the cache gave, and what was written to it, beside input_tokens.
        prompt = _count(usage.get("input_tokens")) + cached + _count(usage.get("cache_creation_input_tokens"))
    completion = _count(usage.get("completion_tokens", usage.get("output_tokens")))
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        reasoning_tokens=_detail(usage, "completion_tokens_details", "reasoning_tokens")
        or _detail(usage, "output_tokens_details", "reasoning_tokens"),
        cached_tokens=cached,
        total_tokens=_count(usage.get("total_tokens")) or prompt + completion,
    )


def _detail(usage: dict[str, Any], group: str, name: str) -> int:
    details = usage.get(group)
    return _count(details.get(name)) if isinstance(details, dict) else 0


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MOST_TOKENS:
        return 0
    return int(value)
