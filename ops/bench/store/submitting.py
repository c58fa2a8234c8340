"""Bulk submit: how fast a file or a program's requests get into the store, and what memory the producer has meanwhile."""

from __future__ import annotations

from pathlib import Path

from ops.bench.limits.report import Row
from ops.bench.store import feed
from ops.bench.store.bench import ROUNDS, Bench, costs, median, scaled
from ops.bench.store.command import Ran

JOBS, MILLION = 200_000, 1_000_000
JOBS_PER_S = 20_000
MILLION_S = 60.0
PEAK_MB, PEAK_MB_WITH_IDS = 150.0, 300.0


def submit(folder: Path, answers: Path, scale: float) -> list[Row]:
    """200,000 jobs by `mimoq submit` and by `Producer.submit_many`, in turn, then a million with custom ids."""
    jobs, million = scaled(JOBS, scale), scaled(MILLION, scale)
    rows = []
    with Bench(answers) as bench:
        path = feed.written(folder / "some.jsonl", jobs)
        by_file, by_program = [], []
        before = bench.spent()
        for _ in range(ROUNDS):
            by_file.append(bench.mimoq("submit", str(path)))
            bench.flush()
            by_program.append(bench.produce(jobs))
            bench.flush()
        spent = bench.spent().since(before)
        rows += _rows(f"{jobs:,} jobs by `mimoq submit FILE`, the whole command", jobs, by_file)
        rows += _rows(f"{jobs:,} jobs by `Producer.submit_many(...)`, which has them made", jobs, by_program)
        rows += costs("submitted in bulk", spent, 2 * ROUNDS * jobs)[:2]
        path.unlink()
        rows += a_million(bench, folder, million, ids=True)[0]
    return rows


def _rows(what: str, jobs: int, rounds: list[Ran]) -> list[Row]:
    rate = median(jobs / ran.seconds for ran in rounds)
    peak_mb = max(ran.peak_mb for ran in rounds)
    return [
        Row(f"{what}: jobs a second", f"≥ {JOBS_PER_S:,}", f"{rate:,.0f}", rate >= JOBS_PER_S),
        Row("its peak RSS, MB", "", f"{peak_mb:.0f}"),
    ]


def a_million(bench: Bench, folder: Path, million: int, ids: bool) -> tuple[list[Row], str, float]:
    """A million by `mimoq submit FILE` into an empty store; the rows, the batch's id, Valkey's bytes a queued job."""
    path = feed.written(folder / "million.jsonl", million, ids)
    before = bench.settled()
    ran = bench.mimoq("submit", str(path))
    bytes_a_job = bench.settled().since(before).memory_bytes / million
    path.unlink()
    kind = "custom ids of 10 characters" if ids else "no custom ids"
    most_mb = PEAK_MB_WITH_IDS if ids else PEAK_MB
    # A part of a million is held to a part of the time.
    most_s = MILLION_S * million / MILLION
    return (
        [
            Row(
                f"{million:,} jobs by `mimoq submit FILE`, {kind}: s",
                f"< {most_s:g}",
                f"{ran.seconds:.1f} ({million / ran.seconds:,.0f} jobs/s)",
                ran.seconds < most_s,
            ),
            Row(f"its peak RSS, {kind}, MB", f"< {most_mb:.0f}", f"{ran.peak_mb:.0f}", ran.peak_mb < most_mb),
            bytes_row(f"{million:,} queued, {kind}", QUEUED_BYTES, bytes_a_job),
        ],
        ran.out,
        bytes_a_job,
    )


QUEUED_BYTES = 350.0


def bytes_row(what: str, most: float, bytes_a_job: float) -> Row:
    """Memory of Valkey for a job."""
    return Row(
        f"{what}: Valkey's `used_memory`, bytes a job", f"≤ {most:,.0f}", f"{bytes_a_job:,.0f}", bytes_a_job <= most
    )
