"""A simulator in a thread of this process, for tests and tools that are not in its event loop."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from ops.simulator.config import configure
from ops.simulator.ledger import Totals
from ops.simulator.server import Simulator, serve

T = TypeVar("T")


def runner() -> asyncio.Runner:
    """An asyncio runner on the fastest loop there is."""
    if sys.platform == "win32":
        return asyncio.Runner()
    import uvloop

    return asyncio.Runner(loop_factory=uvloop.new_event_loop)


class RunningSimulator:
    """A handle on a simulator that runs in another thread; every method may be called from any thread but that one."""

    def __init__(self, simulator: Simulator, loop: asyncio.AbstractEventLoop) -> None:
        self._simulator = simulator
        self._loop = loop
        self._changed = threading.Condition()
        simulator.ledger.on_change = self._notify

    @property
    def url(self) -> str:
        """`http://127.0.0.1:PORT`"""
        return self._simulator.url

    @property
    def port(self) -> int:
        return self._simulator.port

    def ledger(self, *, whole: bool = True) -> dict[str, Any]:
        """What was asked and paid: `{"totals", "paid": {digest: answers}, "calls": [...]}`."""

        async def view() -> dict[str, Any]:
            return self._simulator.view(whole=whole)

        return self._call(view())

    def totals(self) -> dict[str, Any]:
        """The ledger's totals alone."""
        totals: dict[str, Any] = self.ledger(whole=False)["totals"]
        return totals

    def configure(self, **changes: Any) -> None:
        """Changes the configuration: `sim.configure(down="503")`, `sim.configure(hold=True)`. Raises `ConfigError`."""
        self._call(self._simulator.configure(changes))

    def reset(self) -> None:
        """Empties the ledger and the limits' memory."""

        async def reset() -> None:
            self._simulator.reset()

        self._call(reset())

    def wait_until(self, holds: Callable[[Totals], bool], timeout: float = 30.0) -> None:
        """Returns once the totals fulfil a condition: `sim.wait_until(lambda t: t.in_flight == 3)`.

        Raises TimeoutError after `timeout` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: holds(self._simulator.ledger.totals), timeout):
                raise TimeoutError(f"the simulator did not get there within {timeout:g} s")

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=30)

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()


@contextmanager
def running_simulator(**config: Any) -> Iterator[RunningSimulator]:
    """`with running_simulator(rpm=100) as sim: sim.url`, from `Config`'s fields; the latency is 0 unless given.

    Raises `ConfigError` for a bad value, OSError for a taken port.
    """
    settings = configure({"latency": 0.0, **config})
    ready = threading.Event()
    started: list[RunningSimulator] = []
    stops: list[Callable[[], object]] = []
    failures: list[BaseException] = []

    async def live() -> None:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        async with serve(settings) as simulator:
            started.append(RunningSimulator(simulator, loop))
            stops.append(lambda: loop.call_soon_threadsafe(stop.set))
            ready.set()
            await stop.wait()

    def work() -> None:
        try:
            with runner() as loop_runner:
                loop_runner.run(live())
        except BaseException as error:  # handed to the caller's thread
            failures.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=work, name="simulator", daemon=True)
    thread.start()
    ready.wait()
    try:
        if started:
            yield started[0]
    finally:
        for stop in stops:
            stop()
        thread.join()
    if failures:
        raise failures[0]
