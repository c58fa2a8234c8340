"""The watchdog: a thread that sees whether the engine's event loop turns.

A loop that does not turn renews no lease and starts no call. What goes wrong: it stalls, and is logged, once, and again
when it goes on; it stays so, and the process ends, so that another can be started and its leases run out.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable

import structlog

#: Seconds between two looks.
ROUND_S = 1.0
#: Seconds without a turn that are logged, and those that end the process.
STALL_S = 5.0
END_S = 60.0

log = structlog.get_logger("worker.watchdog")


class Watchdog:
    """Watches one loop; `poke` has the loop call a function in its next turn, `end` ends the process with a status."""

    def __init__(
        self,
        poke: Callable[[Callable[[], None]], object],
        end: Callable[[int], object] = os._exit,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._poke = poke
        self._end = end
        self._clock = clock
        self._turned = True
        self._looked_at = clock()
        self._stalled_s = 0.0
        self._over = threading.Event()

    def __enter__(self) -> Watchdog:
        """Watches, in a thread of its own, to the end of the block."""
        threading.Thread(target=self._run, name="mimoq-watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _run(self) -> None:
        while not self._over.wait(ROUND_S):
            self.look()

    def look(self) -> None:
        """One look: has the loop turned since the last?"""
        now = self._clock()
        # This thread sleeps for a round. What is longer, the process was suspended or had no CPU: no stall of the loop.
        passed_s = min(now - self._looked_at, 2 * ROUND_S)
        self._looked_at = now
        stalled = self._stalled_s >= STALL_S
        if self._turned:
            if stalled:
                log.warning("loop_resumed", stalled_s=round(self._stalled_s, 1))
            self._stalled_s = 0.0
        else:
            self._stalled_s += passed_s
            if self._stalled_s >= STALL_S and not stalled:
                log.error("loop_stalled", stalled_s=round(self._stalled_s, 1))
            if self._stalled_s >= END_S:
                log.error("loop_given_up", stalled_s=round(self._stalled_s, 1))
                self._end(os.EX_SOFTWARE)
        self._turned = False
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._poke(self._turn)

    def _turn(self) -> None:
        self._turned = True
