"""Following a batch: its results in the order in which its jobs end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

from jobs.connections import redis_errors
from jobs.errors import StoreUnavailable
from jobs.lines import answer_line
from jobs.results import StoredResult, nameless, output_line
from jobs.states import BatchState, JobState, job_id
from jobs.store import Store

#: Seconds a follower waits for a message before it looks by itself.
LOOK_S = 1.0
#: Results that are read in one round trip: the first ones, and later as many as have about these bytes by the size of the
#: last, up to that many.
FIRST_JOBS = 50
BLOCK_BYTES = 4 << 20
MANY_JOBS = 500

T = TypeVar("T")
#: Index of a job, and how it ended.
End = tuple[int, JobState]


@dataclass(frozen=True, slots=True)
class Ended:
    """One ended job of a batch; `stored` is None when its result is no longer kept."""

    batch_id: str
    index: int
    state: JobState
    custom_id: str | None
    stored: StoredResult | None = field(repr=False)

    @property
    def job_id(self) -> str:
        return job_id(self.batch_id, self.index)

    def line(self) -> bytes:
        """The job's line of an OpenAI batch output or error file."""
        return output_line(self.job_id, self.custom_id, self.stored, self.state)


class Follower:
    """Reads the ends of a batch's jobs; each job comes once, with its latest end.

    `seen` holds a bit for each index that has come, or that the caller does not want.
    """

    def __init__(self, store: Store, batch_id: str, seen: bytearray | None = None) -> None:
        self._store = store
        self.batch_id = batch_id
        self.slice_size = store.status(batch_id).slice_size
        self._position = 0
        self._many = FIRST_JOBS
        self._seen = seen if seen is not None else bytearray()

    def ready(self, most: int = MANY_JOBS) -> list[Ended] | None:
        """The next ends that have come, perhaps none of them new; None when there is nothing more at present."""
        came = self._came(most)
        if came is None:
            return None
        ended, position = came
        rows = self._rows(ended)
        # Only now, so that a store that went away in between is asked for the same again.
        self._take(ended, position, sum(len(row.stored.result) for row in rows if row.stored is not None))
        return rows

    def _came(self, most: int) -> tuple[list[End], int] | None:
        """The next ends, and the position behind them."""
        indexes = self._store.done(self.batch_id, self._position, min(most, self._many))
        if not indexes:
            return None
        # A job that ended, was queued again and ended again stands there twice, perhaps in one block.
        seen, size = self._seen, len(self._seen)
        fresh = [
            index for index in dict.fromkeys(indexes) if index >> 3 >= size or not seen[index >> 3] >> (index & 7) & 1
        ]
        states = self._store.states_of(self.batch_id, fresh)
        # One without a state is queued again; its next end comes later.
        ended = [(index, state) for index, state in zip(fresh, states, strict=True) if state is not None]
        return ended, self._position + len(indexes)

    def _take(self, ended: list[End], position: int, size: int) -> None:
        """Goes on behind these, whose results have `size` bytes."""
        if ended:
            self._many = max(1, min(MANY_JOBS, BLOCK_BYTES * len(ended) // max(size, 1)))
        self._position = position
        mark(self._seen, *[index for index, _ in ended])

    def _rows(self, ended: list[End]) -> list[Ended]:
        found = self._store.results(self.batch_id, [index for index, _ in ended])
        unnamed = [index for (index, _), stored in zip(ended, found, strict=True) if nameless(stored)]
        requests = self._store.requests(self.batch_id, unnamed, self.slice_size) if unnamed else {}
        rows = []
        for (index, state), stored in zip(ended, found, strict=True):
            if index in requests:
                custom_id = requests[index].custom_id
            else:
                custom_id = stored.mimoq.custom_id if stored is not None and stored.mimoq is not None else None
            rows.append(Ended(self.batch_id, index, state, custom_id, stored))
        return rows

    def all_ready(self) -> Iterator[Ended]:
        """Every end that has come by now."""
        while (rows := self.ready()) is not None:
            yield from rows

    def lines(self) -> Iterator[bytes]:
        """The output lines of every end that has come by now, many at a time."""
        while (came := self._came(MANY_JOBS)) is not None:
            ended, position = came
            packed = self._store.packed(self.batch_id, [index for index, _ in ended])
            lines = [
                answer_line(job_id(self.batch_id, index), result)
                for (index, _), result in zip(ended, packed, strict=True)
            ]
            others = iter(self._rows([end for end, line in zip(ended, lines, strict=True) if line is None]))
            block = b"".join([next(others).line() if line is None else line for line in lines])
            self._take(ended, position, len(block))
            yield block

    def followed(self, what: Callable[[], Iterator[T]]) -> Iterator[T]:
        """What this gives of the ends that have come by now, again and again until the batch is finished."""
        with Listener(self._store, self.batch_id) as listener:
            while True:
                finished = self._store.status(self.batch_id).state is BatchState.FINISHED
                yield from what()
                if finished:
                    return
                listener.wait(LOOK_S)

    def follow(self) -> Iterator[Ended]:
        """Every end, until the batch is finished."""
        return self.followed(self.all_ready)


class Listener:
    """Waits for messages of a batch; a hint when to look, never the truth, so a lost connection only costs time."""

    def __init__(self, store: Store, batch_id: str) -> None:
        self._store = store
        self._batch_id = batch_id
        self._pubsub: Any = None

    def wait(self, timeout_s: float) -> None:
        """Returns at the next message, after `timeout_s`, or sooner."""
        end = time.monotonic() + timeout_s
        try:
            if self._pubsub is None:
                self._pubsub = self._store.subscribe(self._batch_id)
            with redis_errors():
                self._pubsub.get_message(timeout=timeout_s)
        except StoreUnavailable:
            self.close()
            time.sleep(max(0.0, end - time.monotonic()))

    def close(self) -> None:
        """Gives the connection back."""
        if self._pubsub is not None:
            pubsub, self._pubsub = self._pubsub, None
            pubsub.close()

    def __enter__(self) -> Listener:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def mark(bits: bytearray, *indexes: int) -> None:
    """Sets bits, growing the array as needed."""
    missing = (max(indexes, default=-1) >> 3) + 1 - len(bits)
    if missing > 0:
        bits.extend(bytes(missing))
    for index in indexes:
        bits[index >> 3] |= 1 << (index & 7)
