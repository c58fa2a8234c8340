"""What a run shows of itself: figures, a log line now and then, a display on a terminal."""

from __future__ import annotations

import io
import json
import sys
from typing import Any

import pytest

from jobs import logs
from jobs.results import Usage
from jobs.settings import Settings
from jobs.states import BatchState
from jobs.store import BatchStatus
from producers import progress
from producers.progress import Lines, Live, Quiet, Rates, View, display


def status(succeeded: int = 0, failed: int = 0, total: int = 1000) -> BatchStatus:
    return BatchStatus(
        batch_id="b1",
        state=BatchState.RUNNING,
        lane="bulk",
        label="",
        total=total,
        queued=total - succeeded - failed,
        running=0,
        succeeded=succeeded,
        failed=failed,
        cancelled=0,
        expired=0,
        attempts=0,
        late_answers=0,
        usage=Usage(),
        created_at=0.0,
        started_at=None,
        finished_at=None,
        slice_size=50,
        reason="",
    )


def view(held_back: str = "window", left_s: float | None = 3725.0, **counts: int) -> View:
    return View(status(**counts), 7, 12.34, 5678.9, left_s, held_back)


class Terminal(io.StringIO):
    """A stderr that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_rates_are_over_the_last_seconds() -> None:
    rates = Rates()
    assert rates.add(5, 100, 1000.0) == (0.0, 0.0)
    assert rates.add(25, 400, 1002.0) == (10.0, 9000.0)
    assert rates.add(25, 400, 1004.0) == (5.0, 4500.0)
    # What lies further back than the span of measurement has no say.
    assert rates.add(45, 1000, 1004.0 + progress.RATE_S) == (2.0, 3600.0)


def test_rates_after_a_pause_are_of_the_pause() -> None:
    rates = Rates()
    rates.add(0, 0, 0.0)
    assert rates.add(100, 0, 100.0) == (1.0, 0.0)


def test_no_terminal_gets_a_structured_line_every_few_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logs.configure("info", "json")
    now = 100.0
    monkeypatch.setattr("producers.progress.time.monotonic", lambda: now)
    shown = display(quiet=False, settings=Settings())
    assert isinstance(shown, Lines)
    shown.show(view())
    assert capsys.readouterr() == ("", "")
    now += progress.LOG_S
    shown.show(view(succeeded=30, failed=2))
    shown.show(view(succeeded=31))
    now += progress.LOG_S
    shown.show(view(held_back="", left_s=None))
    shown.close()
    out, err = capsys.readouterr()
    first, second = (json.loads(line) for line in err.splitlines())
    assert out == ""
    wanted: dict[str, Any] = {
        "event": "progress",
        "batch": "b1",
        "total": 1000,
        "succeeded": 30,
        "failed": 2,
        "in_flight": 7,
        "jobs_per_s": 12.3,
        "tokens_per_min": 5679,
        "left_s": 3725,
        "held_back": "window",
    }
    assert {name: first[name] for name in wanted} == wanted
    assert (second["left_s"], second["held_back"]) == (None, None)


def test_a_terminal_gets_a_live_display(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    shown = display(quiet=False, settings=Settings())
    assert isinstance(shown, Live)
    shown.show(view(succeeded=1000 - 2, failed=2))
    shown.close()
    text = stderr.getvalue()
    for part in (
        "1,000/1,000 done",
        "2 failed",
        "7 in flight",
        "12.3 jobs/s",
        "5,679 tokens/min",
        "1:02:05 left",
        "held back by window",
    ):
        assert part in text


def test_a_terminal_is_told_only_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    shown = display(quiet=False, settings=Settings())
    shown.show(view(held_back="", left_s=None))
    shown.close()
    text = stderr.getvalue()
    assert "0/1,000 done" in text
    for part in ("failed", "left", "held back"):
        assert part not in text


def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    shown = display(quiet=True, settings=Settings())
    assert isinstance(shown, Quiet)
    shown.show(view())
    shown.close()
    assert capsys.readouterr() == ("", "")
