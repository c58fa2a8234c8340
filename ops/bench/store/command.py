"""Programs as people start them: how long they take, and the most memory that they have."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import psutil

from ops.bench.limits.stand import Broken
from ops.bench.peak import Peak, ever_mb


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
            with Peak(psutil.Process(process.pid), ever_mb) as peak:
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
