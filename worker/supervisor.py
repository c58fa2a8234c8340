"""The supervisor: several worker processes, kept alive until told to stop.

What goes wrong: a worker process that dies is started again after a second, and its leases run out; more than five in a
minute that end soon after their start, not by a signal, or one that refuses its settings, end them all with a line. SIGTERM,
SIGINT and SIGQUIT are passed on, each time they come: to the workers the second means more than the first.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from types import FrameType

from jobs.processes import Deaths
from worker.drain import SIGNALS


class Supervisor:
    """Worker processes, one for each of `lanes`."""

    def __init__(self, lanes: list[str], exit_with_stdin: bool) -> None:
        self._lanes = lanes
        self._exit_with_stdin = exit_with_stdin
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._started_at: dict[int, float] = {}
        self._deaths = Deaths()
        self._stopping = False

    def run(self) -> int:
        """Until told to stop, or until the workers keep dying; returns the exit status."""
        for number in SIGNALS:
            signal.signal(number, self._stop)
        if self._exit_with_stdin:
            from jobs.processes import end_when_stdin_closes

            end_when_stdin_closes(lambda: signal.raise_signal(signal.SIGTERM))
        for place in range(len(self._lanes)):
            if not self._stopping:
                self._start(place)
        status = 0
        while self._children:
            time.sleep(0.1)
            for place, child in list(self._children.items()):
                code = child.poll()
                if code is None:
                    continue
                del self._children[place]
                if self._stopping:
                    # SIGTERM ends one at once that had not begun yet.
                    if code not in (0, -signal.SIGTERM):
                        print(f"mimoq worker: a worker process ended with {code}", file=sys.stderr)
                        status = status or 1
                elif code == 2 or self._deaths.too_many(self._started_at[place], code):
                    print(f"mimoq worker: a worker process ended with {code}; giving up", file=sys.stderr)
                    status = code if code == 2 else 1
                    self._stop(signal.SIGTERM, None)
                else:
                    print(f"mimoq worker: a worker process ended with {code}; starting another", file=sys.stderr)
                    time.sleep(1)
                    if not self._stopping:
                        self._start(place)
        return status

    def _start(self, place: int) -> None:
        argv = [sys.executable, "-P", "-m", "worker", "--lane", self._lanes[place], "--exit-with-stdin"]
        argv += ["--place", str(place)]
        # In a session of its own, so that a terminal's Ctrl-C comes once, from here.
        child = subprocess.Popen(argv, stdin=subprocess.PIPE, start_new_session=True)
        self._children[place] = child
        self._started_at[place] = time.monotonic()
        if self._stopping:  # told so while it was being started
            child.send_signal(signal.SIGTERM)

    def _stop(self, _: int, __: FrameType | None) -> None:
        self._stopping = True
        for child in self._children.values():
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)
