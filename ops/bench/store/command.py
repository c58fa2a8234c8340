"""Programs as people start them: how long they take, and the most memory that they have."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import psutil

from ops.bench.limits.stand import Broken

SAMPLE_S = 0.01


class Ran(NamedTuple):
    """A program that has ended well: seconds from start to end, peak RSS in MB, its stdout unless that was a file."""

    seconds: float
    peak_mb: float
    out: str


def mimoq(*arguments: str) -> list[str]:
    """The command line of mimoq in this environment."""
    script = Path(sys.executable).with_name("mimoq")
    program = [str(script)] if script.exists() else [sys.executable, "-P", "-m", "producers"]
    return [*program, *arguments]


def run(argv: Sequence[str], environment: Mapping[str, str], out: IO[bytes] | None = None) -> Ran:
    """Runs a program to its end. Raises `Broken` when that is not a good one."""
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as errors:
        began = time.monotonic()
        process = subprocess.Popen(
            argv, env=dict(environment), stdin=subprocess.DEVNULL, stdout=out or said, stderr=errors
        )
        try:
            with Peak(process.pid) as peak:
                status = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
        seconds = time.monotonic() - began
        if status != 0:
            errors.seek(0)
            raise Broken(f"{Path(argv[0]).name} ended with {status}: {errors.read()[-300:].decode(errors='replace')}")
        said.seek(0)
        return Ran(seconds, peak.most_mb, said.read().decode().strip())


class Peak:
    """The most memory that a process has while this is open, in MB."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.most_mb = 0.0

    def _watch(self) -> None:
        with contextlib.suppress(psutil.Error, OSError):
            while True:
                self.most_mb = max(self.most_mb, resident_mb(self._process))
                if self._over.wait(SAMPLE_S):
                    return

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def resident_mb(process: psutil.Process) -> float:
    """A process's most memory so far where the system tells it, else what it has at present."""
    # Not by the child's `ru_maxrss`: that counts what its parent had when it was forked.
    with contextlib.suppress(FileNotFoundError):
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    return float(process.memory_info().rss / 1e6)
