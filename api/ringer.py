"""The ringer: rings for what was submitted, from a thread of its own, because the bell does not know of event loops.

What came in while it rang is rung for together: singles cost a ring for each slice's worth of them, not one each.
What goes wrong: the broker is away. Nothing depends on a ring; workers look for themselves.
"""

from __future__ import annotations

import threading
import time

from producers.connection import Connection

#: Seconds between two rings of a busy time.
WINDOW_S = 0.02


class Ringer:
    """Rings the lanes of one store."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._wanted: dict[tuple[str, str], tuple[str, int]] = {}
        self._changed = threading.Condition()
        self._ended = False
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mimoq-ringer", daemon=True)

    def start(self) -> None:
        """Makes the bell, which takes Celery a moment, and listens."""
        self._thread.start()

    def ring(self, batch_id: str, lane: str, label: str, jobs: int) -> None:
        """Rings soon for `jobs` jobs that were submitted; from any thread."""
        with self._changed:
            _, others = self._wanted.get((lane, label), ("", 0))
            self._wanted[lane, label] = batch_id, others + jobs
            self._changed.notify()

    def depth(self, lane: str, label: str) -> int:
        """Rings that wait, as `jobs.broker.Bell` says; waits for the bell, which two threads must not make."""
        self._ready.wait()
        return self._connection.bell.depth(lane, label)

    def _run(self) -> None:
        _ = self._connection.bell
        self._ready.set()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted or self._ended)
                wanted, self._wanted = self._wanted, {}
            if not wanted:
                return
            for (lane, label), (batch_id, jobs) in wanted.items():
                self._connection.ring(batch_id, lane, label, jobs)
            time.sleep(WINDOW_S)

    def close(self) -> None:
        """Rings for what is still wanted, and ends."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join(5.0)
