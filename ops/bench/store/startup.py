"""Start-up of the command line: beside the time that Python takes to import the libraries it can't do without."""

from __future__ import annotations

import sys
from pathlib import Path

from ops.bench.limits.report import Row
from ops.bench.store.bench import Bench, environment, median
from ops.bench.store.command import mimoq, run

ROUNDS = 11
HELP_S = 0.3
STATUS_RATIO = 1.3
IMPORTS = "import typer, pydantic_settings, redis"


def start(_: Path, answers: Path, scale: float) -> list[Row]:
    """`mimoq --help`, `mimoq status` and the import of libraries in turn; the store runs."""
    with Bench(answers) as bench:
        bench.stand.producer.submit("Something that status shows.")
        store = {"redis_url": bench.redis_url}
        commands = {
            "import": ([sys.executable, "-P", "-c", IMPORTS], bench.environment),
            "help": (mimoq("--help"), bench.environment),
            "embedded": (mimoq("status"), bench.environment),
            "redis": (mimoq("status"), environment(**store)),
        }
        took: dict[str, list[float]] = {name: [] for name in commands}
        for number in range(1 + max(round(ROUNDS * min(scale, 1.0)), 3)):
            for name, (argv, variables) in commands.items():
                seconds = run(argv, variables).seconds
                if number:  # the first has files read from the disk
                    took[name].append(seconds)
    medians = {name: median(seconds) for name, seconds in took.items()}
    imports_s = medians["import"]
    rows = [
        Row("`mimoq --help`, s", f"≤ {HELP_S}", f"{medians['help']:.2f}", medians["help"] <= HELP_S),
        Row("importing typer, pydantic_settings and redis, s", "", f"{imports_s:.2f}"),
    ]
    for name, store_name in (("embedded", "the embedded Valkey, which runs"), ("redis", "MIMOQ_REDIS_URL")):
        ratio = medians[name] / imports_s
        rows.append(
            Row(
                f"`mimoq status` over these imports; store: {store_name}",
                f"≤ {STATUS_RATIO} ×",
                f"{medians[name]:.2f} s ({ratio:.2f} ×)",
                ratio <= STATUS_RATIO,
            )
        )
    return rows
