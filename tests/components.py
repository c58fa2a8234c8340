"""The real components that tests run against; one that is missing fails in CI and skips elsewhere."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NoReturn

import pytest

from jobs.guard import GuardError, server_program
from jobs.runtime import ask
from tests.waiting import wait_for


def require(component: str, reason: str) -> NoReturn:
    """Ends the test that can't run: skipped, but failed where CI=true, since there nothing may go untested."""
    message = f"{component} is missing: {reason}"
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(message, pytrace=False)
    pytest.skip(message)


class Valkey:
    """A Valkey server of the tests' own: on a unix socket alone, keeping nothing on disk."""

    def __init__(self) -> None:
        """Starts it and returns once it answers; skips (in CI: fails) the test where there is no server program."""
        try:
            program = server_program()
        except GuardError as error:
            require("valkey", str(error))
        # Not under pytest's own folders: the address of a unix socket ends at 107 bytes.
        self._folder = Path(tempfile.mkdtemp(prefix="mimoq-test-", dir="/tmp"))
        self._socket = self._folder / "valkey.sock"
        self._log = self._folder / "valkey.log"
        self.url = f"unix://{self._socket}"
        options = (
            f"--port 0 --unixsocketperm 700 --save --appendonly no --unixsocket {self._socket} --dir {self._folder}"
        )
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [program, *options.split()], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            wait_for(self._answers, what="an answer of Valkey")
        except BaseException:
            self.stop()
            raise

    def _answers(self) -> bool:
        assert self._process.poll() is None, f"Valkey ended: {self._log.read_text(errors='replace')[-1000:]}"
        with contextlib.suppress(OSError):
            return ask(self._socket, "PING") == "+PONG"
        return False

    def flush(self) -> None:
        """Removes everything in it."""
        assert ask(self._socket, "FLUSHALL SYNC", timeout_s=10.0) == "+OK"

    def stop(self) -> None:
        """Ends it at once and removes its folder."""
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)
