"""What signals make of a process, with an engine and an end of the test's own."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from tests.waiting import wait_for
from worker.drain import CELERY_S, SIGNALS, Drain

TERM = signal.SIGTERM


class Engine:
    """An engine that has drained when told so."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.drained = threading.Event()
        self.written = False

    def drain(self) -> None:
        self.done.append("drain")

    def hurry(self) -> None:
        self.done.append("hurry")

    def join(self) -> None:
        assert self.drained.wait(20)


@pytest.fixture
def ends() -> list[int]:
    return []


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def drain(ends: list[int], engine: Engine) -> Drain:
    drain = Drain(ends.append)
    drain.engine_stands(engine)
    return drain


def test_without_an_engine_it_ends_at_once(ends: list[int]) -> None:
    Drain(ends.append).told(TERM)
    assert ends == [0]


def test_drain_then_hurry_then_end(drain: Drain, engine: Engine, ends: list[int]) -> None:
    drain.told(TERM)
    assert engine.done == ["drain"]
    drain.told(signal.SIGINT)
    assert engine.done == ["drain", "hurry"]
    assert ends == []
    drain.told(TERM)
    assert ends == [128 + TERM]
    engine.drained.set()


@pytest.mark.parametrize(
    ("status", "written", "expected"),
    [(0, True, 0), (0, False, 1), (os.EX_SOFTWARE, True, os.EX_SOFTWARE), (os.EX_SOFTWARE, False, os.EX_SOFTWARE)],
)
def test_the_status_tells_how_it_went(
    drain: Drain, engine: Engine, ends: list[int], status: int, written: bool, expected: int
) -> None:
    drain.begin(status)
    drain.begin(77)  # is no news
    assert engine.done == ["drain"]
    engine.written = written
    engine.drained.set()
    wait_for(lambda: ends == [expected], what=f"the end, {expected}")
    assert drain.status == expected


def test_celery_is_told_whenever_it_stands(drain: Drain, engine: Engine) -> None:
    told: list[int] = []
    drain.begin()
    drain.celery_stands(told.append)
    assert told == [0]
    engine.drained.set()
    other = Drain(lambda _: None)
    other.engine_stands(engine)
    other.celery_stands(told.append)
    other.begin(3)
    assert told == [0, 3]


def test_celery_gets_its_time_and_no_more(
    drain: Drain, engine: Engine, ends: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    drain.celery_stands(lambda status: None)
    drain.begin()
    engine.written = True
    engine.drained.set()
    while not ends:  # `wait_for` sleeps
        pass
    assert (waits, ends) == ([CELERY_S], [0])


@pytest.fixture
def _handlers_come_back() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_handlers_come_back")
def test_signals_are_heard_whatever_the_main_thread_does_and_whoever_took_them_meanwhile(
    drain: Drain, engine: Engine, ends: list[int]
) -> None:
    drain.hear()
    taken: list[int] = []
    signal.signal(TERM, lambda number, _: taken.append(number))
    signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.raise_signal(signal.SIGUSR1)  # is none of ours
    signal.raise_signal(TERM)
    wait_for(lambda: engine.done == ["drain"])
    drain.hear()
    signal.raise_signal(TERM)
    wait_for(lambda: engine.done == ["drain", "hurry"])
    assert taken == [TERM]
    assert ends == []
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    engine.drained.set()
