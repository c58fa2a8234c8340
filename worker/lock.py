"""A lock in Redis that one of all workers holds, and that ends by itself after its holder.

What goes wrong: a holder stands still until its lock is another's; both believe they hold it until the first asks again.
What is done under such a lock must bear that.
"""

from __future__ import annotations

from typing import Any

from jobs.scripts import Script

_lock = Script("lock")


class Lock:
    """One worker's hand on the lock `key`, which lasts `seconds` from each `hold`."""

    def __init__(self, client: Any, key: str, worker_id: str, seconds: float) -> None:
        self._client = client
        self._key = key
        self._id = worker_id
        self._ms = int(seconds * 1000)

    async def hold(self) -> bool:
        """Takes the lock, or keeps it; whether this worker holds it now."""
        return bool(await _lock(self._client, [self._key], [self._id, self._ms]))

    async def release(self) -> None:
        """Gives it back, if it is held."""
        await _lock(self._client, [self._key], [self._id, 0])
