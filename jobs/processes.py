"""Starting processes that outlive their starter, ending those that must not, their logs, and seeing that one can't live.

Imported by the guard, which must start fast: the standard library only.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

#: Deaths within `DEATHS_S`, each within `SOON_S` of its start, that a starter puts up with. A worker that dies later, or by
#: a signal, was killed, perhaps by a job, and the next one will do.
DEATHS = 5
DEATHS_S = 60.0
SOON_S = 8.0
#: A log of earlier processes that is longer is put aside (one is kept).
LOG_BYTES = 10_000_000


class Deaths:
    """The deaths of a starter's processes; `clock` counts seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._soon: deque[float] = deque()

    def too_many(self, started_at: float, status: int) -> bool:
        """Whether no other should be started: with one that started then and has just ended so, too many died soon.

        `status` is as `subprocess` has it: negative for a signal.
        """
        now = self._clock()
        if status >= 0 and now - started_at < SOON_S:
            self._soon.append(now)
        while self._soon and self._soon[0] < now - DEATHS_S:
            self._soon.popleft()
        return len(self._soon) > DEATHS


def spawn_detached(
    argv: Sequence[str], *, env: Mapping[str, str] | None = None, log: Path | None, pass_fds: Sequence[int] = ()
) -> subprocess.Popen[bytes]:
    """Start `argv` in a session of its own, so that no terminal's Ctrl-C reaches it.

    It reads nothing and writes to the end of `log` (None: nowhere); of our files it gets `pass_fds` alone. Raises
    OSError when the log can't be opened or the program can't be run.
    """
    output = os.open(log or os.devnull, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        return subprocess.Popen(
            argv,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            pass_fds=pass_fds,
        )
    finally:
        os.close(output)


def put_aside(log: Path, most_bytes: int = LOG_BYTES) -> None:
    """Begins a log anew that has become longer than that; the earlier one is `NAME.old.log`."""
    if log.exists() and log.stat().st_size > most_bytes:
        log.replace(log.with_suffix(".old.log"))


def last_line(log: Path) -> str:
    """What a process said last, and where the rest is."""
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return f"{lines[-1][:300] if lines else 'it said nothing'} (log: {log})"


def end_when_stdin_closes(callback: Callable[[], object]) -> None:
    """Call `callback` once, from a thread of its own, when standard input ends.

    A parent that keeps the other end of a pipe open thereby takes its child along however it dies, kill -9 included.
    Where standard input is /dev/null that is at once.
    """

    def watch() -> None:
        # The bare descriptor: a thread blocked in sys.stdin's buffer would hold its lock when the interpreter ends.
        try:
            while os.read(0, 4096):
                pass
        except OSError:
            pass  # as good as its end
        callback()

    threading.Thread(target=watch, name="stdin-watch", daemon=True).start()
