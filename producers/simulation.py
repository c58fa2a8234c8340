"""The MiMo simulator as a process that belongs to a command, for `--simulate`."""

from __future__ import annotations

import select
import subprocess
import sys
import time

from jobs.errors import MimoqError

START_S = 20.0
PREFIX = b"listening on "


class Simulation:
    """A simulator on a free loopback port; it ends with the command, however that ends."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "ops.simulator", "--port", "0", "--exit-with-parent"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.url = ""

    def wait(self) -> str:
        """Its address, once it listens. Raises `MimoqError` when it does not."""
        output = self._process.stdout
        assert output is not None
        end = time.monotonic() + START_S
        while not self.url:
            readable, _, _ = select.select([output], [], [], max(0.0, end - time.monotonic()))
            line = output.readline() if readable else b""
            if not line.startswith(PREFIX):
                self.stop()
                raise MimoqError("the simulator did not start; try `mimoq simulator` to see why")
            self.url = line.removeprefix(PREFIX).decode().strip()
        return self.url

    def check(self) -> None:
        """Raises `MimoqError` when it has ended."""
        if self._process.poll() is not None:
            raise MimoqError("the simulator has ended; run the same command again")

    def stop(self) -> None:
        """Ends the simulator."""
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
