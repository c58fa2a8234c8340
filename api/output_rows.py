"""The output and error files of the batch protocols: made of stored results whenever they are read, nothing is copied.

Rows stand in the order in which their jobs ended. Of a batch that runs the output only grows, so a line of it keeps its
number; a failed job that is queued again leaves the error file, and comes back where it ends again.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

from jobs import keys
from jobs.connections import redis_errors
from jobs.lines import answer_line
from jobs.results import StoredResult, message_line, nameless, output_line
from jobs.states import LETTERS, JobState, job_id
from jobs.store import READ_JOBS, BatchStatus, Store

if TYPE_CHECKING:
    from api.core import Core

#: Jobs that succeeded, those that ended otherwise, or both.
Part = Literal["output", "error", "all"]
#: Makes the lines of some jobs of a batch.
Block = Callable[[Store, BatchStatus, Sequence[int]], bytes]

_ENDS: Final = b"".join(LETTERS.values())
_SUCCEEDED: Final = LETTERS[JobState.SUCCEEDED]
_LETTERS: Final[dict[Part, bytes]] = {"output": _SUCCEEDED, "error": _ENDS.replace(_SUCCEEDED, b""), "all": _ENDS}
#: For `bytes.translate`: 1 for the letters of a part, 0 for all else.
_WANTED: Final = {part: bytes(byte in letters for byte in range(256)) for part, letters in _LETTERS.items()}


def rows(store: Store, batch_id: str, part: Part, start: int = 0) -> array[int]:
    """Indexes of the ended jobs of this part in the order of their ends, each once: at its last end, if that is among those
    from `start` on.

    Four bytes a job. What is no longer kept has none.
    """
    states, done = store.patience.call(_ends, store.client, batch_id)
    ends = array("I", done)
    if sys.byteorder == "big":
        ends.byteswap()
    left = bytearray(states.translate(_WANTED[part]))
    found = array("I")
    for index in reversed(ends[start:]):  # one that was queued again and ended again stands there twice
        if left[index]:
            left[index] = 0
            found.append(index)
    found.reverse()
    return found


def _ends(client: Any, batch_id: str) -> tuple[bytes, bytes]:
    """The states and the order of ends at one moment: an end of a job queued again must not take an earlier one's place."""
    with redis_errors():
        pipe = client.pipeline(transaction=True)
        pipe.get(keys.states(batch_id))
        pipe.get(keys.done(batch_id))
        states, done = pipe.execute()
    return bytes(states or b""), bytes(done or b"")


def openai_block(store: Store, status: BatchStatus, indexes: Sequence[int]) -> bytes:
    """The lines of these jobs in an OpenAI batch output or error file."""
    batch_id = status.batch_id
    packed = store.packed(batch_id, indexes)
    lines = {index: answer_line(job_id(batch_id, index), one) for index, one in zip(indexes, packed, strict=True)}
    answered = [index for index, line in lines.items() if line is not None]
    # After the results: one whose job was queued again meanwhile has no state any more.
    for index, state in zip(answered, store.states_of(batch_id, answered), strict=True):
        if state is None:
            lines[index] = b""
    rest = [index for index, line in lines.items() if line is None]
    for index, custom_id, stored, state in _ended(store, status, rest):
        lines[index] = output_line(job_id(batch_id, index), custom_id, stored, state)
    return b"".join(line for line in lines.values() if line is not None)


def message_block(store: Store, status: BatchStatus, indexes: Sequence[int]) -> bytes:
    """The lines of these jobs in the results of an Anthropic message batch."""
    return b"".join(
        message_line(custom_id, stored, state) for _, custom_id, stored, state in _ended(store, status, indexes)
    )


def _ended(
    store: Store, status: BatchStatus, indexes: Sequence[int]
) -> Iterator[tuple[int, str | None, StoredResult | None, JobState]]:
    """Index, custom id, result and state of these jobs, without those that have been queued again meanwhile."""
    batch_id = status.batch_id
    found = list(indexes)
    results = _results(store, batch_id, found)
    # After the results: one that is not there because its job was queued again has no state any more.
    states = store.states_of(batch_id, found)
    unnamed = [index for index, stored in zip(found, results, strict=True) if nameless(stored)]
    requests = store.requests(batch_id, unnamed, status.slice_size) if unnamed else {}
    for index, stored, state in zip(found, results, states, strict=True):
        if state is None:
            continue
        if (request := requests.get(index)) is not None:
            custom_id = request.custom_id
        else:
            custom_id = stored.mimoq.custom_id if stored is not None and stored.mimoq is not None else None
        yield index, custom_id, stored, state


def _results(store: Store, batch_id: str, indexes: list[int]) -> list[StoredResult | None]:
    """Their results; what somebody spoilt is taken for one that is no longer kept."""
    try:
        return store.results(batch_id, indexes)
    except ValueError:
        if len(indexes) == 1:
            return [None]
        half = len(indexes) // 2
        return _results(store, batch_id, indexes[:half]) + _results(store, batch_id, indexes[half:])


async def stream(core: Core, status: BatchStatus, indexes: Sequence[int], block: Block) -> AsyncIterator[bytes]:
    """The lines of these jobs, some jobs at a time."""
    for some in _slices(indexes):
        yield await core.streams.call(lambda store: block(store, status, some))  # noqa: B023  awaited at once


def size(store: Store, status: BatchStatus, indexes: Sequence[int], block: Block) -> int:
    """Bytes of the lines of these jobs; holds those of some jobs at a time."""
    return sum(len(block(store, status, some)) for some in _slices(indexes))


def _slices(indexes: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(indexes), READ_JOBS):
        yield indexes[start : start + READ_JOBS]
