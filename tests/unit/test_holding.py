"""What a worker holds, and when it may be called again once it is given back."""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from worker.holding import BEHIND_S, Holding


@dataclass(eq=False)
class FakeRun:
    """What the holding knows of a run."""

    job: Any
    attempts: list[None]
    ready_at: float
    flying: bool
    over: bool = False


def run(index: int, attempts: int = 0, ready_s: float = 0.0, flying: bool = False) -> Any:
    job = SimpleNamespace(token="t", index=index)
    return FakeRun(job, [None] * attempts, time.monotonic() + ready_s if ready_s else 0.0, flying)


def given_back(least_s: float, *runs: Any) -> dict[int, float]:
    """Seconds after which each may be called again, by index."""
    waits: dict[int, float] = {}
    holding = Holding(lambda run, wait_s: waits.update({run.job.index: wait_s}))
    for one in runs:
        holding.add(one)
    holding.give_back(lambda _: True, least_s)
    return waits


def test_what_was_not_called_comes_behind_what_was_told_to_come_back() -> None:
    waits = given_back(30.0, run(0), run(1, attempts=1), run(2, attempts=2, ready_s=5.0), run(3, flying=True))
    assert waits == {0: 30.0 + BEHIND_S, 1: 30.0, 2: 30.0}


def test_a_retry_keeps_the_rest_of_its_wait() -> None:
    waits = given_back(30.0, run(0, attempts=3, ready_s=45.0))
    assert 44.0 < waits[0] <= 45.0


def test_what_may_be_called_at_once_waits_for_nothing() -> None:
    assert given_back(0.0, run(0), run(1, attempts=1)) == {0: 0.0, 1: 0.0}
