"""When an event loop counts as stalled, by a clock of the test's own."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from structlog.testing import capture_logs

from tests.waiting import wait_for
from worker import watchdog
from worker.watchdog import END_S, ROUND_S, STALL_S, Watchdog


class Loop:
    """A loop that turns when told to, a clock, and the end of the process."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self.calls: list[Callable[[], None]] = []
        self.ends: list[int] = []
        self.dog = Watchdog(self.calls.append, self.ends.append, lambda: self.now)

    def rounds(self, seconds: float, turning: bool = False) -> None:
        for _ in range(round(seconds / ROUND_S)):
            self.now += ROUND_S
            if turning:
                self.turn()
            self.dog.look()

    def turn(self) -> None:
        while self.calls:
            self.calls.pop()()


@pytest.fixture
def loop() -> Loop:
    return Loop()


@pytest.fixture
def said() -> Iterator[list[Any]]:
    with capture_logs() as records:
        yield records


def events(said: list[Any]) -> list[str]:
    return [record["event"] for record in said]


def test_a_loop_that_turns_is_left_alone(loop: Loop, said: list[Any]) -> None:
    loop.rounds(3 * END_S, turning=True)
    assert (said, loop.ends) == ([], [])


def test_a_stall_is_said_once_and_so_is_its_end(loop: Loop, said: list[Any]) -> None:
    for stall in (1, 2):
        loop.rounds(ROUND_S, turning=True)
        loop.rounds(STALL_S - ROUND_S)
        assert len(said) == 2 * (stall - 1), "not yet"
        loop.rounds(20)
        loop.rounds(5, turning=True)
        assert events(said) == ["loop_stalled", "loop_resumed"] * stall
    assert said[-2]["stalled_s"] == STALL_S
    assert said[-1]["stalled_s"] == STALL_S + 20 - ROUND_S
    assert loop.ends == []


def test_a_loop_that_stays_stalled_ends_the_process(loop: Loop, said: list[Any]) -> None:
    loop.rounds(ROUND_S, turning=True)
    loop.rounds(END_S - ROUND_S)
    assert loop.ends == []
    loop.rounds(ROUND_S)
    assert loop.ends == [os.EX_SOFTWARE]
    assert events(said) == ["loop_stalled", "loop_given_up"]


def test_a_process_that_was_suspended_has_no_stall(loop: Loop, said: list[Any]) -> None:
    loop.rounds(ROUND_S, turning=True)
    loop.now += 3_600
    loop.dog.look()  # before the loop has had a chance to turn
    loop.rounds(10, turning=True)
    assert (said, loop.ends) == ([], [])


def test_it_watches_a_real_loop_to_the_end_of_the_block(monkeypatch: pytest.MonkeyPatch, said: list[Any]) -> None:
    monkeypatch.setattr(watchdog, "ROUND_S", 0.01)
    monkeypatch.setattr(watchdog, "STALL_S", 0.05)

    async def stall() -> None:
        with Watchdog(asyncio.get_running_loop().call_soon_threadsafe, ends.append):
            assert any(thread.name == "mimoq-watchdog" for thread in threading.enumerate())
            wait_for(lambda: "loop_stalled" in events(said))  # blocks the loop
            await asyncio.to_thread(wait_for, lambda: "loop_resumed" in events(said))

    ends: list[int] = []
    asyncio.run(stall())
    wait_for(lambda: not any(thread.name == "mimoq-watchdog" for thread in threading.enumerate()))
    assert ends == []


def test_a_loop_that_is_closed_is_no_error(said: list[Any]) -> None:
    closed = asyncio.new_event_loop()
    closed.close()
    dog = Watchdog(closed.call_soon_threadsafe)
    dog.look()
    assert said == []
