"""Joins: a waiting call that is made again finds the job that it made before, instead of paying for another.

Calls alike may be meant: each makes its own job, and a call made again takes one that nobody waits for, else the one
that was waited for the longest time ago (enlist.lua: so it comes behind the call that it repeats). What has been answered
is taken off.
"""

from __future__ import annotations

import hashlib
from typing import Any

from jobs import keys
from jobs.connections import redis_errors
from jobs.scripts import Script

_join = Script("join")


def digest_of(tenant: str, endpoint: str, body: bytes) -> str:
    """What alike calls of a tenant share: 32 hex digits."""
    head = f"{tenant}\n{endpoint}\n".encode()
    return hashlib.blake2b(head + body, digest_size=16).hexdigest()


def join(client: Any, digest: str) -> str | None:
    """The batch of the job to wait for, if there is one; for where there is no room to make another."""
    with redis_errors():
        found = _join(client, [keys.PREFIX], [digest])
    return found.decode() or None


def left(client: Any, digest: str, batch_id: str) -> None:
    """Whoever waited has gone without an answer."""
    with redis_errors():
        client.zadd(keys.joins(digest), {batch_id: 0}, xx=True)


def answered(client: Any, digest: str, batch_id: str) -> None:
    """Whoever waited has the answer."""
    with redis_errors():
        client.zrem(keys.joins(digest), batch_id)
