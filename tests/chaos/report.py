"""What is printed of trials and figures."""

from __future__ import annotations

from collections.abc import Iterable

from tests.chaos.figures import Figures
from tests.chaos.oracle import Findings
from tests.chaos.trial import Result

#: Violations that are told one by one.
TOLD = 40


def of_trial(result: Result) -> list[str]:
    """What happened, what was counted, and what is wrong."""
    happened = ", ".join(f"{kind} {count}" for kind, count in sorted(result.happened.items()))
    lines = [f"took {result.seconds:.0f} s; {happened}"]
    lines += table((name, f"{count:,}") for name, count in result.findings.totals.items())
    return lines + verdict(result.findings)


def of_figures(figures: Figures) -> list[str]:
    """A table of what was measured, and what is wrong."""
    return table(figures.rows) + verdict(figures.findings)


def verdict(findings: Findings) -> list[str]:
    """What is wrong, or that nothing is."""
    wrong = findings.wrong
    if not wrong:
        return ["the oracle holds"]
    more = [f"  and {len(wrong) - TOLD} more"] if len(wrong) > TOLD else []
    return [f"the oracle does not hold: {len(wrong)} violation(s)", *(f"  {line}" for line in wrong[:TOLD]), *more]


def table(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Names to the left, values to the right."""
    kept = list(rows)
    width = max((len(name) for name, _ in kept), default=0)
    return [f"  {name:{width}}  {value:>10}" for name, value in kept]


def printed(line: str) -> None:
    """Prints a line at once."""
    print(line, flush=True)
