"""What a result backend is: where the results of jobs are kept, one synchronous object that any thread may call.

A result is handed over as the packed value of `jobs.results`; a backend that keeps it otherwise takes it apart. All
writes are idempotent, so one whose fate is unknown is made again. What goes wrong: the backend is away, then every call
raises `StoreUnavailable` with one line that names it and MIMOQ_RESULT_BACKEND, `StoreRefused` where waiting won't help.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from jobs.results import StoredResult

#: What every line about a backend that can't be had ends in.
HINT = "check MIMOQ_RESULT_BACKEND"


class Memory(NamedTuple):
    """Memory of a backend that has a limit: bytes it may use, and uses."""

    limit: int
    used: int


class ResultBackend(Protocol):
    """Where results are kept. Every call raises `StoreUnavailable` while that is away."""

    name: str
    """What it is called before people."""
    with_state: bool
    """Whether it is the store's own Redis: a result is then written in the step that ends its job, by the scripts."""
    compressed: bool
    """Whether values are kept as they come, so that they had better come compressed."""
    expires: bool
    """Whether each result goes at a time of its own; where not, `cleanup` takes away what is old."""

    def check(self) -> None:
        """Makes sure at a worker's start that results can be kept, and makes what is missing for it."""

    def read(self, job_ids: Sequence[str]) -> list[StoredResult | None]:
        """Results by job id, None where there is none. Raises `ValueError` for one that somebody spoilt."""

    def packed(self, job_ids: Sequence[str]) -> list[bytes | None] | None:
        """Packed results as they lie there, by job id; None where they are kept otherwise."""

    def write(self, results: Sequence[tuple[str, bytes]]) -> None:
        """Stores packed results by job id, each in the place of what was there; who waits for one is woken.

        Raises `ValueError` when it is there and refuses one of them for what that holds; the others may be stored then.
        """

    def delete(self, job_ids: Sequence[str]) -> None:
        """Deletes the results of these jobs."""

    def delete_failures(self, job_ids: Sequence[str]) -> None:
        """Deletes the results of these jobs but for answers, such as one that came meanwhile."""

    def keep(self, job_ids: Sequence[str]) -> None:
        """Lets the results of these jobs go at no time, where `expires`."""

    def expire(self, job_ids: Sequence[str], at: int) -> None:
        """Lets them go at this unix time, where `expires`."""

    def cleanup(self, ttl_s: float, kept: Sequence[str]) -> None:
        """Takes away results older than `ttl_s`, but not those of these batches, where it can tell; may take long."""

    def memory(self) -> Memory | None:
        """What it may use and uses of memory; None where there is no limit."""

    def close(self) -> None:
        """Ends its connections."""
