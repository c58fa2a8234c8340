"""Real `mimoq` commands in a folder of their own, and every process that comes of them."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil

from tests.waiting import wait_for

#: Seconds a command may take; one that hangs fails its test before the suite's patience is gone.
PATIENCE_S = 60.0


class Command:
    """One `mimoq` process; what it says goes to files, so that it never waits for a reader."""

    def __init__(self, box: Box, args: tuple[str, ...], stdin: bytes | None, env: dict[str, str]) -> None:
        place = box.folder / "said" / secrets.token_hex(4)
        place.mkdir(parents=True)
        self.out_file, self.err_file = place / "out", place / "err"
        given = place / "in"
        given.write_bytes(stdin or b"")
        with self.out_file.open("wb") as out, self.err_file.open("wb") as err, given.open("rb") as source:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "producers", *args],
                cwd=box.folder,
                env=env,
                stdin=source,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        self._args = args

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def out(self) -> str:
        return self.out_file.read_text()

    @property
    def err(self) -> str:
        return self.err_file.read_text()

    def wait(self, status: int | None = None) -> Command:
        """Waits for its end; with `status`, asserts that it ended so."""
        try:
            found = self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self._args} still runs\n{self.err}") from None
        assert "Traceback" not in self.err, self.err
        assert status is None or found == status, f"{self._args} ended with {found}\n{self.err}"
        return self

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def heard(self, text: str) -> None:
        """Waits until it has said `text` on stderr."""
        wait_for(lambda: text in self.err or self.process.poll() is not None, what=f"{text!r} on stderr")
        assert text in self.err, self.err

    def summary(self) -> dict[str, Any]:
        """The one line on stdout of `mimoq run --json`, which must add up."""
        (line,) = self.out.splitlines()
        told: dict[str, Any] = json.loads(line)
        assert set(told) == {
            "batch",
            "total",
            "succeeded",
            "failed",
            "cancelled",
            "expired",
            "attempts",
            "usage",
            "elapsed_s",
        }
        usage = told["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert told["elapsed_s"] > 0
        return told


class Box:
    """A folder in which commands run, with settings of its own, and all their processes, wherever they went."""

    def __init__(self, folder: Path, **settings: str) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder.resolve()
        self._settings = {f"MIMOQ_{name.upper()}": value for name, value in settings.items()}
        self._commands: list[Command] = []

    def start(self, *args: str, stdin: bytes | None = None, **settings: str) -> Command:
        """Starts `mimoq ARGS`; settings are named without their prefix."""
        more = {f"MIMOQ_{name.upper()}": value for name, value in settings.items()}
        command = Command(self, args, stdin, {**os.environ, **self._settings, **more})
        self._commands.append(command)
        return command

    def run(self, *args: str, status: int | None = 0, stdin: bytes | None = None, **settings: str) -> Command:
        """Runs `mimoq ARGS` to its end, which must be `status`."""
        return self.start(*args, stdin=stdin, **settings).wait(status)

    def write(self, name: str, lines: Iterable[object]) -> Path:
        """A file of JSON lines."""
        path = self.folder / name
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    def prompts(self, count: int, name: str = "in.jsonl", word: str = "prompt") -> Path:
        """An input of `count` prompts, all different."""
        return self.write(name, ({"custom_id": f"{word}-{i}", "prompt": f"{word} {i}"} for i in range(count)))

    def rows(self, name: str = "in.out.jsonl") -> list[dict[str, Any]]:
        """The rows of an output file; every line must be whole."""
        return [json.loads(line) for line in (self.folder / name).read_bytes().splitlines(keepends=True)]

    def ids(self, name: str = "in.out.jsonl") -> list[str]:
        """The `custom_id` of each row, sorted."""
        return sorted(row["custom_id"] for row in self.rows(name))

    def lines(self, name: str = "in.out.jsonl") -> int:
        """Whole lines in a file that may be in the making, or not be there."""
        try:
            return (self.folder / name).read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0

    def processes(self, kind: str = "") -> list[psutil.Process]:
        """Live processes that came of the commands: those at work in the folder; `kind` is of their command line."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if (
                    process.status() != psutil.STATUS_ZOMBIE
                    and Path(process.cwd()).is_relative_to(self.folder)
                    and kind in " ".join(process.cmdline())
                ):
                    found.append(process)
        return found

    def kill(self, kind: str) -> None:
        """`kill -9` of the one process of this kind."""
        (process,) = self.processes(kind)
        process.kill()
        wait_for(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)

    def empty(self, *, but: int = 0) -> None:
        """Waits until no process is left, or only `but` of them."""
        wait_for(lambda: len(self.processes()) <= but, PATIENCE_S, f"the end of {self.processes()}")

    def forget(self) -> None:
        """Removes the data folder, once nobody uses it."""
        self.empty()
        shutil.rmtree(self.folder / ".mimoq")

    def close(self) -> None:
        """Ends what is left, by its pid."""
        end = time.monotonic() + 10
        while (left := self.processes()) and time.monotonic() < end:
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(signal.SIGKILL)
            for command in self._commands:
                command.process.poll()
        for command in self._commands:
            command.process.wait(10)


@contextlib.contextmanager
def opened(folder: Path, **settings: str) -> Iterator[Box]:
    """A box that is emptied at the end, whatever happened."""
    box = Box(folder, **settings)
    try:
        yield box
    finally:
        box.close()
