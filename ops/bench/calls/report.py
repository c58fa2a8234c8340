"""What a run of the calls' benchmark has to say: its tables, and what they were measured with."""

from __future__ import annotations

import os
from importlib.metadata import version

from ops.bench.calls import environments, table
from ops.bench.calls.bench import ROUNDS, Found
from ops.bench.calls.measure import FROM, TO
from ops.bench.calls.standing import ANSWER_BYTES, LATENCY_S
from ops.bench.page import circumstances

LIBRARIES = ("aiohttp", "httpx", "httpx-aiohttp", "uvloop")


def told(found: Found, seconds: float) -> str:
    """Everything that a run has to say."""
    parts = [
        f"The upstream answers in {LATENCY_S:g} s with {ANSWER_BYTES / 1000:g} KB. Each row's figures are of the time from "
        f"{FROM:.0%} to {TO:.0%} of its jobs, the median of {ROUNDS} rounds of all rows in turn, with the best of the "
        "concurrencies that were tried. CPU is that of all its processes (callers, Valkey, producer or API), not the "
        f"simulator's; memory likewise, at its highest. Other programs took {table.busy(found)}. {seconds:.0f} s in all. "
        f"{circumstances()[:-1]}, {_versions()}.\n",
        table.rows(found),
        table.ratios(found),
    ]
    if ceilings := table.ceilings(found, os.cpu_count() or 1):
        parts.append("Cores used meanwhile, which say where a second worker process ends:\n")
        parts.append(ceilings)
    if tried := table.tried(found):
        parts.append("Jobs a second of short runs, by calls at once:\n")
        parts.append(tried)
    return "\n".join(parts)


def _versions() -> str:
    own = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    return f"{own}; peers: {', '.join(environments.versions())}"
