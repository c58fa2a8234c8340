"""What a worker counts, and the port on which it tells of it.

What goes wrong: the port is taken, or is none. The worker says so once and works without; nothing of it waits for the port,
or for anyone who reads from it.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import structlog

from jobs.keys import LANES
from jobs.metrics import (
    CALL_TIME,
    CALLS,
    FENCED_ENDS,
    HELD_JOBS,
    IN_FLIGHT,
    JOBS_ENDED,
    LATE_ANSWERS,
    LEASE_LOSSES,
    RETRIES,
    SLOT_TIME,
    STORE_UP,
    TOKENS,
)
from jobs.settings import Settings
from jobs.states import TERMINAL
from jobs.tally import Cell, Names, Reports, Tally
from worker.limiter import counted_as

if TYPE_CHECKING:
    from jobs.leases import End
    from worker.engine import Engine
    from worker.outcome import Outcome
    from worker.run import Run
    from worker.verdict import Verdict

#: Seconds since the last heartbeat that arrived after which the store counts as away.
AWAY_S = 3.0

log = structlog.get_logger("worker.metrics")


class Counts:
    """What one engine counts; within its loop."""

    def __init__(self, settings: Settings) -> None:
        self.tally = Tally()
        self.reports = Reports(self.tally)
        self.model = Names(settings.endpoint_path or settings.model, settings.model)
        self._verdict = Names()

    def started(self, run: Run) -> None:
        """A call starts."""
        self.tally.observe(SLOT_TIME, time.monotonic() - run.waits_since, run.job.lane)

    def call(self, run: Run, outcome: Outcome, verdict: Verdict) -> None:
        """A call is over."""
        tally, model, endpoint = self.tally, self.model(run.model), run.job.request.endpoint
        status = "none" if outcome.status is None else str(outcome.status)
        tally.add(CALLS, endpoint, model, status, self._verdict(verdict.code))
        tally.observe(CALL_TIME, outcome.latency_s, endpoint, model)
        usage = outcome.usage
        if usage is not None:
            for kind, tokens in (
                ("prompt", usage.prompt_tokens),
                ("completion", usage.completion_tokens),
                ("reasoning", usage.reasoning_tokens),
                ("cached", usage.cached_tokens),
            ):
                if tokens:
                    tally.add(TOKENS, kind, model, amount=tokens)

    def again(self, verdict: Verdict) -> None:
        """A job is to be called again."""
        self.tally.add(RETRIES, self._verdict(verdict.code))

    def told(self, run: Run | None, end: End, word: str) -> None:
        """What the store said of an end, in the words of finish.lua; `run` is the job's, if it is still held."""
        if word == "late":
            self.tally.add(LATE_ANSWERS)
        elif word == "fenced":
            self.tally.add(FENCED_ENDS)
        else:
            state, job = TERMINAL[ord(end.letter)].value, end.job
            model = self.model(run.model) if run is not None else ""
            self.tally.add(JOBS_ENDED, state, job.lane, job.request.endpoint, model)

    def lost(self, jobs: int) -> None:
        """Jobs were held under leases that are somebody else's by now."""
        if jobs:
            self.tally.add(LEASE_LOSSES, amount=jobs)


def cells(engine: Engine) -> dict[Cell, float]:
    """What a worker has counted and what it holds at this moment; from any thread."""
    found = dict(engine.counts.tally.cells)
    # `list` of a dict's values is one step of the interpreter: the engine's thread does not come between.
    flying = Counter((run.model, counted_as(run.job.lane)) for run, _ in list(engine.flying.values()))
    for model in {engine.settings.model, *(model for model, _ in flying)}:
        for lane in LANES:
            cell = (IN_FLIGHT.name, engine.account, engine.counts.model(model), lane)
            found[cell] = found.get(cell, 0) + flying[model, lane]
    found[HELD_JOBS.name,] = len(engine.holding)
    up = not engine.flusher.failing and time.monotonic() - engine.renewed_at < AWAY_S
    found[STORE_UP.name,] = int(up)
    return found


def serve(look: Callable[[], dict[Cell, float]], host: str, port: int) -> threading.Thread:
    """Tells what `look` finds to whoever asks on this port, from threads of its own; returns the one that opens it."""
    from prometheus_client import start_http_server

    from jobs.exposition import Look, families, process

    def begin() -> None:
        try:
            start_http_server(port, host, Look(lambda: [*families("worker", look()), *process()]))
        except (OSError, OverflowError) as error:
            log.warning("metrics_port_not_open", host=host, port=port, error=type(error).__name__)
            return
        log.info("metrics_port_open", host=host, port=port)

    # Not here: before it binds, the standard library's server asks for this machine's name, which may take its time.
    thread = threading.Thread(target=begin, name="mimoq-metrics", daemon=True)
    thread.start()
    return thread
