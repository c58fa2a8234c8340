"""A line by itself: when it asks the limiter."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

import worker.line
from worker.limiter import Grant
from worker.line import Line, Lines

REFUSED = Grant([], 0.1, "concurrency", "")


class FakeLimiter:
    """Refuses each reservation; `asked` is set by each."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()

    def ids(self, lane: str) -> str:
        return f"{lane}.w.1"

    async def reserve(self, *_: Any) -> Grant:
        self.asked.set()
        return REFUSED


class FakeCaller:
    """An engine with room and nothing in flight."""

    def __init__(self) -> None:
        self.tasks: list[asyncio.Task[None]] = []

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self.tasks.append(asyncio.get_running_loop().create_task(work))

    def free(self, lane: str) -> int:
        return 100

    def held(self, model: str, lane: str) -> int:
        return 0

    def estimate(self, run: Any) -> int:
        return 1


def job() -> Any:
    return SimpleNamespace(model="m", job=SimpleNamespace(lane="interactive", leads=False), over=False, estimate=0)


@pytest.mark.parametrize("more", [0, 2])
def test_a_line_whose_jobs_were_all_asked_for_elsewhere_asks_for_those_that_come_back(
    monkeypatch: pytest.MonkeyPatch, more: int
) -> None:
    monkeypatch.setattr(worker.line, "ASK_AGAIN_S", 0.01)
    monkeypatch.setattr(worker.line, "IDLE_S", 1_000.0)

    async def main() -> None:
        looked = asyncio.Event()

        async def pause(line: Line, seconds: float) -> bool:
            if not line.jobs:
                looked.set()  # and has nothing to ask for
            return await wait(line, seconds)

        wait = Line._pause
        monkeypatch.setattr(Line, "_pause", pause)
        caller, limiter = FakeCaller(), FakeLimiter()
        lines = Lines(limiter, caller)  # type: ignore[arg-type]
        lines.add(job())
        await limiter.asked.wait()
        await asyncio.sleep(0)  # the refusal is heard
        asks = lines.asks({"m": 1})
        line = asks[0].line
        assert line.jobs == 0
        await looked.wait()
        line.answered(asks[0], REFUSED)
        lines.wake()
        for _ in range(more):
            lines.add(job())
        limiter.asked.clear()
        await asyncio.wait_for(limiter.asked.wait(), 5)
        for task in caller.tasks:
            task.cancel()
        await asyncio.gather(*caller.tasks, return_exceptions=True)

    asyncio.run(main())


def gated(look: Callable[[str], None]) -> tuple[Lines, Line, FakeLimiter]:
    """A line whose gate is over in a moment; `look` is how it claims."""
    caller, limiter = FakeCaller(), FakeLimiter()
    caller.look = look  # type: ignore[attr-defined]
    lines = Lines(limiter, caller)  # type: ignore[arg-type]
    line = lines._lines["m", "interactive"] = Line("m", "interactive", lines)
    line.shut_until = time.monotonic() + 0.01
    return lines, line, limiter


@pytest.mark.parametrize("stirred", [False, True], ids=["alone", "beside others"])
def test_once_a_gate_is_over_it_looks_for_what_comes_back_and_for_what_comes_behind(
    monkeypatch: pytest.MonkeyPatch, stirred: bool
) -> None:
    monkeypatch.setattr(worker.line, "LOOKS_S", (0.02, 0.04))
    monkeypatch.setattr(worker.line, "IDLE_S", 0.01)

    async def main() -> None:
        looks: list[float] = []
        third = asyncio.Event()

        def look(lane: str) -> None:
            looks.append(time.monotonic())
            if len(looks) == 3:
                third.set()

        lines, line, _ = gated(look)
        ends = line.shut_until

        async def stir() -> None:
            while True:
                lines.wake()  # by what other lines settle
                await asyncio.sleep(0.001)

        other = asyncio.create_task(stir()) if stirred else None
        life = asyncio.create_task(line.live())
        await asyncio.wait_for(third.wait(), 10.0)
        if other is not None:
            other.cancel()
        await asyncio.wait_for(life, 10.0)  # without jobs it ends
        assert len(looks) == 3
        assert all(look >= ends + behind_s for look, behind_s in zip(looks, (0.0, 0.02, 0.04), strict=True))

    asyncio.run(main())


def test_jobs_that_come_first_do_not_keep_it_from_looking_for_those_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker.line, "LOOKS_S", (0.02,))
    monkeypatch.setattr(worker.line, "ASK_AGAIN_S", 0.01)

    async def main() -> None:
        looks: list[str] = []
        again = asyncio.Event()

        def look(lane: str) -> None:
            looks.append(lane)
            if len(looks) == 1:
                lines.add(job())
            else:
                again.set()

        lines, line, limiter = gated(look)
        life = asyncio.create_task(line.live())
        await asyncio.wait_for(limiter.asked.wait(), 10.0)
        assert len(looks) == 1
        line.waiting.clear()  # it has been called
        await asyncio.wait_for(again.wait(), 10.0)
        life.cancel()

    asyncio.run(main())
