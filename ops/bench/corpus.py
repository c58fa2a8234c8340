"""Natural English text for benchmarks: seeded excerpts of Python's own reference, which every Python carries.

A prompt of one word again and again would compress to nothing, and so flatter everything that is compressed.
"""

from __future__ import annotations

import zlib
from functools import cache
from pydoc_data import topics
from random import Random
from typing import Any

from ops.simulator.asks import DEFAULT_MODEL

#: Texts whose mean compression stands for all.
SAMPLES = 1_000


class Corpus:
    """Excerpts in the order of a seed: two of the same seed give the same ones, by the same Python."""

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._random = Random(f"corpus {seed}")

    def text(self, size: int) -> str:
        """The next excerpt: so many bytes of ASCII, beginning with a word."""
        words, begins = _source()
        begin = begins[int(self._random.random() * len(begins))]
        excerpt = words[begin : begin + size]
        while len(excerpt) < size:
            excerpt += " " + words[: size - len(excerpt) - 1]
        return excerpt

    def body(self, size: int) -> dict[str, Any]:
        """The body of a chat request whose prompt is the next excerpt."""
        return {"model": DEFAULT_MODEL, "messages": [{"role": "user", "content": self.text(size)}]}

    def ratio(self, size: int) -> float:
        """What zlib makes of such texts, each by itself: compressed bytes to bytes. Draws none of this corpus."""
        other = Corpus(self._seed)
        packed = sum(len(zlib.compress(other.text(size).encode())) for _ in range(SAMPLES))
        return packed / (size * SAMPLES)


@cache
def _source() -> tuple[str, list[int]]:
    """The whole text, its white space joined, and where its words begin."""
    # Lines of one character drawn again and again underline headings; that is no language.
    joined = " ".join(" ".join(topics.topics[name].split()) for name in sorted(topics.topics))
    text = " ".join(
        word for word in joined.encode("ascii", "ignore").decode().split() if len(set(word)) > 1 or word.isalnum()
    )
    return text, [0, *(place + 1 for place, letter in enumerate(text) if letter == " ")]
