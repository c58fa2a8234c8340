"""Starting processes that outlive their starter, and ending those that must not."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


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
