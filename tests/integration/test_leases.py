"""The life of jobs in the store, in any order of events: a model of what may be, checked against a real Valkey."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import hypothesis.strategies as st
import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule, run_state_machine_as_test

from jobs import keys, leases
from jobs.connections import connect, connect_async
from jobs.errors import StoreUnavailable
from jobs.leases import End, Job
from jobs.requests import CHAT, Request
from jobs.results import About, Failure, Usage, failure_payload, success_payload
from jobs.scripts import Script
from jobs.states import BatchState, JobState
from jobs.store import NewBatch, Store

LONG_S = 60.0
SHORT_S = 0.02
LANE_LABELS = (("bulk", ""), ("bulk", "here"), ("interactive", ""))

_sweep = Script("sweep")


def run(work: Callable[[Any], Coroutine[Any, Any, Any]], url: str) -> Any:
    """Runs `work` with an async client of the store."""

    async def main() -> Any:
        client = connect_async(url)
        try:
            return await work(client)
        finally:
            await client.aclose()

    return asyncio.run(main())


def requests(count: int) -> list[Request]:
    return [Request(CHAT, b'{"messages":[],"n":%d}' % n, f"c{n}") for n in range(count)]


def ending(job: Job, letter: str, calls: int = 1, note: str = "") -> End:
    """An end with usage 3 + 2 tokens; `note` makes its payload another one."""
    usage = Usage(3, 2, 1, 0, 5)
    about = About(job.request.custom_id, CHAT, usage, [], 200)
    if letter == "s":
        return End(job, "s", success_payload(job.job_id, b'{"answer":"%s"}' % note.encode(), about, False), calls, usage)
    failed = About(job.request.custom_id, CHAT, usage, [], 400, error=Failure("bad", note, 400))
    return End(job, "f", failure_payload(job.job_id, failed, False), calls, usage)


def redis_time(client: Any) -> float:
    seconds, microseconds = client.time()
    return float(seconds + microseconds / 1e6)


def wait_until(client: Any, then: float) -> None:
    """Waits until the server's clock says that `then` is past."""
    while redis_time(client) <= then:
        time.sleep(0.001)


def leftovers(client: Any) -> set[str]:
    """Keys that must be gone when every batch is over."""
    gone = ("lease:", "leases", "open", "due", "deadlines", "closing", "lane:", "staged:")
    parts = (":ready", ":claims", ":retries", ":history")
    names = {name.decode().removeprefix(keys.PREFIX) for name in client.keys(keys.PREFIX + "*")}
    return {name for name in names if name.startswith(gone) or name.endswith(parts)}
