"""How many tokens a call will take, before it is made: what the limiter reserves and corrects afterwards.

Prompt: narrow and wide characters of the body, each by what one takes in tokens, learned per model from real usage by
least squares that forget and are held to a first guess. Completion: what three in four of a batch's last answers kept
within, and never more than the body's own limit (which alone would not do: 131,072 would starve the queue).
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left, insort
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from jobs.results import Usage

if TYPE_CHECKING:
    from worker.run import Run

#: Tokens a character takes as long as nothing is known: English prose and Chinese in today's vocabularies.
FIRST_NARROW = 0.25
FIRST_WIDE = 0.7
#: So many characters of each kind speak for the first guess: about one short body.
GUESS_CHARS = 500.0
#: What an answer weighs after the next one: 50 answers are remembered, half of a change is learned in 35.
KEEP = 0.98
#: The share of a batch's last answers that keep within the estimate, and how many are looked at.
QUANTILE = 0.75
WINDOW = 100
#: Batches and models that are remembered, each.
KEPT = 1000

T = TypeVar("T")


class Text(NamedTuple):
    """How much text a body holds, in characters; those of the JSON around it are narrow ones."""

    narrow: float = 0.0
    wide: float = 0.0


NO_TEXT = Text()

# A data URL or an attachment, perhaps with escaped slashes: a picture's tokens have nothing to do with its bytes.
_DATA = re.compile(rb"[A-Za-z0-9+/=\\]{512,}")

_ASCII = bytes(range(0x80))
_CONTINUING = bytes(range(0x80, 0xC0))
_TWO = bytes(range(0xC0, 0xE0))
_THREE = bytes(range(0xE0, 0xF0))


def measure(body: bytes) -> Text:
    r"""The characters of a JSON body in UTF-8, whole or not; pure.

    ASCII is narrow. What takes three bytes (CJK, kana, hangul, typographic signs) is wide, what takes four (emoji)
    twice, as its two `\uXXXX` are: each escape is one wide character. What takes two bytes (accents, Cyrillic, Greek,
    Arabic) is half of each, since such a letter takes about half a token. Long base64 is no text.
    """
    if b"base64" in body:
        body = _DATA.sub(b"", body)
    narrow, wide = float(len(body)), 0.0
    if b"\\u" in body:
        escapes = body.replace(b"\\\\", b"").count(b"\\u")  # an escaped backslash before a u is none
        narrow = max(narrow - 6 * escapes, 0.0)  # of what is no JSON, an escape may be cut
        wide += escapes
    if not body.isascii():
        high = body.translate(None, _ASCII)
        leads = high.translate(None, _CONTINUING)
        longer = leads.translate(None, _TWO)
        half = (len(leads) - len(longer)) / 2
        narrow = max(narrow - len(high), 0.0) + half
        wide += half + len(longer) + len(longer.translate(None, _THREE))
    return Text(narrow, wide)


class _Rates:
    """Tokens that a narrow and a wide character take in one model.

    Ridge regression of prompt tokens on both, in closed form. A body weighs by one over its length, since its error grows
    with it: where all text is of one kind the rate is then simply the sum of tokens by the sum of characters.
    """

    __slots__ = ("_nn", "_nt", "_nw", "_wt", "_ww", "narrow", "wide")

    def __init__(self) -> None:
        self.narrow = FIRST_NARROW
        self.wide = FIRST_WIDE
        self._nn = self._nw = self._ww = self._nt = self._wt = 0.0

    def tokens(self, text: Text) -> float:
        return self.narrow * text.narrow + self.wide * text.wide

    def learn(self, text: Text, tokens: int) -> None:
        size = text.narrow + text.wide
        narrow, wide = text.narrow / size, text.wide / size
        self._nn = KEEP * self._nn + narrow * text.narrow
        self._nw = KEEP * self._nw + narrow * text.wide
        self._ww = KEEP * self._ww + wide * text.wide
        self._nt = KEEP * self._nt + narrow * tokens
        self._wt = KEEP * self._wt + wide * tokens
        self._solve()

    def _solve(self) -> None:
        nn, nw, ww = self._nn + GUESS_CHARS, self._nw, self._ww + GUESS_CHARS
        nt, wt = self._nt + GUESS_CHARS * FIRST_NARROW, self._wt + GUESS_CHARS * FIRST_WIDE
        size = nn * ww - nw * nw
        self.narrow = (nt * ww - wt * nw) / size
        self.wide = (wt * nn - nt * nw) / size
        # No character takes less than nothing: the best there is then has none for it, and the other alone.
        if self.narrow < 0:
            self.narrow, self.wide = 0.0, wt / ww
        elif self.wide < 0:
            self.narrow, self.wide = nt / nn, 0.0


class _Answers:
    """A running quantile of completion tokens."""

    __slots__ = ("_last", "_sorted")

    def __init__(self) -> None:
        self._last: deque[int] = deque()
        self._sorted: list[int] = []

    @property
    def tokens(self) -> int:
        """The least count that `QUANTILE` of the answers keep within."""
        return self._sorted[math.ceil(QUANTILE * len(self._sorted)) - 1]

    def learn(self, tokens: int) -> None:
        self._last.append(tokens)
        insort(self._sorted, tokens)
        if len(self._last) > WINDOW:
            del self._sorted[bisect_left(self._sorted, self._last.popleft())]


class Estimates:
    """Estimates of one process: prompts by model, completions by batch, begun at `first_completion` tokens."""

    def __init__(self, first_completion: int) -> None:
        self._first_completion = first_completion
        self._rates: OrderedDict[str, _Rates] = OrderedDict()
        self._answers: OrderedDict[str, _Answers] = OrderedDict()

    def of(self, run: Run) -> int:
        """Tokens to reserve for one call of this job, at least 1."""
        rates = self._rates.get(run.model, _UNKNOWN)
        answers = self._answers.get(run.job.batch_id)
        completion = self._first_completion if answers is None else answers.tokens
        if run.most_tokens is not None:
            completion = min(completion, max(run.most_tokens, 0))
        return max(1, round(rates.tokens(run.text)) + completion)

    def learn(self, run: Run, usage: Usage) -> None:
        """Takes in what a call really took; counts of 0 were not told."""
        if usage.prompt_tokens > 0 and any(run.text):
            _latest(self._rates, run.model, _Rates).learn(run.text, usage.prompt_tokens)
        if usage.completion_tokens > 0:
            _latest(self._answers, run.job.batch_id, _Answers).learn(usage.completion_tokens)


_UNKNOWN = _Rates()


def _latest(kept: OrderedDict[str, T], name: str, make: Callable[[], T]) -> T:
    """What is kept of this name, or a new one; the longest unheard of goes when there are too many."""
    if name not in kept:
        kept[name] = make()
    kept.move_to_end(name)
    if len(kept) > KEPT:
        kept.popitem(last=False)
    return kept[name]
