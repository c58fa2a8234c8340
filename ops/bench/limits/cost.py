"""What the limiter costs: CPU of the worker that asks, and of the Valkey that answers."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

import uvloop

from jobs.connections import connect_async
from jobs.embedded import EmbeddedServer
from jobs.settings import load_settings
from ops.bench.limits.report import Row
from ops.bench.limits.stand import Broken
from worker.limiter import SETTLE, Grant, Limiter, Settlement

SECONDS = 10.0
JOBS_PER_S = 1_000
BLOCK = 50
EVERY_S = BLOCK / JOBS_PER_S
#: Blocks in flight at once: calls of 0.2 s.
IN_FLIGHT = 4
ESTIMATE = 400
USAGE = 350
MODEL = "model"
LANE = "bulk"
#: Every limit is given and looked at, and twice what is used.
RPM = 2 * 60 * JOBS_PER_S
TPM = RPM * ESTIMATE
MAX_IN_FLIGHT = 2 * IN_FLIGHT * BLOCK
OPENS_S = 60.0
CLIENT_MS = 0.05
SERVER_SHARE = 0.05


def cost(scale: float) -> list[Row]:
    """1,000 jobs a second, reserved and settled in blocks of 50 by one worker, with 200 in flight."""
    with (
        tempfile.TemporaryDirectory(prefix="mimoq-bench-", ignore_cleanup_errors=True) as folder,
        EmbeddedServer.open(Path(folder)) as server,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        client_s, server_s, took_s, jobs = runner.run(_measure(server.url, SECONDS * scale))
    client_ms = client_s / jobs * 1000
    share = server_s / jobs * JOBS_PER_S
    return [
        Row("CPU of the worker for a job, ms", f"< {CLIENT_MS}", f"{client_ms:.4f}", client_ms < CLIENT_MS),
        Row(
            f"CPU of Valkey at {JOBS_PER_S:,} jobs a second, share of a core",
            f"< {SERVER_SHARE:.0%}",
            f"{share:.2%}",
            share < SERVER_SHARE,
        ),
        Row("jobs reserved and settled", "", f"{jobs:,} in {took_s:.1f} s, {IN_FLIGHT * BLOCK} in flight"),
    ]


async def _measure(url: str, seconds: float) -> tuple[float, float, float, int]:
    """`(client's CPU seconds, server's, seconds, jobs)`."""
    client = connect_async(url)
    settings = load_settings(rpm=RPM, tpm=TPM, max_in_flight=MAX_IN_FLIGHT, redis_url=url)
    limiter = Limiter(client, settings, "account", "bench")
    flying: deque[Grant] = deque()
    try:
        await _open_window(limiter, client, flying)
        began, server_s, client_s = time.monotonic(), await _server_cpu(client), time.process_time()
        done = rounds = 0
        while time.monotonic() < began + seconds:
            done += await _round(limiter, client, flying)
            rounds += 1
            await asyncio.sleep(began + rounds * EVERY_S - time.monotonic())
        client_s = time.process_time() - client_s
        took_s = time.monotonic() - began
        if done < rounds * BLOCK:
            raise Broken(f"{rounds * BLOCK - done} of {rounds * BLOCK} jobs were held back by a limit")
        return client_s, await _server_cpu(client) - server_s, took_s, done
    finally:
        await client.aclose()


async def _open_window(limiter: Limiter, client: Any, flying: deque[Grant]) -> None:
    """Calls until all that is asked for is granted: the window opens with use."""
    end, granted = time.monotonic() + OPENS_S, 0
    while granted < (IN_FLIGHT + 1) * BLOCK:
        if time.monotonic() > end:
            raise Broken("the window did not open to 200 calls in flight")
        count = await _round(limiter, client, flying)
        granted = granted + count if count == BLOCK else 0
        await asyncio.sleep(EVERY_S)


async def _round(limiter: Limiter, client: Any, flying: deque[Grant]) -> int:
    """Reserves a block, settles the oldest when more are in flight than should be; returns how many were granted."""
    grant = await limiter.reserve(MODEL, LANE, limiter.ids(LANE), [ESTIMATE] * BLOCK)
    flying.append(grant)
    if len(flying) > IN_FLIGHT:
        settled = [Settlement(one, "clean", ESTIMATE - USAGE, None, 200) for one in flying.popleft().reservations]
        if settled:
            await SETTLE(client, limiter.keys(MODEL), limiter.settle_args(settled))
    return len(grant.reservations)


async def _server_cpu(client: Any) -> float:
    found = await client.info("cpu")
    return float(found["used_cpu_user"]) + float(found["used_cpu_sys"])
