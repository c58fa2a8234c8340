"""The rows of a run in its two files: which are there already, and where each new one goes."""

from __future__ import annotations

from pathlib import Path

from jobs.errors import UsageError
from jobs.requests import InvalidLine
from jobs.results import Usage, error_line
from jobs.states import LETTERS, JobState
from producers.follow import Ended
from producers.output import INVALID, OutputFile


class Rows:
    """The output and the error file of one batch. `written` has a bit for each job with a row in either."""

    def __init__(self, output: Path, errors: Path, identity: str) -> None:
        self._output = OutputFile(output, identity)
        self._errors = OutputFile(errors, identity)
        self._answered = bytearray()
        self._failed = bytearray()
        self._invalid: set[int] = set()
        self.written = bytearray()

    def open(self, *, overwrite: bool, fresh: bool) -> None:
        """Looks at what the files hold and opens them for more; `fresh` begins both anew.

        Raises `UsageError` when one holds rows of something else, unless told to overwrite it.
        """
        self._answered, _ = self._look(self._output, overwrite, fresh)
        self._failed, self._invalid = self._look(self._errors, overwrite, fresh)
        self.written = bytearray(self._answered)
        self._merge(self._failed)

    def _look(self, file: OutputFile, overwrite: bool, fresh: bool) -> tuple[bytearray, set[int]]:
        begin_anew = fresh and overwrite
        found, invalid = bytearray(), set[int]()
        if not begin_anew:
            try:
                found, invalid = file.scan()
            except UsageError:
                if not overwrite:
                    raise
                begin_anew = True
        if begin_anew or fresh:
            file.truncate()
            return bytearray(), set()
        file.mend()
        return found, invalid

    def _merge(self, bits: bytearray) -> None:
        if len(bits) > len(self.written):
            self.written.extend(bytes(len(bits) - len(self.written)))
        for place, byte in enumerate(bits):
            self.written[place] |= byte

    def states(self, total: int) -> bytes:
        """A letter for each job that has a row, NUL for others; empty when there is no row."""
        if not any(self.written):
            return b""
        states = bytearray(total)
        for bits, letter in ((self._answered, LETTERS[JobState.SUCCEEDED]), (self._failed, LETTERS[JobState.FAILED])):
            for place, byte in enumerate(bits):
                for bit in range(8) if byte else ():
                    index = place * 8 + bit
                    if byte >> bit & 1 and index < total:
                        states[index] = letter[0]
        return bytes(states)

    def usage(self) -> Usage:
        """What the answers in the output used."""
        return self._output.usage() if any(self._answered) else Usage()

    def forget_failed(self) -> None:
        """Takes the rows of failed jobs out of the error file, to be written again as they end; bad lines stay."""
        self._errors.keep_invalid()
        for place, byte in enumerate(self._failed):
            self.written[place] &= ~byte & 0xFF
        self._failed = bytearray()

    def write(self, ended: list[Ended]) -> None:
        """Writes rows of ended jobs; one whose result is no longer kept gets none, and no bit in `written`.

        Raises `MimoqError` when a disk is full; the files then hold whole lines only.
        """
        for row in ended:
            if row.stored is None:
                self.written[row.index >> 3] &= ~(1 << (row.index & 7)) & 0xFF
        kept = [row for row in ended if row.stored is not None]
        self._output.write([row.line() for row in kept if row.state is JobState.SUCCEEDED])
        self._errors.write([row.line() for row in kept if row.state is not JobState.SUCCEEDED])

    def invalid(self, batch_id: str, number: int, line: InvalidLine) -> None:
        """Writes the row of a bad line, once."""
        if number not in self._invalid:
            self._invalid.add(number)
            row = error_line(
                f"{batch_id}-{INVALID}-{number}", line.custom_id, "invalid_request", f"line {number}: {line}"
            )
            self._errors.write([row])

    def count(self) -> int:
        """Jobs that have a row."""
        return sum(byte.bit_count() for byte in self.written)

    def close(self) -> None:
        """Makes the files safe and closes them."""
        self._output.close()
        self._errors.close()
