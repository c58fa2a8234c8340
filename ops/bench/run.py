"""`make bench`: a run of mimoq beside a bare httpx-over-aiohttp loop, against the same upstream in the same minute.

The upstream is the project's simulator in a process of its own, 200 ms and 1.7 KB an answer. Both do the same jobs with 500
in flight; mimoq's time is that of the whole command, from its start to its end, workers and embedded Valkey included.
The two take turns, and the median of the ratios is what counts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

LATENCY_S = 0.2
IN_FLIGHT = 500
MIMOQ = [sys.executable, "-P", "-m", "producers"]
COLUMNS = (
    "round",
    "bare jobs/s",
    "mimoq jobs/s, the whole command",
    "ratio",
    "mimoq jobs/s while answering",
    "ratio",
    "worker MB",
    "worker CPU ms a job",
)


def main() -> int:
    """Runs the rounds and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bare", metavar="URL", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.bare:
        print(asyncio.run(_bare(args.bare, args.jobs)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "jobs.jsonl")
        source.write_text("".join(_line(number) for number in range(args.jobs)))
        simulator = subprocess.Popen(
            [sys.executable, "-m", "ops.simulator", "--latency", str(LATENCY_S), "--exit-with-parent"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert simulator.stdout is not None
            url = simulator.stdout.readline().split()[-1]
            rows = [_round(Path(folder), source, url, args.jobs, number) for number in range(args.rounds)]
        finally:
            simulator.terminate()
            simulator.wait()
    print("| " + " | ".join(COLUMNS) + " |")
    print("|---" * len(COLUMNS) + "|")
    for number, row in enumerate(rows, 1):
        print(f"| {number} | " + " | ".join(row.values()) + " |")
    whole = statistics.median(float(row["ratio"]) for row in rows)
    answering = statistics.median(float(row["answering ratio"]) for row in rows)
    print(f"\nmedian ratio: {whole:.2f} for the whole command, {answering:.2f} while answering; {args.jobs:,} jobs")
    return 0


def _line(number: int) -> str:
    body = {
        "model": "MaaS_Mimo_V2.5_20260423",
        "messages": [{"role": "user", "content": f"Say {number}. " + "word " * 80}],
    }
    return json.dumps({"custom_id": f"r{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}) + "\n"


def _round(folder: Path, source: Path, url: str, jobs: int, number: int) -> dict[str, str]:
    bare = float(
        subprocess.run(
            [sys.executable, "-m", "ops.bench.run", "--bare", url, "--jobs", str(jobs)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    )
    output = folder / f"out{number}.jsonl"
    environment = {
        **os.environ,
        "MIMOQ_BASE_URL": url,
        "MIMOQ_API_KEY": "bench",
        "MIMOQ_DATA_DIR": str(folder / f"data{number}"),
    }
    began = time.monotonic()
    command = subprocess.Popen(
        [*MIMOQ, "run", str(source), "-o", str(output), "--max-in-flight", str(IN_FLIGHT), "--quiet"],
        env=environment,
    )
    most_mb, cpu_s, first, last = 0.0, 0.0, 0.0, 0.0
    while command.poll() is None:
        size = output.stat().st_size if output.exists() else 0
        if size and not first:
            first = time.monotonic()
        for child in psutil.Process(command.pid).children() if psutil.pid_exists(command.pid) else []:
            try:
                if "worker" in child.cmdline():
                    most_mb = max(most_mb, child.memory_info().rss / 1e6)
                    times = child.cpu_times()
                    cpu_s = max(cpu_s, times.user + times.system)
            except psutil.Error:
                continue
        time.sleep(0.1)
    whole = time.monotonic() - began
    last = output.stat().st_mtime - time.time() + time.monotonic()
    rows = sum(1 for _ in output.open("rb"))
    if command.returncode != 0 or rows != jobs:
        raise SystemExit(f"the run ended with {command.returncode} and {rows} rows")
    answering = jobs / max(last - first + LATENCY_S, 1e-9)
    return {
        "bare": f"{bare:.0f}",
        "mimoq": f"{jobs / whole:.0f}",
        "ratio": f"{jobs / whole / bare:.2f}",
        "answering": f"{answering:.0f}",
        "answering ratio": f"{answering / bare:.2f}",
        "mb": f"{most_mb:.0f}",
        "cpu": f"{cpu_s * 1000 / jobs:.2f}",
    }


async def _bare(url: str, jobs: int) -> float:
    """Jobs a second of a loop that does nothing but call."""
    import httpx
    from httpx_aiohttp import AiohttpTransport

    limits = httpx.Limits(max_connections=IN_FLIGHT, max_keepalive_connections=IN_FLIGHT)
    numbers = iter(range(jobs))
    async with httpx.AsyncClient(transport=AiohttpTransport(limits=limits), timeout=60) as client:

        async def work() -> None:
            for number in numbers:
                body = json.loads(_line(number))["body"]
                response = await client.post(
                    f"{url}/v1/chat/completions", json=body, headers={"Authorization": "Bearer bench"}
                )
                response.raise_for_status()
                response.json()

        began = time.monotonic()
        await asyncio.gather(*(work() for _ in range(IN_FLIGHT)))
        return jobs / (time.monotonic() - began)


if __name__ == "__main__":
    sys.exit(main())
