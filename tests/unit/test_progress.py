"""What a run shows of itself: figures, a log line now and then, a display on a terminal."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs import identity, keys, leases, logs
from jobs.errors import KeyRefused
from jobs.leases import Job
from jobs.results import Usage
from jobs.settings import Settings
from jobs.states import BatchState
from jobs.store import BatchStatus, NewBatch
from producers import progress
from producers.connection import Connection
from producers.interrupts import Interrupts
from producers.progress import Lines, Live, Quiet, Rates, View, display
from producers.rows import Rows
from producers.watch import Watch
from producers.workers import Workers
from tests.integration.store_model import ALIKE, ending, live_worker, requests, run


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
    shown.show(view("gate: retry_after, next call in 37 s", succeeded=1000 - 2, failed=2))
    shown.close()
    text = stderr.getvalue()
    for part in (
        "1,000/1,000 done",
        "2 failed",
        "7 in flight",
        "12.3 jobs/s",
        "5,679 tokens/min",
        "1:02:05 left",
        "held back: gate: retry_after, next call in 37 s",
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


# -- what a watch shows and sees


class Shown:
    """A display that keeps the looks and does something at each of them, until there is nothing left to do."""

    def __init__(self, *acts: Callable[[], object]) -> None:
        self.views: list[View] = []
        self._acts = list(acts)

    def show(self, view: View) -> None:
        self.views.append(view)
        if self._acts:
            self._acts.pop(0)()

    def close(self) -> None:
        pass


@pytest.fixture
def connection(store_url: str) -> Iterator[Connection]:
    found = Connection(Settings(redis_url=store_url, api_key="sk-not-for-your-eyes"))
    yield found
    found.close()


@pytest.fixture
def watching(connection: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Watch]]:
    """Makes the watch of a batch whose workers are somebody else's."""
    monkeypatch.setattr("producers.watch.TICK_S", 0.02)
    monkeypatch.setattr("producers.watch.LISTEN_S", 0.02)
    rows = Rows(tmp_path / "out", tmp_path / "errors", "i")
    rows.open(overwrite=False, fresh=False)
    live_worker(connection.client, label=identity.label(connection.settings))

    def make(batch_id: str, opened_at: float = 0.0) -> Watch:
        return Watch(connection, batch_id, rows, Workers(), None, Interrupts(), opened_at)

    yield make
    rows.close()


def test_a_gate_holds_a_run_back_by_the_servers_clock(
    connection: Connection, watching: Callable[..., Watch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("producers.watch.server_time", lambda client: 1000.0)
    client, account = connection.client, identity.account_of(connection.settings)
    batch_id, *_ = connection.store.submit(requests(1), NewBatch())
    model: dict[str, Any] = {"gate_reason": "retry_after", "gate_status": 429, "gate_since": 990, "gate_until": 1037.2}
    own: dict[str, Any] = {"reason": "payment_required", "status": 402, "since": 1, "until": 0, "refused_at": 9}

    def shut_model() -> None:
        client.hset(keys.limit(account, "m"), mapping=model)
        client.zadd(keys.LIMITS, {f"{account}:m": 1})

    shown = Shown(
        shut_model,
        lambda: client.hset(keys.gate(account), mapping=own),
        lambda: client.delete(keys.gate(account), keys.LIMITS),
        lambda: connection.store.cancel(batch_id),
    )
    assert watching(batch_id, opened_at=9.0).watch(shown)
    assert [view.held_back for view in shown.views[:4]] == [
        "",
        "gate: retry_after, next call in 37 s",
        "gate: payment_required, next call in 0 s",
        "",
    ]


@pytest.mark.parametrize(("status", "reason"), [(401, "key_refused"), (403, "forbidden")])
def test_a_key_is_refused_when_this_runs_calls_are(
    connection: Connection, watching: Callable[..., Watch], status: int, reason: str
) -> None:
    client, account = connection.client, identity.account_of(connection.settings)
    batch_id, *_ = connection.store.submit(requests(1), NewBatch())
    stale = {"reason": reason, "status": status, "since": 1, "until": 0, "step_s": 1, "refused_at": 1000.25}
    client.hset(keys.gate(account), mapping=stale)
    shown = Shown(lambda: None, lambda: None, lambda: client.hset(keys.gate(account), "refused_at", "1000.500000"))
    with pytest.raises(KeyRefused, match=str(status)):
        watching(batch_id, opened_at=1000.25).watch(shown)
    assert len(shown.views) == 3


def test_an_account_without_funds_is_told_and_waited_for(
    connection: Connection, watching: Callable[..., Watch], capsys: pytest.CaptureFixture[str]
) -> None:
    client, account = connection.client, identity.account_of(connection.settings)
    batch_id, *_ = connection.store.submit(requests(1), NewBatch())
    shut = {"reason": "payment_required", "status": 402, "since": 1, "until": 0, "step_s": 1, "refused_at": 1000.25}
    client.hset(keys.gate(account), mapping=shut)

    def nothing_said() -> None:
        assert "402" not in capsys.readouterr().err

    shown = Shown(
        lambda: None,
        nothing_said,
        lambda: client.hset(keys.gate(account), "refused_at", "1000.500000"),
        lambda: None,
        lambda: connection.store.cancel(batch_id),
    )
    assert watching(batch_id, opened_at=1000.25).watch(shown)
    assert capsys.readouterr().err.count("the upstream has shut the account (payment_required, 402)") == 1


def test_a_batch_that_pauses_by_itself_ends_the_watch_once_nothing_is_in_flight(
    connection: Connection, watching: Callable[..., Watch], store_url: str, tmp_path: Path
) -> None:
    batch_id, *_ = connection.store.submit(requests(100), NewBatch())

    async def work(client: Any) -> list[Job]:
        return await leases.claim(client, "w", "bulk", [""], ALIKE + 1)

    jobs: list[Job] = run(work, store_url)

    def fail(failed: list[Job]) -> None:
        ends = [ending(job, "f") for job in failed]
        run(lambda client: leases.finish(client, batch_id, ends), store_url)

    watch = watching(batch_id)
    # The pause of somebody else is waited out, as before.
    shown = Shown(
        lambda: connection.store.pause(batch_id),
        lambda: connection.store.resume(batch_id),
        lambda: fail(jobs[:-1]),
        lambda: None,
        lambda: fail(jobs[-1:]),
    )
    assert not watch.watch(shown)
    why = "the first 20 jobs all failed alike: bad_request"
    assert (watch.paused, watch.status.state, watch.status.running) == (why, BatchState.PAUSED, 0)
    assert shown.views[-1].held_back == why
    assert len((tmp_path / "errors").read_bytes().splitlines()) == ALIKE + 1


def test_the_watch_of_a_paused_batch_does_not_wait_for_ever(
    connection: Connection, watching: Callable[..., Watch], store_url: str
) -> None:
    """What is in flight is perhaps held by a worker that is dead."""
    connection.settings = connection.settings.model_copy(update={"drain_s": 0.0})
    batch_id, *_ = connection.store.submit(requests(100), NewBatch())
    run(lambda client: leases.claim(client, "w", "bulk", [""], 1), store_url)
    connection.client.hset(keys.batch(batch_id), mapping={"state": "paused", "reason": "because"})
    watch = watching(batch_id)
    assert not watch.watch(Shown())
    assert (watch.paused, watch.status.running) == ("because", 1)
