"""What all parts stand on: a stand whose simulator answers in natural text, and what its Valkey has spent."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, NamedTuple

from jobs.connections import check_schema
from jobs.runtime import Runtime
from ops.bench.limits.report import Row
from ops.bench.limits.stand import Stand
from ops.bench.store.command import Ran, mimoq, run

LATENCY_S = 0.2
#: Calls in flight, at most.
CAP = 500
#: Rounds of which medians are told.
ROUNDS = 3


class Bench:
    """A stand, and commands that find its store: a Valkey that runs already."""

    def __init__(self, answers: Path, *simulator: str, **settings: object) -> None:
        arguments = ("--text", str(answers), "--latency", str(LATENCY_S), *simulator)
        self.stand = Stand(*arguments, **{"max_in_flight": CAP, "log_level": "warning", **settings})

    def __enter__(self) -> Bench:
        self.stand.__enter__()
        self.environment = environment(
            base_url=self.stand.url, api_key="bench", data_dir=self.stand.folder / "data", log_level="warning"
        )
        return self

    def __exit__(self, *error: Any) -> None:
        self.stand.__exit__(*error)

    @property
    def redis_url(self) -> str:
        """Where the Valkey is."""
        return f"unix://{Runtime.of(self.stand.folder / 'data').socket}"

    def mimoq(self, *arguments: str, out: IO[bytes] | None = None) -> Ran:
        """A command of mimoq on this store. Raises `Broken`."""
        return run(mimoq(*arguments), self.environment, out)

    def produce(self, count: int, *options: str) -> Ran:
        """Requests submitted by a Python program of its own; the seconds are those of its submit. Raises `Broken`."""
        argv = [sys.executable, "-P", "-m", "ops.bench.store.producing", str(count), *options]
        ran = run(argv, self.environment)
        return ran._replace(seconds=float(ran.out))

    def flush(self) -> None:
        """An empty store."""
        self.stand.client.flushall(asynchronous=False)
        check_schema(self.stand.client)

    def unrewritten(self) -> None:
        """From here on the append-only file only grows, so that what is written can be counted by it."""
        self.stand.client.config_set("auto-aof-rewrite-percentage", 0)

    def spent(self) -> Spent:
        """What Valkey has done so far."""
        info: dict[str, Any] = self.stand.client.info("everything")
        return Spent(
            time.monotonic(),
            float(info["used_cpu_user"]) + float(info["used_cpu_sys"]),
            int(info["total_net_input_bytes"]),
            int(info["total_net_output_bytes"]),
            sum(int(told["calls"]) for name, told in info.items() if name.startswith("cmdstat_")),
            int(info["aof_current_size"]),
            int(info["used_memory"]),
        )

    def settled(self) -> Spent:
        """The same once its memory keeps still: buffers of what has just been written are given back within a moment."""
        time.sleep(SETTLES_S)
        return self.spent()


SETTLES_S = 2.0


class Spent(NamedTuple):
    """What a Valkey has spent up to a moment, or between two: seconds, its CPU's, bytes it read and wrote, commands (those
    of scripts too), bytes of its append-only file, bytes of memory."""

    seconds: float
    cpu_s: float
    read_bytes: int
    written_bytes: int
    commands: int
    log_bytes: int
    memory_bytes: int

    def since(self, before: Spent) -> Spent:
        """What was spent between two moments."""
        return Spent._make(now - then for now, then in zip(self, before, strict=True))


def costs(what: str, spent: Spent, jobs: int) -> list[Row]:
    """What a job costs a Valkey, as rows without a target."""
    wire = f"{spent.read_bytes / jobs:,.0f} + {spent.written_bytes / jobs:,.0f}"
    return [
        Row(f"{what}: Valkey's CPU, ms a job", "", f"{spent.cpu_s / jobs * 1000:.3f}"),
        Row(
            f"{what}: bytes a job to Valkey + from it; commands, scripts' own included",
            "",
            f"{wire}; {spent.commands / jobs:.1f}",
        ),
        Row(f"{what}: bytes a job in the append-only file", "", f"{spent.log_bytes / jobs:,.0f}"),
    ]


def environment(**settings: object) -> dict[str, str]:
    """This process's environment with these settings of mimoq and no others."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MIMOQ_")}
    return kept | {f"MIMOQ_{name.upper()}": str(value) for name, value in settings.items()}


def median(values: Iterable[float]) -> float:
    """The median of some rounds."""
    return statistics.median(values)


def scaled(count: int, scale: float) -> int:
    """A part of so many jobs, whole slices and one at least."""
    return max(round(count * scale / 50), 1) * 50
