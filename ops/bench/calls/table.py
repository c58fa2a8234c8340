"""The tables of a run: its rows, and the ratios that are asked for."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import NamedTuple

from ops.bench.calls.bench import Found, Result
from ops.bench.calls.measure import CALLER, OTHERS, SIMULATOR, Measured
from ops.bench.calls.tail import CAP, P99_S
from ops.bench.limits.report import MISSED

HEAD = ("row", "at once", "jobs/s", "CPU ms a job", "of it the callers", "peak MB")
#: Mean calls in flight of the heavy tail's cap, at least.
TAIL_TARGET = 0.95


class Median(NamedTuple):
    """The medians of a row's rounds, each figure by itself."""

    jobs_per_s: float
    cpu_ms: float
    caller_ms: float
    rss_mb: float
    cores: Mapping[str, float]


class Target(NamedTuple):
    """A ratio of two rows' figures, and what it should be: at least, or with `most` at most."""

    what: str
    row: str
    beside: str
    figure: str
    target: float
    most: bool = False


TARGETS = (
    Target("jobs/s against plain Celery with defaults, one httpx.Client", "mimoq", "celery", "jobs_per_s", 20),
    Target("jobs/s against the tuned plain Celery", "mimoq", "celery-tuned", "jobs_per_s", 4),
    Target("jobs/s against the openai SDK with its aiohttp client", "mimoq", "openai-aiohttp", "jobs_per_s", 2),
    Target("jobs/s against LiteLLM", "mimoq", "litellm", "jobs_per_s", 8),
    Target("worker's CPU a job against the bare httpx+aiohttp loop", "mimoq", "httpx", "caller_ms", 1.25, most=True),
)
#: Ratios that are shown, without a target.
SHOWN = (
    Target("jobs/s against plain Celery whose tasks call httpx.post", "mimoq", "celery-post", "jobs_per_s", 0),
    Target("streamed: worker's CPU a job against the bare loop", "mimoq-streamed", "httpx-streamed", "caller_ms", 0),
    Target("two worker processes against one: jobs/s", "mimoq-2", "mimoq", "jobs_per_s", 0),
    Target("the same, each held by latency: jobs/s", "held-2", "held", "jobs_per_s", 0),
)


def median(rounds: list[Measured]) -> Median:
    """Of at least one round."""

    def of(values: list[float]) -> float:
        return statistics.median(values)

    groups = {group for one in rounds for group in one.cores}
    return Median(
        of([one.jobs_per_s for one in rounds]),
        of([one.cpu_ms for one in rounds]),
        of([one.caller_ms for one in rounds]),
        of([one.rss_mb for one in rounds]),
        {group: of([one.cores[group] for one in rounds if group in one.cores]) for group in groups},
    )


def medians(found: Found) -> dict[str, Median]:
    """Of the rows that could be run, by their names."""
    return {result.row.name: median(result.rounds) for result in found.results if result.rounds and not result.failed}


def rows(found: Found) -> str:
    """The rows' figures; a row that could not be run says why."""
    lines = [_line(HEAD), "|---" * len(HEAD) + "|"]
    known = medians(found)
    for result in found.results:
        one = known.get(result.row.name)
        if one is None:
            lines.append(
                _line([result.row.label, *[""] * (len(HEAD) - 2), (result.failed or "not run").replace("|", "/")])
            )
            continue
        figures = (f"{one.jobs_per_s:,.0f}", f"{one.cpu_ms:.2f}", f"{one.caller_ms:.2f}", f"{one.rss_mb:,.0f}")
        lines.append(_line([result.row.label, f"{result.concurrency}", *figures]))
    return "\n".join(lines) + "\n"


def ratios(found: Found) -> str:
    """The ratios with their targets; one that was missed says so."""
    lines = [_line(("ratio, of the medians above", "target", "measured")), "|---|---|---|"]
    known = medians(found)
    asked_for = {result.row.name for result in found.results}
    for target in (*TARGETS, *SHOWN):
        if not {target.row, target.beside} <= asked_for:
            continue
        ratio = ratio_of(target, known)
        measured = "not run" if ratio is None else f"{ratio:.2f} ×" + ("" if met(target, ratio) else f", {MISSED}")
        asked = f"{'≤' if target.most else '≥'} {target.target:g} ×" if target.target else ""
        lines.append(_line((target.what, asked, measured)))
    if found.tail or found.tail_failed:
        what = f"heavy tail (median 0.2 s, p99 {P99_S:g} s): mean calls in flight while work remains, of a cap of {CAP}"
        share = statistics.median(found.tail) if found.tail else 0.0
        measured = found.tail_failed or f"{share:.1%}" + ("" if share >= TAIL_TARGET else f", {MISSED}")
        lines.append(_line((what, f"≥ {TAIL_TARGET:.0%}", measured)))
    return "\n".join(lines) + "\n"


def ratio_of(target: Target, known: Mapping[str, Median]) -> float | None:
    """The figure of one row to that of the other; None where one is missing."""
    if target.row not in known or target.beside not in known:
        return None
    return float(getattr(known[target.row], target.figure)) / float(getattr(known[target.beside], target.figure))


def met(target: Target, ratio: float) -> bool:
    """Whether it is as it should be, which one without a target always is."""
    return not target.target or (ratio <= target.target if target.most else ratio >= target.target)


def ceilings(found: Found, cores: int) -> str:
    """Who used the machine while the rows of two workers were measured: what a second worker can't go beyond."""
    lines = []
    for name, one in medians(found).items():
        if name in ("mimoq", "mimoq-2", "held", "held-2"):
            shares = ", ".join(
                f"{group} {one.cores.get(key, 0.0):.2f}"
                for key, group in (
                    (CALLER, "workers"),
                    ("valkey", "Valkey"),
                    (SIMULATOR, "simulator"),
                    (OTHERS, "others"),
                )
            )
            label = next(result.row.label for result in found.results if result.row.name == name)
            lines.append(f"- {label}: {shares}; {sum(one.cores.values()):.2f} of {cores} cores in all")
    return "\n".join(lines) + "\n" if lines else ""


def busy(found: Found) -> str:
    """How much else was done on the machine meanwhile; figures of a busy one are of no use."""
    others = sorted(one.cores.get(OTHERS, 0.0) for result in found.results for one in result.rounds)
    return f"{statistics.median(others):.2f} cores, {others[-1]:.2f} at the most" if others else "no cores"


def tried(found: Found) -> str:
    """The concurrencies that were tried for each row."""
    lines = []
    for result in found.results:
        if len(result.tried) > 1:
            each = ", ".join(f"{concurrency}: {per_s:,.0f}" for concurrency, per_s in result.tried.items())
            lines.append(f"- {result.row.label}: {each}")
    return "\n".join(lines) + "\n" if lines else ""


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"


def failed(results: list[Result]) -> list[str]:
    """Names of the rows that could not be run."""
    return [result.row.name for result in results if result.failed]
