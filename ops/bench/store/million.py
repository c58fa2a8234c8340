"""A million queued: what they take in Redis, what a job costs beside them, what 100,000 of them take once they have ended,
and how these are exported.

CPU at a million queued is set against that at 10,000, in turn, each in a store of its own with a worker of its own.
"""

from __future__ import annotations

import contextlib
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import psutil

from ops.bench.corpus import Corpus
from ops.bench.limits.report import Row, all_of
from ops.bench.limits.stand import Broken
from ops.bench.store import feed
from ops.bench.store.bench import ROUNDS, Bench, Spent, costs, median, scaled
from ops.bench.store.command import Ran
from ops.bench.store.submitting import MILLION, a_million, bytes_row

#: Jobs of one round's window, and those before and behind it: the window of the limiter has opened, the queue is not dry.
WINDOW, LEAD = 10_000, 2_000
FINISHED = 100_000
FINISHED_BYTES = 1_100.0
DEPTH_RATIO = 1.1
ROWS_PER_S = 30_000
#: Memory of an export of all over that of a part, at most: what is read ahead takes its place in the first blocks.
CONSTANT = 1.2
PATIENCE_S = 240.0
POLL_S = 0.05
#: Answers whose size and compression stand for all.
SAMPLES = 1_000


class Window(NamedTuple):
    """What one round's jobs cost: their number, CPU seconds of the worker, what Valkey spent."""

    jobs: int
    worker_s: float
    valkey: Spent


def million(folder: Path, answers: Path, scale: float) -> list[Row]:
    """Memory of a million queued and 100,000 finished, CPU a job beside them, and the export."""
    total, finished = scaled(MILLION, scale), scaled(FINISHED, scale)
    with Bench(answers) as few, Bench(answers) as many:
        few.unrewritten()
        rows, batch, queued_bytes = a_million(many, folder, total, ids=False)
        before = many.settled()
        rounds = []
        for _ in range(ROUNDS):
            few_batch = few.stand.producer.submit_many(feed.bodies(_window(scale) + 2 * _lead(scale)))
            with _worker(few) as worker:
                one = _measured(few, worker, few_batch, scale)
                if not few.stand.finished(few_batch, PATIENCE_S):
                    raise Broken("a batch did not finish")
            with _worker(many) as worker:
                rounds.append((one, _measured(many, worker, batch, scale)))
        with _worker(many):
            many.stand.need(lambda: _ended(many, batch) >= finished, PATIENCE_S, f"{finished:,} answers")
        grown = many.settled().since(before).memory_bytes
        ended = _ended(many, batch)
        rows += _finished(many, batch, ended, grown / ended + queued_bytes)
        rows += beside(rounds, _window(scale), total)
        rows += costs(
            "answered in bulk", together([one.valkey for one, _ in rounds]), sum(one.jobs for one, _ in rounds)
        )
        rows.append(_rewritten(many))
        rows += _exported(few, few_batch, many, batch, ended, folder)
    return rows


def _window(scale: float) -> int:
    return scaled(WINDOW, max(scale, 0.1))


def _lead(scale: float) -> int:
    return scaled(LEAD, max(scale, 0.5))


@contextlib.contextmanager
def _worker(bench: Bench) -> Iterator[psutil.Process]:
    (worker,) = bench.stand.workers("bulk", 1)
    yield psutil.Process(worker.pid)
    bench.stand.dismiss(worker)
    worker.wait()


def _ended(bench: Bench, batch: str) -> int:
    return bench.stand.producer.status(batch).succeeded


def _measured(bench: Bench, worker: psutil.Process, batch: str, scale: float) -> Window:
    """The next so many jobs of a batch, once the worker is at its pace."""

    def look(least: int) -> tuple[int, float, Spent]:
        bench.stand.need(lambda: _ended(bench, batch) >= least, PATIENCE_S, f"{least:,} answers")
        spent = worker.cpu_times()
        return _ended(bench, batch), spent.user + spent.system, bench.spent()

    first = _ended(bench, batch) + _lead(scale)
    began, worker_s, valkey = look(first)
    ended, worker_then_s, valkey_then = look(began + _window(scale))
    return Window(ended - began, worker_then_s - worker_s, valkey_then.since(valkey))


def together(spent: list[Spent]) -> Spent:
    return Spent._make(sum(values) for values in zip(*spent, strict=True))


