"""Turns: so many at once, the next in the order of their coming."""

from __future__ import annotations

import asyncio

import pytest

from api.problems import Problem
from api.turns import Turns
from tests.integration.engine_stand import in_loop, until

LONG_S = 30.0


class Comer:
    """Somebody who takes a turn, and keeps it until told."""

    def __init__(self, turns: Turns, tenant: str = "t", most: int = 2, patience_s: float = LONG_S) -> None:
        self.inside = False
        self.leave = asyncio.Event()
        self.task = asyncio.create_task(self._come(turns, tenant, most, patience_s))

    async def _come(self, turns: Turns, tenant: str, most: int, patience_s: float) -> None:
        async with turns.soon(tenant, "uploads", most, patience_s):
            self.inside = True
            await self.leave.wait()
        self.inside = False


@in_loop
async def test_the_next_comes_in_as_one_leaves() -> None:
    turns = Turns()
    comers = [Comer(turns) for _ in range(4)]
    await asyncio.sleep(0)
    assert [comer.inside for comer in comers] == [True, True, False, False]
    other = Comer(turns, "another")
    await asyncio.sleep(0)
    assert other.inside
    comers[1].leave.set()
    await until(lambda: comers[2].inside, "the third")
    assert not comers[3].inside
    assert len(turns) == 3
    for comer in (*comers, other):
        comer.leave.set()
    await asyncio.gather(*(comer.task for comer in (*comers, other)))
    assert len(turns) == 0


@in_loop
async def test_who_goes_while_they_wait_takes_no_turn_along() -> None:
    turns = Turns()
    first, second, third = (Comer(turns, most=1) for _ in range(3))
    await asyncio.sleep(0)
    second.task.cancel()
    await asyncio.wait([second.task])
    first.leave.set()
    await until(lambda: third.inside, "the third")
    # One whose turn comes in the moment in which they go hands it on.
    fourth, fifth = Comer(turns, most=1), Comer(turns, most=1)
    await asyncio.sleep(0)
    third.leave.set()
    await asyncio.sleep(0)
    fourth.task.cancel()
    await until(lambda: fifth.inside, "the fifth")
    fifth.leave.set()
    await fifth.task
    assert len(turns) == 0


@in_loop
async def test_who_waits_too_long_is_refused_and_told_when_to_come() -> None:
    turns = Turns()
    with turns.now("t", "uploads", 1):
        with pytest.raises(Problem) as refused:
            async with turns.soon("t", "uploads", 1, 0.01):
                raise AssertionError
        assert (refused.value.status, refused.value.headers) == (429, {"Retry-After": "5"})
        with pytest.raises(Problem, match="1 uploads of yours are open"), turns.now("t", "uploads", 1):
            raise AssertionError
    assert len(turns) == 0


@in_loop
async def test_nobody_waits_once_the_process_is_to_end() -> None:
    turns = Turns()
    first, second = Comer(turns, most=1), Comer(turns, most=1)
    await asyncio.sleep(0)
    turns.stop()
    with pytest.raises(Problem) as stopped:
        await second.task
    assert stopped.value.status == 503
    first.leave.set()
    await first.task
    assert len(turns) == 0
