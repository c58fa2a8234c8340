"""What a row stands on: a stand of the harness's own latency and answers, and processes that end with the row."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import psutil

from ops.bench.calls.environments import environment
from ops.bench.calls.measure import CALLER, SIMULATOR, Watch
from ops.bench.limits.stand import Broken, Stand
from producers.service import Service

#: Both are the harness's own, so that figures of two runs are of the same work.
LATENCY_S, ANSWER_BYTES = 0.2, 1700
END_S = 10.0


@contextlib.contextmanager
def standing(*simulator: str, ledger: bool = False, **settings: object) -> Iterator[Stand]:
    """A stand; without `ledger` its `calls()` are not kept, since writing a line a call would slow the simulator."""
    fixed = ["--latency", str(LATENCY_S), "--answer-bytes", str(ANSWER_BYTES)]
    if not ledger:
        fixed += ["--ledger", os.devnull]
    with Stand(*fixed, *simulator, log_level="warning", **settings) as stand:
        yield stand


def valkey(stand: Stand) -> psutil.Process:
    """The stand's Valkey."""
    return psutil.Process(stand.client.info("server")["process_id"])


def watch(stand: Stand, callers: Sequence[int], **others: psutil.Process) -> Watch:
    """A watch over the processes that make the calls, the simulator, and others of the row; `load` counts for nothing."""
    groups = {name: [process] for name, process in others.items()}
    return Watch(
        stand.url, {CALLER: [psutil.Process(pid) for pid in callers], SIMULATOR: [_child("ops.simulator")], **groups}
    )


def _child(module: str) -> psutil.Process:
    for child in psutil.Process().children():
        if module in child.cmdline():
            return child
    raise Broken(f"{module} does not run")


def alive(workers: Sequence[subprocess.Popen[bytes]], *others: Process) -> None:
    """Raises `Broken` when a worker has ended, or another process of the row has failed."""
    for process in others:
        process.alive()
    for worker in workers:
        if worker.poll() is not None:
            raise Broken(f"a worker ended with {worker.returncode}")


@contextlib.contextmanager
def api(stand: Stand) -> Iterator[tuple[psutil.Process, int]]:
    """An API process over the stand's store, and its port."""
    settings = {"base_url": stand.url, "api_key": "bench", "data_dir": stand.folder / "data", "log_level": "warning"}
    variables = {f"MIMOQ_{name.upper()}": str(value) for name, value in settings.items()}
    service = Service("the API", ["api", "--exit-with-stdin"], 0, stand.folder / "api.log", variables)
    try:
        port = urlsplit(service.wait()).port or 0
        yield _child("api"), port
    finally:
        service.stop()


class Process(NamedTuple):
    """A process of the row."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def alive(self) -> None:
        """Raises `Broken` when it has failed; one that is done is not."""
        if self.process.poll():
            raise Broken(f"it ended with {self.process.returncode}: {self.last_line()}")

    def done(self, seconds: float) -> None:
        """Waits for its end. Raises `Broken` when that is a bad one, or late."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Broken(f"not done within {seconds:.0f} s") from None
        self.alive()

    def last_line(self) -> str:
        """The last that it has said."""
        return (self.log.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1][:200]


@contextlib.contextmanager
def process(
    argv: Sequence[str], variables: Mapping[str, str], folder: Path, told: bytes | None = None
) -> Iterator[Process]:
    """A process that gets `told` on its standard input; without it, that is open as long as this process lives."""
    log = folder / f"process{time.monotonic_ns()}.log"
    # Not our settings, nor what would lead another environment's interpreter to our modules.
    kept = {name: value for name, value in environment().items() if not name.startswith("MIMOQ_")}
    with log.open("wb") as file:
        started = subprocess.Popen(
            argv,
            env={**kept, **variables},
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    assert started.stdin is not None
    try:
        if told is not None:
            with started.stdin as stdin:
                stdin.write(told)
        yield Process(started, log)
    finally:
        started.terminate()
        try:
            started.wait(END_S)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()
        with contextlib.suppress(BrokenPipeError):
            started.stdin.close()
