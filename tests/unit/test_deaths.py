"""When a starter gives up on processes that die."""

from __future__ import annotations

from jobs.processes import DEATHS, DEATHS_S, SOON_S, Deaths


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_those_that_die_soon_after_their_start_are_given_up() -> None:
    clock = Clock()
    deaths = Deaths(clock)
    assert [deaths.too_many(clock.now - 1, 1) for _ in range(DEATHS + 1)] == [False] * DEATHS + [True]


def test_those_that_were_killed_at_work_never_are() -> None:
    clock = Clock()
    deaths = Deaths(clock)
    for _ in range(100):
        clock.now += 1
        assert not deaths.too_many(clock.now - SOON_S, 1)
        assert not deaths.too_many(clock.now, -9)


def test_early_deaths_are_forgotten_after_a_while() -> None:
    clock = Clock()
    deaths = Deaths(clock)
    for _ in range(100):
        clock.now += DEATHS_S / DEATHS + 0.1
        assert not deaths.too_many(clock.now, 0)
