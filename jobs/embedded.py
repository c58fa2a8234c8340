"""The embedded Valkey: what a command or worker does to have one in its data folder.

A user holds a shared lock on the folder for as long as it lives; a guard process (`jobs.guard`) owns the server and
stops it after the last user. Nothing has to be cleaned up after a crash of either.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from jobs.errors import EmbeddedServerError
from jobs.processes import spawn_detached
from jobs.runtime import Runtime, ask, last_words, one_line, open_lock, still_there, try_lock

LOADING_S = 600.0  # that a server which reads a large append-only file may take, while it says that it does
GUARDS = 10  # that one user starts ...
GUARDS_WINDOW_S = 60.0  # ... within this time, before it believes that they can't live here
ADVICE = "choose another data folder (MIMOQ_DATA_DIR, --data-dir) or set MIMOQ_REDIS_URL"


class EmbeddedServer:
    """A user's hold on the data folder's Valkey; for one thread.

    A child process that needs the server opens its own: a lock is not inherited by programs we start.
    """

    def __init__(self, runtime: Runtime) -> None:
        """Use `open`."""
        self.url = f"unix://{runtime.socket}"
        self._runtime = runtime
        self._users_fd: int | None = None
        self._starts: deque[float] = deque()

    @classmethod
    def open(cls, data_dir: Path, *, timeout_s: float = 20.0) -> EmbeddedServer:
        """Join the folder's users and return once its Valkey answers; the folder is made (0700) if need be.

        While Valkey says that it is reading its file, `timeout_s` begins anew, for ten minutes at most. Raises
        EmbeddedServerError, its message one line.
        """
        server = cls(Runtime.of(data_dir))
        try:
            with plain_errors(server._runtime):
                server._open(timeout_s)
        except BaseException:
            server._leave()
            raise
        return server

    def ensure(self) -> None:
        """Start a guard where none lives; cheap, for a supervisor to call every second.

        Raises EmbeddedServerError when the guard gave the server up, or the folder was removed.
        """
        with plain_errors(self._runtime):
            self._ensure(forgive=False)

    def close(self) -> None:
        """Stop being a user. The guard stops Valkey after the last one."""
        if self._users_fd is not None:
            with contextlib.suppress(EmbeddedServerError):
                self.ensure()  # a guard that was killed would leave nobody to stop Valkey
            self._leave()

    def __enter__(self) -> EmbeddedServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _leave(self) -> None:
        if self._users_fd is not None:
            # Closed, not unlocked: in a fork of this process that would take the lock from the process itself.
            os.close(self._users_fd)
            self._users_fd = None

    def _open(self, timeout_s: float) -> None:
        runtime = self._runtime
        begun = time.monotonic()
        deadline = begun + timeout_s
        runtime.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        pause_s = 0.002
        forgive = True  # what made an earlier guard give up may be mended by now
        while True:
            reply = ""
            if self._join():
                # From here on no guard ends for lack of users: one that lives now stays.
                forgive = self._ensure(forgive=forgive) and forgive
                with contextlib.suppress(OSError):
                    reply = ask(runtime.socket, "PING")
            if reply == "+PONG":
                return
            if reply.startswith("-MISCONF"):
                raise EmbeddedServerError(f"the disk of {runtime.data_dir} is full: make room, or {ADVICE}")
            now = time.monotonic()
            if reply.startswith("-LOADING"):
                deadline = min(now + timeout_s, begun + LOADING_S)
            if now > deadline:
                raise EmbeddedServerError(
                    f"the embedded Valkey did not answer within {now - begun:.0f} s; see {runtime.server_log}, "
                    f"which ends: {last_words(runtime.server_log)}"
                )
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, 0.02)

    def _join(self) -> bool:
        """Become a user; False while a guard is stopping the server and keeps users out."""
        if self._users_fd is not None:
            return True
        users_fd = open_lock(self._runtime.users_lock)
        try:
            if try_lock(users_fd, shared=True):
                self._users_fd, users_fd = users_fd, -1
        finally:
            if users_fd >= 0:
                os.close(users_fd)
        return self._users_fd is not None

    def _ensure(self, *, forgive: bool) -> bool:
        """Have a guard: start one where none lives. Whether one lived already.

        An earlier guard's reason for giving up is an error, or with `forgive` forgotten.
        """
        runtime = self._runtime
        if self._users_fd is None or not still_there(self._users_fd, runtime.users_lock):
            raise EmbeddedServerError(f"the data folder {runtime.data_dir} was removed while it was in use")
        guard_fd = open_lock(runtime.guard_lock)
        try:
            if not try_lock(guard_fd):
                return True
            # No guard lives, and none but us can start one until we have let go of the lock.
            if forgive:
                runtime.failure.unlink(missing_ok=True)
            elif runtime.failure.exists():
                raise EmbeddedServerError(f"the embedded Valkey is gone: {runtime.failure.read_text('utf-8')}")
            self._start_guard(guard_fd)
            return False
        finally:
            os.close(guard_fd)

    def _start_guard(self, guard_fd: int) -> None:
        now = time.monotonic()
        self._starts.append(now)
        while self._starts[0] <= now - GUARDS_WINDOW_S:
            self._starts.popleft()
        if len(self._starts) > GUARDS:
            raise EmbeddedServerError(
                f"the guard of the embedded Valkey keeps ending; see {self._runtime.guard_log}, "
                f"which ends: {last_words(self._runtime.guard_log)}"
            )
        guard = spawn_detached(
            # -P: a folder named `jobs` in the working directory is not ours.
            [sys.executable, "-P", "-m", "jobs.guard", str(self._runtime.data_dir), str(guard_fd)],
            # It outlives us and has no use for our settings, the key among them.
            env={name: value for name, value in os.environ.items() if not name.startswith("MIMOQ_")},
            log=self._runtime.guard_log,
            pass_fds=(guard_fd,),
        )
        reap(guard)


def reap(process: subprocess.Popen[bytes]) -> None:
    """Wait for a process that may outlive us, so that it leaves no zombie if it does not."""
    threading.Thread(target=process.wait, name="guard-reaper", daemon=True).start()


@contextlib.contextmanager
def plain_errors(runtime: Runtime) -> Iterator[None]:
    """What the system refused, and every other failure, as one line."""
    try:
        yield
    except OSError as error:
        place = error.filename if error.filename is not None else runtime.data_dir
        raise EmbeddedServerError(one_line(f"{place}: {error.strerror or error}; {ADVICE}")) from None
    except EmbeddedServerError as error:
        raise EmbeddedServerError(one_line(str(error))) from None
