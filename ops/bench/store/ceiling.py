"""What one Redis carries: singles, rings, and the scripts of a job's way as fast as they go, without calls."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path
from typing import Any

import psutil
import uvloop

from jobs import leases
from jobs.connections import connect_async
from jobs.leases import End, Job
from jobs.results import Usage
from jobs.scripts import Call, call_all
from jobs.settings import load_settings
from jobs.workers import live_workers
from ops.bench.limits.report import Row
from ops.bench.limits.stand import Broken
from ops.bench.store import feed
from ops.bench.store.bench import SETTLES_S, Bench, Spent, costs, scaled
from ops.bench.store.rings import rings
from ops.simulator.asks import DEFAULT_MODEL
from worker.limiter import SETTLE, Limiter, Settlement

SINGLES = 3_000
#: Jobs of the drive, jobs of a block, and blocks under way at once.
JOBS, BLOCK, BLOCKS = 60_000, 50, 16
#: Before them, so many: the limiter's window opens with use.
OPENS = 10_000
ESTIMATE = 400
#: Calls of a worker that take minutes, jobs to open the window with, and seconds of looking at it.
HELD, HELD_JOBS, HELD_S, LONG_S = 2_000, 30_000, 10.0, 120.0
#: Calls that open it take so long, up to this share of those.
OPENING_S, OPEN_SHARE = 3.0, 0.95
#: Of a stored answer.
PAYLOAD_BYTES = 900
USAGE = Usage(prompt_tokens=150, completion_tokens=240, reasoning_tokens=90, cached_tokens=0, total_tokens=390)
PATIENCE_S = 120.0


def ceiling(_: Path, answers: Path, scale: float) -> list[Row]:
    """Singles, rings, calls that take long, and claim, reserve, settle and finish in blocks of 50."""
    return [
        *_singles(answers, scaled(SINGLES, scale)),
        *rings(answers, scale),
        *_held(answers),
        *_driven(answers, scale),
    ]


def _singles(answers: Path, count: int) -> list[Row]:
    """Jobs that are submitted one by one, each by itself, from one process."""
    with Bench(answers) as bench:
        bench.unrewritten()
        bench.stand.workers("interactive", 1)
        before = bench.spent()
        ran = bench.produce(count, "--singles")
        client = bench.stand.client
        bench.stand.need(lambda: client.zcard("mimoq:open") == 0, PATIENCE_S, "the end of all singles")
        spent = bench.spent().since(before)
        kept_bytes = bench.settled().since(before).memory_bytes
    rate = count / ran.seconds
    return [
        Row("singles submitted and answered, a second, by one producer", "", f"{rate:,.0f}"),
        *costs("singles", spent, count),
        Row("singles, finished: Valkey's `used_memory`, bytes a job", "", f"{kept_bytes / count:,.0f}"),
    ]


def _driven(answers: Path, scale: float) -> list[Row]:
    jobs, opens = scaled(JOBS, scale), scaled(OPENS, max(scale, 0.2))
    with Bench(answers) as bench, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        bench.unrewritten()
        bench.stand.producer.submit_many(feed.bodies(jobs + opens))
        spent, client_s = runner.run(_drive(bench, opens, jobs))
    valkey, driver = spent.cpu_s / spent.seconds, client_s / spent.seconds
    return [
        Row(
            "claimed, reserved, settled and finished in blocks of 50, without calls: jobs a second",
            "",
            f"{jobs / spent.seconds:,.0f} (of a core Valkey {valkey:.0%}, driver {driver:.0%})",
        ),
        Row(
            "Valkey's CPU for it, ms a job; jobs a second of one core",
            "",
            f"{spent.cpu_s / jobs * 1000:.3f}; {jobs / spent.cpu_s:,.0f}",
        ),
        *costs("the same", spent, jobs)[1:],
    ]


def _held(answers: Path) -> list[Row]:
    """Calls that take minutes: what it costs to hold them, leases and reservations renewed every second."""
    # The limiter's window opens with answers, so the first ones come soon.
    with Bench(answers, "--latency", str(OPENING_S), max_in_flight=HELD, worker_max_in_flight=HELD) as bench:
        bench.unrewritten()
        bench.stand.producer.submit_many(feed.bodies(HELD_JOBS))
        (process,) = bench.stand.workers("bulk", 1)
        worker = psutil.Process(process.pid)
        bench.stand.need(lambda: _in_flight(bench) > HELD * OPEN_SHARE, PATIENCE_S, "a window that is open")
        bench.stand.configure(latency=LONG_S)
        bench.stand.need(lambda: _in_flight(bench) == HELD, PATIENCE_S, f"{HELD:,} calls in flight")
        time.sleep(OPENING_S + SETTLES_S)  # until the last of those that opened it has ended
        before, began = bench.spent(), worker.cpu_times()
        time.sleep(HELD_S)
        spent, ended = bench.spent().since(before), worker.cpu_times()
        if _in_flight(bench) != HELD:
            raise Broken("calls that were to be held have ended")
    worker_s = ended.user + ended.system - began.user - began.system
    shares = [cpu_s / spent.seconds / HELD * 1_000 for cpu_s in (spent.cpu_s, worker_s)]
    return [
        Row(
            f"{HELD:,} calls held in flight: of a core for 1,000 of them, Valkey; worker",
            "",
            f"{shares[0]:.2%}; {shares[1]:.2%}",
        ),
        Row(
            "the same: a held call's bytes a second in the append-only file",
            "",
            f"{spent.log_bytes / spent.seconds / HELD:,.0f}",
        ),
    ]


def _in_flight(bench: Bench) -> int:
    return sum(worker.in_flight for worker in live_workers(bench.stand.client))


async def _drive(bench: Bench, opens: int, jobs: int) -> tuple[Spent, float]:
    """What Valkey spent on so many jobs, and the CPU seconds of this process."""
    client = connect_async(bench.redis_url)
    limiter = Limiter(client, load_settings(redis_url=bench.redis_url), "account", "bench")
    try:
        await _ended(client, limiter, opens)
        before, client_s = bench.spent(), time.process_time()
        await _ended(client, limiter, jobs)
        return bench.spent().since(before), time.process_time() - client_s
    finally:
        await client.aclose()


async def _ended(client: Any, limiter: Limiter, jobs: int) -> None:
    """The next so many jobs, some blocks at once."""
    left = [jobs]

    async def blocks() -> None:
        while left[0] > 0:
            left[0] -= BLOCK
            await _block(client, limiter, await leases.claim(client, "bench", "bulk", [""], BLOCK))

    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*(blocks() for _ in range(BLOCKS)))


async def _block(client: Any, limiter: Limiter, jobs: list[Job]) -> None:
    """A claimed slice, from its reservations to its results, as a worker makes it; the answers are there at once."""
    if not jobs:
        raise Broken("there was nothing to claim")
    while jobs:
        grant = await limiter.reserve(DEFAULT_MODEL, "bulk", limiter.ids("bulk"), [ESTIMATE] * len(jobs), jobs)
        granted, jobs = jobs[: len(grant.reservations)], jobs[len(grant.reservations) :]
        if not granted:
            await asyncio.sleep(grant.ask_again_s)
            continue
        ends = [End(job, "s", _payload(), 1, USAGE) for job in granted]
        settled = [Settlement(one, "clean", ESTIMATE - USAGE.total_tokens, None, 200) for one in grant.reservations]
        calls = [
            Call(SETTLE, limiter.keys(DEFAULT_MODEL), limiter.settle_args(settled)),
            leases.finish_call(granted[0].batch_id, ends),
        ]
        await call_all(client, calls)


def _payload() -> bytes:
    """As large as a compressed answer, and as little to be compressed further."""
    return random.randbytes(PAYLOAD_BYTES)
