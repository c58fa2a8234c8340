"""A process of another entry point that listens on a port and belongs to a command: the simulator, the API.

It prints `listening on <address>` when it can be called. Its standard input is a pipe whose other end the command holds, so
it ends when the command is gone, kill -9 included.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from jobs.errors import MimoqError, UsageError
from jobs.processes import Deaths, last_line, put_aside

#: Seconds that a service may take until it listens, on a machine that is busy.
START_S = 60.0
#: Seconds that a service gets to end, where its command gives it no others.
STOP_S = 5.0
RESTART_S = 0.2
LISTENING = b"listening on "


class Service:
    """One such process, and those that replace it at the same port.

    `name` is what messages call it, `argv` the module and its arguments but for the port; 0 is any that is free. What it
    says on stderr goes to `log`, None: nowhere; `variables` go over the environment.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        port: int = 0,
        log: Path | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self._name = name
        self._argv = [sys.executable, "-P", "-m", *argv]
        self._port = port
        self._log = log
        self._environment = {**os.environ, **(variables or {})}
        self._deaths = Deaths()
        self._start_at = 0.0
        self.url = ""
        self._start()

    def _start(self) -> None:
        if self._log is not None:
            put_aside(self._log)
        output = os.open(self._log or os.devnull, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            self._started_at = time.monotonic()
            self._process = subprocess.Popen(
                [*self._argv, "--port", str(self._port)],
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,
            )
        finally:
            os.close(output)

    def wait(self) -> str:
        """Its address, once it listens. Raises `MimoqError` when it does not; `UsageError` when it refuses to."""
        output = self._process.stdout
        assert output is not None
        if not self.url:
            readable, _, _ = select.select([output], [], [], START_S)
            line = output.readline() if readable else b""
            if not line.startswith(LISTENING):
                if readable and not line:  # it is ending by itself, and its status says why
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        self._process.wait(STOP_S)
                self.stop()
                refused = UsageError if self._process.returncode == UsageError.exit_code else MimoqError
                raise refused(f"{self._name} did not start{self._last_words()}")
            self.url = line.removeprefix(LISTENING).decode().strip()
            self._port = urlsplit(self.url).port or self._port
        return self.url

    def check(self) -> None:
        """Raises `MimoqError` when it has ended."""
        if self._process.poll() is not None:
            raise MimoqError(f"{self._name} has ended; run the same command again")

    def ensure(self) -> None:
        """Replaces it when it has died. Raises `MimoqError` when it keeps dying, or refuses its settings."""
        code = self._process.poll()
        if code is None:
            return
        now = time.monotonic()
        if self._start_at == 0.0:
            if self._deaths.too_many(self._started_at, code) or code == UsageError.exit_code:
                raise MimoqError(f"{self._name} ended with {code}{self._last_words()}")
            self._start_at = now + RESTART_S
        elif now >= self._start_at:
            self._close()
            self._start()
            self._start_at = 0.0

    def _last_words(self) -> str:
        return "" if self._log is None else f": {last_line(self._log)}"

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    def terminate(self) -> None:
        """Tells it to end."""
        if self.alive:
            self._process.terminate()

    def stop(self, patience_s: float = STOP_S) -> None:
        """Ends it, at once when it takes longer than `patience_s`."""
        self.terminate()
        try:
            self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._close()

    def _close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
