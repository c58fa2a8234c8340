"""`mimoq worker`: one Celery worker process for a lane, or a supervisor of several.

What goes wrong: told to stop, a worker drains (`worker.drain`). A worker whose starter is gone, however it went, drains too:
it holds the other end of its standard input.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import secrets
import socket
import sys
import threading
from typing import Any, NoReturn

from jobs.errors import MimoqError
from jobs.keys import COMPLETE, SERVED
from worker.drain import drain
from worker.supervisor import Supervisor

#: Threads of a worker process: each holds one ring while it waits for room and claims.
THREADS = 8
#: Of a pipelines' process, where each message is one job.
COMPLETE_THREADS = 8
#: New objects after which garbage is looked for, and how often older ones are looked at too.
GARBAGE = (20_000, 20, 100)


def main(argv: list[str] | None = None) -> int:
    """Runs worker processes until told to stop; returns the exit status."""
    parser = argparse.ArgumentParser(prog="mimoq worker", description="Take jobs off the queues and call the upstream.")
    parser.add_argument("--lane", choices=SERVED, help="one lane only; without it, one process for each lane")
    parser.add_argument("--processes", type=_number, default=1, metavar="N", help="processes for each lane (default 1)")
    parser.add_argument("--exit-with-stdin", action="store_true", help="drain and end when standard input is closed")
    parser.add_argument("--start-on-stdin", action="store_true", help="get ready, but begin at the first byte there")
    parser.add_argument("--place", type=int, default=0, help=argparse.SUPPRESS)  # among a supervisor's processes
    args = parser.parse_args(argv)
    lanes = [args.lane] if args.lane else list(SERVED)
    try:
        if len(lanes) * args.processes == 1:
            _work(lanes[0], args.exit_with_stdin, args.start_on_stdin, args.place)
        return Supervisor(lanes * args.processes, args.exit_with_stdin).run()
    except MimoqError as error:
        print(f"mimoq worker: {error}", file=sys.stderr)
        return error.exit_code


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("must be a number, at least 1")
    return int(text)


def _work(lane: str, exit_with_stdin: bool, start_on_stdin: bool, place: int) -> NoReturn:
    """This process becomes a Celery worker of the lane, and ends as one."""
    drain().hear()
    # structlog and httpx would import toolkits for terminals, 0.2 s of them, which a worker has no use for. None makes
    # the import fail, and they do without.
    modules: dict[str, Any] = sys.modules
    modules.update({"rich": None, "httpx._main": None})
    told = _told_to_start() if start_on_stdin else {}
    if told is None:
        sys.exit(0)  # whoever started us has changed its mind
    # Celery prints its banner and its goodbye to stdout, which carries only what was asked for.
    os.dup2(2, 1)
    from jobs import identity
    from jobs.processes import end_when_stdin_closes
    from worker.host import host

    if exit_with_stdin:
        end_when_stdin_closes(drain().begin)
    # The engine first: while it makes its first calls, Celery has the time to import.
    host().place = place
    host().start()
    host().engine.serve([lane])
    from worker.app import app

    worker = app.Worker(
        pool_cls="threads",
        concurrency=COMPLETE_THREADS if lane == COMPLETE else THREADS,
        queues=[identity.queue(lane, identity.label(host().settings))],
        hostname=f"mimoq-{lane}-{secrets.token_hex(4)}@{socket.gethostname()}",
        quiet=True,
        without_gossip=True,
        without_mingle=True,
        # Its heartbeats are what Flower knows a worker by, and how it can turn task events on.
        task_events=host().settings.task_events,
    )
    if rings := told.get("rings"):
        # Beside Celery: for a million jobs it takes a while. What is lost of it the reaper makes up for.
        threading.Thread(target=_ring, args=rings, name="mimoq-bell", daemon=True).start()
    gc.freeze()  # what has been imported stays; collections of garbage need not look at it again
    # A call makes hundreds of objects, which die by themselves. To look for cycles after every 700 of them, as Python does,
    # takes a seventh of a worker's CPU; what gathers between rarer looks is a few megabytes.
    gc.set_threshold(*GARBAGE)
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


def _told_to_start() -> dict[str, Any] | None:
    """Imports what takes time, then reads one line from standard input; None when there is none to come.

    `{"settings": {"MIMOQ_...": ...}, "log": path, "rings": [batch id, lane, label, times]}`, rings if any. They come this
    way because a command starts its worker before it knows its own settings.
    """
    import json

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


if __name__ == "__main__":
    sys.exit(main())
