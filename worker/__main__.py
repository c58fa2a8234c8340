"""`mimoq worker`: one Celery worker process for a lane, or a supervisor of several.

What goes wrong: a worker process that dies is started again after a second, and its leases run out; five deaths in a
minute end the supervisor with a line. SIGTERM and SIGINT are passed on, and every worker drains. A worker whose starter
is gone, however it went, drains too: it holds the other end of its standard input.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

from jobs.errors import MimoqError
from jobs.keys import LANES

#: Threads of a worker process: each holds one ring while it waits for room and claims.
THREADS = 4
#: Deaths of workers within `WINDOW_S` that a supervisor puts up with.
DEATHS = 5
WINDOW_S = 60.0


def main(argv: list[str] | None = None) -> int:
    """Runs worker processes until told to stop; returns the exit status."""
    parser = argparse.ArgumentParser(prog="mimoq worker", description="Take jobs off the queues and call the upstream.")
    parser.add_argument("--lane", choices=LANES, help="one lane only; without it, one process for each lane")
    parser.add_argument("--processes", type=_number, default=1, metavar="N", help="processes for each lane (default 1)")
    parser.add_argument("--exit-with-stdin", action="store_true", help="drain and end when standard input is closed")
    parser.add_argument("--start-on-stdin", action="store_true", help="get ready, but begin at the first byte there")
    args = parser.parse_args(argv)
    lanes = [args.lane] if args.lane else list(LANES)
    try:
        if len(lanes) * args.processes == 1:
            _work(lanes[0], args.exit_with_stdin, args.start_on_stdin)
        return Supervisor(lanes * args.processes, args.exit_with_stdin).run()
    except MimoqError as error:
        print(f"mimoq worker: {error}", file=sys.stderr)
        return error.exit_code


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("must be a number, at least 1")
    return int(text)


def _work(lane: str, exit_with_stdin: bool, start_on_stdin: bool) -> NoReturn:
    """This process becomes a Celery worker of the lane, and ends as one."""
    told = _told_to_start() if start_on_stdin else {}
    if told is None:
        sys.exit(0)  # whoever started us has changed its mind
    # Celery prints its banner and its goodbye to stdout, which carries only what was asked for.
    os.dup2(2, 1)
    from jobs import identity
    from jobs.processes import end_when_stdin_closes
    from worker.host import host

    early = EarlyStop()
    # The engine first: while it makes its first calls, Celery has the time to import.
    engine = host().engine
    engine.start()
    early.stop_claiming = engine.stop_claiming
    if not early.told:
        engine.look(lane, THREADS)
    from worker.app import app

    if exit_with_stdin:
        end_when_stdin_closes(lambda: os.kill(os.getpid(), signal.SIGTERM))
    worker = app.Worker(
        pool_cls="threads",
        concurrency=THREADS,
        queues=[identity.queue(lane, identity.label(host().settings))],
        hostname=f"mimoq-{lane}-{secrets.token_hex(4)}@{socket.gethostname()}",
        quiet=True,
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
    )
    early.pass_on()
    if rings := told.get("rings"):
        # Beside Celery: for a million jobs it takes a while. What is lost of it the reaper makes up for.
        threading.Thread(target=_ring, args=rings, name="mimoq-bell", daemon=True).start()
    gc.freeze()  # what has been imported stays; collections of garbage need not look at it again
    worker.start()
    logging.shutdown()
    # All is written. The interpreter's own end would take another 0.2 s, for which a command waits.
    os._exit(int(worker.exitcode or 0))


def _ring(batch_id: str, lane: str, label: str, times: int) -> None:
    """Rings for the command that started this worker."""
    from jobs.errors import StoreUnavailable
    from worker.host import host

    with contextlib.suppress(StoreUnavailable):
        host().ring(batch_id, lane, label, times)


class EarlyStop:
    """SIGTERM and SIGINT until Celery hears them itself: no more claims, and Celery ends, and drains, as it begins."""

    def __init__(self) -> None:
        self.told = False
        self.stop_claiming: Callable[[], None] = lambda: None
        self._state: Any = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._hear)

    def _hear(self, number: int, _: FrameType | None) -> None:
        self.told = True
        self.stop_claiming()
        if self._state is not None:
            self._state.should_stop = 0

    def pass_on(self) -> None:
        """Celery is imported: what was heard so far, and until its own handlers are set, is told to it."""
        from celery.worker import state

        self._state = state
        if self.told:
            state.should_stop = 0


def _told_to_start() -> dict[str, Any] | None:
    """Imports what takes time, then reads one line from standard input; None when there is none to come.

    `{"settings": {"MIMOQ_...": ...}, "log": path, "rings": [batch id, lane, label, times]}`, rings if any. They come this
    way because a command starts its worker before it knows its own settings.
    """
    import json

    # structlog and httpx would import toolkits for terminals, 0.2 s of them, which a worker has no use for. None makes
    # the import fail, and they do without.
    modules: dict[str, Any] = sys.modules
    modules.update({"rich": None, "httpx._main": None})
    from worker import host as _  # noqa: F401 - only to have it imported

    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)  # not a buffered read: what comes after the line is the starter's end
        if not byte:
            return None
        line += byte
    told: dict[str, Any] = json.loads(line)
    os.environ.update(told["settings"])
    log = os.open(told["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.dup2(log, 2)
    os.close(log)
    return told


class Supervisor:
    """Several worker processes, kept alive until told to stop."""

    def __init__(self, lanes: list[str], exit_with_stdin: bool) -> None:
        self._lanes = lanes
        self._exit_with_stdin = exit_with_stdin
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._deaths: deque[float] = deque()
        self._stopping = False

    def run(self) -> int:
        """Until SIGTERM or SIGINT, or until the workers keep dying."""
        from jobs.processes import end_when_stdin_closes

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        if self._exit_with_stdin:
            end_when_stdin_closes(lambda: os.kill(os.getpid(), signal.SIGTERM))
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
                    status = status or int(code not in (0, -signal.SIGTERM))
                elif code == 2 or self._too_many():
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
        # In a session of its own, so that a terminal's Ctrl-C comes once, from here.
        child = subprocess.Popen(argv, stdin=subprocess.PIPE, start_new_session=True)
        self._children[place] = child
        if self._stopping:  # told so while it was being started
            child.send_signal(signal.SIGTERM)

    def _too_many(self) -> bool:
        now = time.monotonic()
        self._deaths.append(now)
        while self._deaths[0] < now - WINDOW_S:
            self._deaths.popleft()
        return len(self._deaths) > DEATHS

    def _stop(self, number: int, _: FrameType | None) -> None:
        self._stopping = True
        for child in self._children.values():
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