def beside(rounds: list[tuple[Window, Window]], few: int, many: int) -> list[Row]:
    """CPU of a job at a long queue over that at a short one, round by round."""
    rows = []
    parts: dict[str, Callable[[Window], float]] = {
        "worker and Valkey": lambda window: window.worker_s + window.valkey.cpu_s,
        "worker": lambda window: window.worker_s,
        "Valkey": lambda window: window.valkey.cpu_s,
    }
    for name, of in parts.items():
        pairs = [(of(one) / one.jobs * 1000, of(other) / other.jobs * 1000) for one, other in rounds]
        ratio = median(other / one for one, other in pairs)
        low, high = (median(values) for values in zip(*pairs, strict=True))
        rows.append(
            Row(
                f"CPU of {name}, ms a job, {many:,} / {few:,} queued, median of {ROUNDS}",
                f"≤ {DEPTH_RATIO} ×",
                f"{high:.3f} / {low:.3f} ({ratio:.2f} ×)",
                ratio <= DEPTH_RATIO,
            )
        )
    rate = median(one.jobs / one.valkey.seconds for pair in rounds for one in pair)
    return [*rows, Row("jobs a second meanwhile", "", f"{rate:,.0f}")]


def _finished(bench: Bench, batch: str, ended: int, bytes_a_job: float) -> list[Row]:
    """What ended jobs take in all, and the texts that this was measured with."""
    asked = Corpus(feed.ASKED).ratio(feed.PROMPT_BYTES)
    bodies = [
        msgspec.json.encode(result.response)
        for _, result in zip(range(SAMPLES), bench.stand.producer.results(batch, follow=False), strict=False)
    ]
    size = sum(map(len, bodies))
    answered = sum(len(zlib.compress(body)) for body in bodies) / size
    return [
        bytes_row(f"{ended:,} of them finished, request, result and all", FINISHED_BYTES, bytes_a_job),
        Row(
            f"the texts: prompts of {feed.PROMPT_BYTES} B; answers' bodies; each compressed by itself with zlib",
            "",
            f"{asked:.2f}; {size / len(bodies):,.0f} B, {answered:.2f}",
        ),
    ]


def _rewritten(bench: Bench) -> Row:
    """What it takes Valkey to write its append-only file anew, as it does whenever that has doubled."""
    client = bench.stand.client

    def rewriting() -> bool:
        told = client.info("persistence")
        return bool(told["aof_rewrite_in_progress"] or told["aof_rewrite_scheduled"])

    bench.stand.need(lambda: not rewriting(), PATIENCE_S, "the end of a rewrite")
    began, held_mb = time.monotonic(), bench.spent().memory_bytes / 1e6
    client.bgrewriteaof()
    bench.stand.need(lambda: not rewriting(), PATIENCE_S, "the end of a rewrite")
    seconds, told = time.monotonic() - began, client.info("everything")
    return Row(
        f"the append-only file of {held_mb:,.0f} MB of memory written anew: s; MB; the fork, ms",
        "",
        f"{seconds:.1f}; {told['aof_base_size'] / 1e6:,.0f}; {told['latest_fork_usec'] / 1e3:,.0f}",
    )


def _exported(few: Bench, few_batch: str, many: Bench, batch: str, ended: int, folder: Path) -> list[Row]:
    """`mimoq results BATCH > file` of many rows and of few."""
    small, few_rows = _export(few, few_batch, folder)
    rounds = [_export(many, batch, folder) for _ in range(ROUNDS)]
    rate = median(rows / ran.seconds for ran, rows in rounds)
    peak_mb = median(ran.peak_mb for ran, _ in rounds)
    return [
        all_of("rows of `mimoq results BATCH > FILE`", rounds[0][1], ended),
        Row("its rows a second, the whole command", f"≥ {ROWS_PER_S:,}", f"{rate:,.0f}", rate >= ROWS_PER_S),
        Row(
            f"its peak RSS of {ended:,} rows over that of {few_rows:,}, MB",
            f"≤ {CONSTANT} ×",
            f"{peak_mb:.0f} / {small.peak_mb:.0f} ({peak_mb / small.peak_mb:.2f} ×)",
            peak_mb <= CONSTANT * small.peak_mb,
        ),
    ]


def _export(bench: Bench, batch: str, folder: Path) -> tuple[Ran, int]:
    path = folder / "results.jsonl"
    with path.open("wb") as out:
        ran = bench.mimoq("results", batch, out=out)
    with path.open("rb") as lines:
        rows = sum(1 for _ in lines)
    path.unlink()
    return ran, rows
