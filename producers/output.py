"""The output and error files of a run: lines appended as jobs end, each job once, whatever was cut before.

What goes wrong: a half-written last line is cut off when the file is opened again; a file that this run's batch did not
write is refused; a full disk leaves whole lines only, and a rerun goes on; two runs never write one file at a time.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
import tempfile
from pathlib import Path
from typing import BinaryIO

import msgspec

from jobs.errors import MimoqError, UsageError
from jobs.results import Usage
from producers.follow import mark

INVALID = "invalid"
_ROW = re.compile(rb'\{"id":"batch_req_([0-9a-f]+)-(\d+|invalid-\d+)",')
_TAIL_BYTES = 1 << 16


class _Details(msgspec.Struct):
    reasoning_tokens: int | None = 0
    cached_tokens: int | None = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = 0
    completion_tokens: int | None = 0
    total_tokens: int | None = 0
    input_tokens: int | None = 0
    output_tokens: int | None = 0
    cache_read_input_tokens: int | None = 0
    cache_creation_input_tokens: int | None = 0
    completion_tokens_details: _Details | None = None
    prompt_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None


class _Body(msgspec.Struct):
    usage: _Usage | None = None


class _Response(msgspec.Struct):
    body: _Body | None = None


class _AnswerRow(msgspec.Struct):
    response: _Response | None = None


class OutputFile:
    """One file of rows that a batch of `identity` writes; every row begins with the id of its job."""

    def __init__(self, path: Path, identity: str) -> None:
        self.path = path
        self._identity = identity.encode()
        self._file: BinaryIO | None = None
        self._end = 0

    def scan(self) -> tuple[bytearray, set[int]]:
        """What the file holds: a bit for each job's index, and the numbers of invalid lines.

        Raises `UsageError` when a row is not of this batch's identity, or another run writes the file.
        """
        bits, invalid = bytearray(), set[int]()
        if not self._regular():
            return bits, invalid
        self._open()  # and lock it: what is read here must not grow meanwhile
        with self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    if not _begins_like_ours(line):
                        raise self._foreign()
                    break
                row = _ROW.match(line)
                if row is None or not row[1].startswith(self._identity):
                    raise self._foreign()
                if row[2].startswith(b"invalid"):
                    invalid.add(int(row[2][8:]))
                else:
                    mark(bits, int(row[2]))
        return bits, invalid

    def usage(self) -> Usage:
        """The sum of the usage of the answers in the file."""
        total = Usage()
        if not self._regular():
            return total
        decode = msgspec.json.Decoder(_AnswerRow).decode
        with self.path.open("rb") as file:
            for line in file:
                try:
                    row = decode(line)
                except msgspec.MsgspecError:
                    continue
                if row.response is not None and row.response.body is not None and row.response.body.usage is not None:
                    total += _usage(row.response.body.usage)
        return total

    def _regular(self) -> bool:
        try:
            return stat.S_ISREG(self.path.stat().st_mode)
        except FileNotFoundError:
            return False

    def _foreign(self) -> UsageError:
        return UsageError(
            f"{self.path} holds something that this batch did not write; give another file with -o, or --overwrite"
        )

    def mend(self) -> None:
        """Cuts off a half-written last line. Raises `UsageError` when another run writes the file."""
        if self._regular():
            self._open()
            self._shorten(_whole(self.path))

    def truncate(self) -> None:
        """Empties the file, if there is one. Raises `UsageError` when another run writes it."""
        if self._regular():
            self._open()
            self._shorten(0)

    def keep_invalid(self) -> None:
        """Takes out every row but those of invalid lines."""
        if not self._regular():
            return
        with tempfile.TemporaryFile() as kept:
            with self.path.open("rb") as file:
                for line in file:
                    if (row := _ROW.match(line)) is not None and row[2].startswith(b"invalid"):
                        kept.write(line)
            kept.seek(0)
            self.truncate()
            while block := kept.read(_TAIL_BYTES):
                self.write([block])

    def _open(self) -> None:
        """Opens and locks the file for appending; it is made only when there is something to write."""
        if self._file is None:
            try:
                self._file = self.path.open("ab")
            except OSError as error:
                raise UsageError(f"{self.path}: {error.strerror}") from None
            try:
                fcntl.flock(self._file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._file.close()
                self._file = None
                raise UsageError(f"{self.path} is being written by another mimoq run") from None
            except OSError:
                pass  # a device or pipe has no lock

    def _shorten(self, end: int) -> None:
        assert self._file is not None
        if self._regular():
            os.ftruncate(self._file.fileno(), end)
        self._end = end

    def write(self, lines: list[bytes]) -> None:
        """Appends whole lines. Raises `MimoqError` when they can't be written; the file then ends with a whole line."""
        if not lines:
            return
        if self._file is None:
            self._open()
            self._shorten(_whole(self.path) if self._regular() else 0)
        assert self._file is not None
        data = b"".join(lines)
        try:
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            self._cut()
            raise MimoqError(
                f"{self.path} can't be written ({error.strerror}); nothing is lost, run the same command again"
            ) from None
        self._end += len(data)

    def _cut(self) -> None:
        assert self._file is not None
        descriptor = os.dup(self._file.fileno())
        try:
            self._file.close()
        except OSError:
            pass  # what its buffer still held
        finally:
            if self._regular():
                os.ftruncate(descriptor, self._end)
            os.close(descriptor)
            self._file = None

    def close(self) -> None:
        """Makes the rows safe and closes the file. Raises `MimoqError` when the disk does not take them."""
        if self._file is not None:
            file, self._file = self._file, None
            try:
                if self._regular():
                    os.fsync(file.fileno())
            except OSError as error:
                raise MimoqError(
                    f"{self.path} can't be written ({error.strerror}); run the same command again"
                ) from None
            finally:
                file.close()


