"""How a run shows where it is: a live display on a terminal, a structured log line every few seconds otherwise.

Both go to stderr; stdout carries only what was asked for.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

from jobs.settings import Settings
from jobs.store import BatchStatus

#: Seconds between log lines where there is no terminal.
LOG_S = 5.0
#: Seconds over which rates are measured.
RATE_S = 10.0


@dataclass(frozen=True, slots=True)
class View:
    """One look at a run: the batch, its rates, and what holds it back."""

    status: BatchStatus
    in_flight: int
    jobs_per_s: float
    tokens_per_min: float
    left_s: float | None
    held_back: str


class Rates:
    """Jobs a second and tokens a minute over the last seconds."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int, int]] = deque()

    def add(self, ended: int, tokens: int, now: float) -> tuple[float, float]:
        """Takes one look in; returns `(jobs/s, tokens/min)`."""
        self._seen.append((now, ended, tokens))
        while len(self._seen) > 2 and self._seen[0][0] < now - RATE_S:
            self._seen.popleft()
        first = self._seen[0]
        seconds = now - first[0]
        if seconds <= 0:
            return 0.0, 0.0
        return (ended - first[1]) / seconds, (tokens - first[2]) / seconds * 60


class Display(Protocol):
    """What a run tells its progress to."""

    def show(self, view: View) -> None:
        """Shows one look."""

    def close(self) -> None:
        """Leaves the last look standing."""


class Quiet:
    """Shows nothing."""

    def show(self, view: View) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Lines:
    """A structured log line every few seconds."""

    def __init__(self, settings: Settings) -> None:
        import structlog

        from jobs import logs

        logs.configure(settings.log_level, settings.log_format)
        self._log = structlog.get_logger("mimoq.run")
        self._next = time.monotonic() + LOG_S

    def show(self, view: View) -> None:
        """Logs, when it is time to."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + LOG_S
            self._line(view)

    def _line(self, view: View) -> None:
        status = view.status
        self._log.info(
            "progress",
            batch=status.batch_id,
            total=status.total,
            succeeded=status.succeeded,
            failed=status.failed,
            in_flight=view.in_flight,
            jobs_per_s=round(view.jobs_per_s, 1),
            tokens_per_min=round(view.tokens_per_min),
            left_s=None if view.left_s is None else round(view.left_s),
            held_back=view.held_back or None,
        )

    def close(self) -> None:
        """Nothing: the summary follows."""


class Live:
    """A bar and a line of figures that stay in place on a terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        self._progress: Any = Progress(
            TextColumn("{task.fields[counts]}"),
            BarColumn(bar_width=30),
            TaskProgressColumn(),
            TextColumn("{task.fields[figures]}"),
            console=Console(file=sys.stderr),
            refresh_per_second=8,
        )
        self._task = self._progress.add_task("", total=None, counts="starting", figures="")
        self._progress.start()

    def show(self, view: View) -> None:
        """Redraws."""
        status = view.status
        counts = f"{status.ended:,}/{status.total:,} done"
        if status.failed:
            counts += f", [red]{status.failed:,} failed[/red]"
        figures = f"{view.in_flight:,} in flight, {view.jobs_per_s:,.1f} jobs/s, {view.tokens_per_min:,.0f} tokens/min"
        if view.left_s is not None:
            figures += f", {_duration(view.left_s)} left"
        if view.held_back:
            figures += f"\nheld back: {view.held_back}"
        self._progress.update(self._task, total=status.total, completed=status.ended, counts=counts, figures=figures)

    def close(self) -> None:
        """Stops redrawing."""
        self._progress.stop()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def display(quiet: bool, settings: Settings) -> Display:
    """The display that fits stderr."""
    if quiet:
        return Quiet()
    return Live() if sys.stderr.isatty() else Lines(settings)
