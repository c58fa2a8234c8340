"""The input of a command: opened so that it can be read twice, and judged before anything is submitted."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from jobs.errors import MimoqError, UsageError
from jobs.settings import Settings
from producers.reader import Defaults, Report, validate


def say(line: str) -> None:
    """A line for a person, on stderr."""
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def opened_input(source: str, data_dir: Path) -> Iterator[tuple[BinaryIO, Path | None]]:
    """The input as a file that can be read twice; standard input is spooled to the data folder.

    Yields `(file, its path or None)`. Raises `UsageError` with one line.
    """
    if source == "-":
        if sys.stdin is None:
            raise UsageError("standard input is closed")
        try:
            data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            spool: Any = tempfile.TemporaryFile(dir=data_dir)  # noqa: SIM115 - closed below, with its errors
        except OSError as error:
            raise UsageError(f"{data_dir}: {error.strerror}; choose another --data-dir") from None
        try:
            try:
                shutil.copyfileobj(sys.stdin.buffer, spool, 1 << 20)
                spool.flush()
            except OSError as error:
                raise MimoqError(f"standard input can't be kept in {data_dir}: {error.strerror}") from None
            yield spool, None
        finally:
            with contextlib.suppress(OSError):  # what a full disk left in its buffer
                spool.close()
        return
    path = Path(source)
    try:
        if path.is_dir():
            raise UsageError(f"{path} is a folder; give a file of JSON lines")
        file = path.open("rb")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    with file:
        if not file.seekable():
            raise UsageError(f"{path} can be read only once; give it as standard input: mimoq run - < {path}")
        yield file, path


def judge(file: BinaryIO, defaults: Defaults, settings: Settings, skip_invalid: bool, quiet: bool = False) -> Report:
    """One full pass over the input; says what is wrong. Raises `UsageError` when nothing may be submitted."""
    file.seek(0)
    try:
        report = validate(file, defaults, settings.max_line_bytes)
    except OSError as error:
        raise UsageError(f"the input can't be read: {error.strerror}") from None
    if not quiet:
        for warning in report.warnings:
            say(f"warning: {warning}")
    if report.ok or (skip_invalid and report.total):
        return report
    for problem in report.problems:
        say(problem)
    if report.bad > len(report.problems):
        say(f"... and {report.bad - len(report.problems):,} more")
    if report.bad:
        hint = "" if skip_invalid or not report.total else "; mend them, or run the good ones with --skip-invalid"
        raise UsageError(f"{report.bad:,} bad lines, nothing was submitted{hint}")
    raise UsageError("nothing was submitted")
