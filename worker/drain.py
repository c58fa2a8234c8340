"""The drain: how a worker process comes to its end.

SIGTERM, SIGINT and SIGQUIT mean the same. The first lets the engine drain: nothing more is claimed, calls in flight get
their time, the rest is given back. The second ends that time: calls are broken off, and their jobs given back. The third
ends the process where it stands; its leases run out.

What goes wrong: the main thread is Celery's, which may be blocked on a broker that is away. So the signals are heard by
a thread of their own, through the interpreter's wake-up descriptor, and once the engine has drained Celery's end is
waited for only so long: all it could still do is to acknowledge rings. A process without an engine ends at once.

Imported before anything else, so that nothing is heard too late: the standard library only.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from functools import cache
from types import FrameType
from typing import Protocol

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
#: Seconds that Celery gets for its end once the engine has drained.
CELERY_S = 3.0


class Drainable(Protocol):
    """What drains: the engine's thread."""

    written: bool

    def drain(self) -> None:
        """Begins it; returns at once."""

    def hurry(self) -> None:
        """Ends its time now."""

    def join(self) -> None:
        """Waits until it is over."""


class Drain:
    """One process's drain; `end` ends the process at once with a status."""

    def __init__(self, end: Callable[[int], object] = os._exit) -> None:
        self._end = end
        self._engine: Drainable | None = None
        self._writer: socket.socket | None = None
        self._stop_celery: Callable[[int], None] | None = None
        self._lock = threading.Lock()
        self._heard = 0
        self._status = 0
        self.begun = False

    # -- what it is told

    def hear(self) -> None:
        """Hears the signals from now on, also when somebody else has set handlers since; in the main thread only."""
        if self._writer is None:
            reader, self._writer = socket.socketpair()
            self._writer.setblocking(False)
            signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._listen, args=(reader,), name="mimoq-signals", daemon=True).start()
        for number in SIGNALS:
            signal.signal(number, _heard_elsewhere)

    def _listen(self, reader: socket.socket) -> None:
        while number := reader.recv(1):
            if number[0] in SIGNALS:
                self.told(number[0])

    def told(self, number: int) -> None:
        """A signal has come."""
        self._heard += 1
        if self._heard == 1:
            self.begin()
        elif self._heard == 2 and self._engine is not None:
            self._engine.hurry()
        else:
            self._end(128 + number)

    def engine_stands(self, engine: Drainable) -> None:
        """From now on there is something to drain."""
        self._engine = engine

    def celery_stands(self, stop: Callable[[int], None]) -> None:
        """Celery is to be told as well: `stop` makes it end with a status, and may be called from any thread."""
        self._stop_celery = stop
        if self.begun:
            stop(self._status)

    # -- what it does

    def begin(self, status: int = 0) -> None:
        """Begins the drain, after which the process ends with `status`; does nothing the second time.

        Safe from any thread; returns at once, if at all: without an engine the process ends here.
        """
        with self._lock:
            if self.begun:
                return
            self.begun, self._status = True, status
        if self._engine is None:
            self._end(status)
            return
        self._engine.drain()
        if self._stop_celery is not None:
            self._stop_celery(status)
        threading.Thread(target=self._see_to_the_end, args=(self._engine,), name="mimoq-drain", daemon=True).start()

    def _see_to_the_end(self, engine: Drainable) -> None:
        engine.join()
        if self._stop_celery is not None:
            time.sleep(CELERY_S)
        self._end(self.status)

    @property
    def status(self) -> int:
        """The exit status, once the engine has drained: 1 if there was something that it could not write."""
        return self._status or int(self._engine is not None and not self._engine.written)


def _heard_elsewhere(_: int, __: FrameType | None) -> None:
    """A signal without a handler in Python would not reach the wake-up descriptor."""


@cache
def drain() -> Drain:
    """This process's drain."""
    return Drain()
