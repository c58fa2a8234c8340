"""What a scenario found, as rows of a Markdown table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

MISSED = "**missed**"


class Row(NamedTuple):
    """One figure; `met` is None where nothing was asked for."""

    what: str
    target: str
    measured: str
    met: bool | None = None


class Share(NamedTuple):
    """A part of a whole, which may be nothing."""

    part: float
    whole: float

    @property
    def value(self) -> float:
        return self.part / self.whole if self.whole else 0.0

    def __str__(self) -> str:
        return f"{self.value:.2%} ({self.part:,.0f} of {self.whole:,.0f})"


def at_least(what: str, least: float, share: Share) -> Row:
    return Row(what, f"≥ {least:.0%}", str(share), share.value >= least)


def at_most(what: str, most: float, share: Share) -> Row:
    return Row(what, f"≤ {most:.1%}", str(share), share.value <= most)


def all_of(what: str, part: int, whole: int) -> Row:
    return Row(what, f"all {whole:,}", f"{part:,}", part == whole)


def at_most_s(what: str, most_s: float, seconds: float) -> Row:
    return Row(what, f"≤ {most_s:g} s", f"{seconds:.2f} s", seconds <= most_s)


def none_of(what: str, count: int, of: str = "") -> Row:
    return Row(what, "0", f"{count:,}{of}", count == 0)


def table(name: str, rows: Sequence[Row]) -> str:
    """The scenario's table; a target that was missed says so."""
    lines = ["| scenario | what was measured | target | measured |", "|---|---|---|---|"]
    for row in rows:
        missed = f", {MISSED}" if row.met is False else ""
        lines.append(f"| {name} | {row.what} | {row.target} | {row.measured}{missed} |")
    return "\n".join(lines) + "\n"
