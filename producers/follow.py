"""Following a batch: its results in the order in which its jobs end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from jobs.results import StoredResult, output_line
from jobs.states import BatchState, JobState, job_id
from jobs.store import READ_JOBS, Store, redis_errors

#: Seconds a follower waits for a message before it looks by itself.
LOOK_S = 1.0


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
        return output_line(self.job_id, self.custom_id, self.stored)


class Follower:
    """Reads the ends of a batch's jobs; each job comes once, with its latest end.

    `seen` holds a bit for each index that has come, or that the caller does not want.
    """

    def __init__(self, store: Store, batch_id: str, seen: bytearray | None = None) -> None:
        self._store = store
        self.batch_id = batch_id
        self.slice_size = store.status(batch_id).slice_size
        self._position = 0
        self._seen = seen if seen is not None else bytearray()

    def ready(self, limit: int = READ_JOBS) -> list[Ended] | None:
        """The next ends that have come, perhaps none of them new; None when there is nothing more at present."""
        indexes = self._store.done(self.batch_id, self._position, limit)
        if not indexes:
            return None
        fresh = []
        for index in indexes:
            if not self._marked(index):
                self._mark(index)
                fresh.append(index)
        states = self._store.states_of(self.batch_id, fresh)
        ended = []
        for index, state in zip(fresh, states, strict=True):
            if state is None:  # queued again since; its next end comes later
                self._unmark(index)
            else:
                ended.append((index, state))
        found = self._store.results(self.batch_id, [index for index, _ in ended])
        nameless = [
            index for (index, _), stored in zip(ended, found, strict=True) if stored is None or stored.mimoq is None
        ]
        requests = self._store.requests(self.batch_id, nameless, self.slice_size) if nameless else {}
        self._position += len(indexes)
        rows = []
        for (index, state), stored in zip(ended, found, strict=True):
            if stored is not None and stored.mimoq is not None:
                custom_id = stored.mimoq.custom_id
            else:
                custom_id = requests[index].custom_id if index in requests else None
            rows.append(Ended(self.batch_id, index, state, custom_id, stored))
        return rows

    def all_ready(self) -> Iterator[Ended]:
        """Every end that has come by now."""
        while (rows := self.ready()) is not None:
            yield from rows

    def follow(self) -> Iterator[Ended]:
        """Every end, until the batch is finished."""
        with redis_errors():
            pubsub = self._store.subscribe(self.batch_id)
            try:
                while True:
                    finished = self._store.status(self.batch_id).state is BatchState.FINISHED
                    yield from self.all_ready()
                    if finished:
                        return
                    pubsub.get_message(timeout=LOOK_S)
            finally:
                pubsub.close()

    def _marked(self, index: int) -> bool:
        return index >> 3 < len(self._seen) and bool(self._seen[index >> 3] >> (index & 7) & 1)

    def _mark(self, index: int) -> None:
        mark(self._seen, index)

    def _unmark(self, index: int) -> None:
        self._seen[index >> 3] &= ~(1 << (index & 7)) & 0xFF


def mark(bits: bytearray, index: int) -> None:
    """Sets one bit, growing the array as needed."""
    place = index >> 3
    if place >= len(bits):
        bits.extend(bytes(place + 1 - len(bits)))
    bits[place] |= 1 << (index & 7)
