"""`python -m ops.bench.store.rings [BROKER]`: rings put on a queue and taken off it, a second, by one process each.

The rings find no work: what is measured is the broker, Celery, and one claim that finds nothing.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from jobs.broker import Bell, make_app
from jobs.settings import load_settings
from ops.bench.limits.report import Row, table
from ops.bench.limits.stand import Broken
from ops.bench.store import feed
from ops.bench.store.bench import Bench, scaled

RINGS = 10_000
PATIENCE_S = 120.0


def rings(answers: Path, scale: float, broker: str | None = None) -> list[Row]:
    """Rings through the store's Redis, or another broker."""
    count = scaled(RINGS, scale)
    settings = {} if broker is None else {"broker_url": broker}
    with Bench(answers, **settings) as bench:
        app = make_app(load_settings(redis_url=bench.redis_url, **settings), bench.redis_url)
        bell = Bell(app)
        bell.ring("0", "bulk", "", 1)  # the queue is there, and Celery imported
        before = bench.spent()
        began = time.monotonic()
        bell.ring("0", "bulk", "", count)
        rung_s = time.monotonic() - began
        rung = bench.spent().since(before)
        (worker,) = bench.stand.workers("bulk", 1)
        bench.stand.need(lambda: bell.depth("bulk", "") < count, PATIENCE_S, "a ring that is taken")
        before, left = bench.spent(), bell.depth("bulk", "")
        bench.stand.need(lambda: bell.depth("bulk", "") == 0, PATIENCE_S, "an empty queue")
        taken = bench.spent().since(before)
        bench.stand.dismiss(worker)
        worker.wait()
        app.close()
    name = "Redis" if broker is None else broker.partition("://")[0]
    rows = [
        Row(
            f"rings over {name}: put by one process; taken by one worker, a second",
            "",
            f"{count / rung_s:,.0f}; {left / taken.seconds:,.0f}",
        )
    ]
    if broker is None:
        rows.append(
            Row(
                "Valkey's CPU, ms a ring: put; taken, with a claim that finds nothing",
                "",
                f"{rung.cpu_s / count * 1000:.3f}; {taken.cpu_s / left * 1000:.3f}",
            )
        )
    return rows


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m ops.bench.store.rings", description=__doc__)
    parser.add_argument("broker", nargs="?", help="address of a broker; without it, an embedded Valkey is one")
    args = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="mimoq-bench-") as folder:
            print(table("rings", rings(feed.answers_text(Path(folder) / "answers.txt"), 1.0, args.broker)))
    except (Broken, OSError) as error:
        print(f"could not be run to its end: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