def _begins_like_ours(torn: bytes) -> bool:
    """Whether a torn last line may be the beginning of a row of ours."""
    begin = b'{"id":"batch_req_'
    return torn.startswith(begin) or begin.startswith(torn)


def _whole(path: Path) -> int:
    """The length of the file up to its last line break."""
    size = path.stat().st_size
    with path.open("rb") as file:
        end = size
        while end > 0:
            start = max(0, end - _TAIL_BYTES)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
    return 0


def _usage(usage: _Usage) -> Usage:
    # As the worker reads it. Anthropic counts what the cache gave, and what was written to it, beside input_tokens.
    cached = usage.cache_read_input_tokens or 0
    prompt = usage.prompt_tokens or (usage.input_tokens or 0) + cached + (usage.cache_creation_input_tokens or 0)
    completion = usage.completion_tokens or usage.output_tokens or 0
    details = usage.completion_tokens_details or usage.output_tokens_details or _Details()
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        reasoning_tokens=details.reasoning_tokens or 0,
        cached_tokens=cached or (usage.prompt_tokens_details or _Details()).cached_tokens or 0,
        total_tokens=usage.total_tokens or prompt + completion,
    )


def default_output(source: Path) -> Path:
    """Where the answers of an input file go by default."""
    return source.with_suffix(".out.jsonl")


def error_file(output: Path) -> Path:
    """Where failures go by default: the output's stem with `.errors.jsonl`."""
    return output.parent / f"{output.stem}.errors.jsonl"


def check_paths(source: Path | None, output: Path, errors: Path) -> None:
    """Raises `UsageError` where the files can't be what they are meant to be."""
    for path in (output, errors):
        try:
            if path.is_dir():
                raise UsageError(f"{path} is a folder; give a file")
            if not path.parent.is_dir():
                raise UsageError(f"{path.parent} does not exist; make it first, or give another file")
            place = path if path.exists() else path.parent
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}") from None
        if not os.access(place, os.W_OK):
            raise UsageError(f"{place} can't be written: give another file")
    if _same(output, errors):
        raise UsageError(f"{output} can't take answers and errors both; give another --errors file")
    if source is not None:
        for path in (output, errors):
            if _same(source, path):
                raise UsageError(f"{path} is the input; give another file")


def _same(one: Path, other: Path) -> bool:
    if one.exists() and other.exists():
        return one.samefile(other)
    return one.resolve() == other.resolve()
