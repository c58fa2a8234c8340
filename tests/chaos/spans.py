"""Spans of time in which something was so; Unix seconds."""

from __future__ import annotations

import math
from collections.abc import Iterable

import msgspec


class Span(msgspec.Struct):
    """From `start` to `end`, which is infinite while it lasts."""

    start: float
    end: float = math.inf

    @property
    def length_s(self) -> float:
        return self.end - self.start


def overlap_s(spans: Iterable[Span], start: float, end: float) -> float:
    """Seconds between `start` and `end` that lie in one of the spans, which do not overlap each other."""
    return sum(max(0.0, min(end, span.end) - max(start, span.start)) for span in spans)


def joined(spans: Iterable[Span], gap_s: float = 0.0) -> list[Span]:
    """The spans in order, those that overlap, or lie less than `gap_s` apart, made one."""
    found: list[Span] = []
    for span in sorted(spans, key=lambda span: span.start):
        if found and span.start <= found[-1].end + gap_s:
            found[-1] = Span(found[-1].start, max(found[-1].end, span.end))
        else:
            found.append(Span(span.start, span.end))
    return found
