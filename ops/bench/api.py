"""`make bench-api`: what one API process takes a second, what it adds to a call, and what waiting costs it.

Everything runs on this machine: the simulator (200 ms a call), an embedded Valkey (append-only), one API process with
auth on, a worker where jobs are called, and the load, a process of its own. Beside it stands a bare FastAPI application
that reads a body and answers; the two take turns, and the ratio tells more than a figure of one machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

import msgspec
import psutil
import uvicorn
import uvloop
from fastapi import FastAPI, Request, Response

from jobs import tokens
from jobs.errors import MimoqError
from jobs.processes import end_when_stdin_closes
from ops.bench.api_load import RESULT, Ask, Load, Plan
from ops.bench.limits.report import Row, table
from ops.bench.limits.stand import Broken, Stand, request
from producers.service import Service

CONNECTIONS = 64
#: Waiting calls, one after another, and jobs submitted in one of three rounds.
CALLS, POSTS = 300, 4_000
POSTS_S, GETS_S = 800, 2_000
OVERHEAD_MS, OVERHEAD_P99_MS = 25, 60
#: Files that a process may have open, so that thousands can wait.
FILES = 16_384
#: Waiters whose jobs end one by one, at this rate, and others, whose jobs end all at once.
SINGLE_WAITERS, OTHER_WAITERS, ENDS_PER_S = 2_000, 3_000, 100
#: Seconds over which the CPU of waiting is taken, two rounds of looks.
WAIT_S = 40.0
SETTLE_S = 1.0
PATIENCE_S = 300.0


def main() -> int:
    """Runs all parts and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m ops.bench.api", description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="part of the usual number of requests, to try it")
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--port", help=argparse.SUPPRESS)  # what a service is given
    args = parser.parse_args()
    if args.bare:
        return _bare()
    for variable in [name for name in os.environ if name.startswith("MIMOQ_")]:
        del os.environ[variable]  # the settings are the benchmark's own
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = FILES if most == resource.RLIM_INFINITY else min(FILES, most)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, most))
    try:
        with Stand() as stand, _serving(stand) as bench:
            rows = _all(bench, args.scale)
    except (Broken, MimoqError) as error:
        print(f"could not be run to its end: {error}", file=sys.stderr)
        return 1
    print(table("api", rows))
    return 0


class Bench:
    """The stand with an API process, a bare one, and a token."""

    def __init__(self, stand: Stand, api: str, bare: str, token: str) -> None:
        self.stand = stand
        self.port = urlsplit(api).port or 0
        self.bare_port = urlsplit(bare).port or 0
        self.token = token
        self.api = next(child for child in psutil.Process().children() if child.cmdline()[2:4] == ["-m", "api"])
        self.valkey = psutil.Process(stand.client.info("server")["process_id"])
        self.ids: list[str] = []  # of the singles
        self.singles_ms = 0.0  # CPU of taking one

    def start(self, asks: Sequence[Ask], port: int = 0, **plan: object) -> subprocess.Popen[bytes]:
        """A load process at its work."""
        whole = Plan(port=port or self.port, asks=list(asks), **plan)  # type: ignore[arg-type]  # msgspec checks it
        process = subprocess.Popen(
            [sys.executable, "-m", "ops.bench.api_load"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"MIMOQ_BENCH_TOKEN": self.token},
            cwd=self.stand.folder,
        )
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(whole))
        process.stdin.close()
        return process

    def load(self, asks: Sequence[Ask], port: int = 0, **plan: object) -> Load:
        """What came of a load."""
        return self.loaded(self.start(asks, port, **plan))

    def loaded(self, process: subprocess.Popen[bytes]) -> Load:
        """What a load process has left at its end. Raises `Broken`."""
        if process.wait() != 0:
            raise Broken("the load has failed: see above")
        assert process.stdout is not None
        process.stdout.close()
        return msgspec.json.decode((self.stand.folder / RESULT).read_bytes(), type=Load)


@contextlib.contextmanager
def _serving(stand: Stand) -> Iterator[Bench]:
    settings = {"base_url": stand.url, "api_key": "bench", "data_dir": stand.folder / "data", "log_level": "warning"}
    variables = {f"MIMOQ_{name.upper()}": str(value) for name, value in settings.items()}
    token = tokens.create(stand.client, "bench")
    with contextlib.ExitStack() as stack:
        api = Service("the API", ["api", "--exit-with-stdin"], 0, stand.folder / "api.log", variables)
        stack.callback(api.stop)
        bare = Service("the bare application", ["ops.bench.api", "--bare"], 0, stand.folder / "bare.log")
        stack.callback(bare.stop)
        yield Bench(stand, api.wait(), bare.wait(), token)


def _all(bench: Bench, scale: float) -> list[Row]:
    counts = (CALLS, POSTS, SINGLE_WAITERS, OTHER_WAITERS)
    calls, posts, singles, others = (max(int(count * scale), CONNECTIONS) for count in counts)
    rows = _overhead(bench, calls)
    rows += _floods(bench, posts)
    rows += _singles_and_bulk(bench, 3 * posts)
    return rows + _waiting(bench, singles, others)


# -- what it adds to a call


def _overhead(bench: Bench, count: int) -> list[Row]:
    """Waiting calls one after another on an idle system, each less the upstream's own time."""
    (worker,) = bench.stand.workers("interactive", 1)
    asks = [Ask("POST", "/v1/chat/completions", json.dumps(request(f"warm{n}"))) for n in range(10)]
    bench.load(asks)
    asks = [Ask("POST", "/v1/chat/completions", json.dumps(request(n))) for n in range(count)]
    load = bench.load(asks)
    own = {call.tag["job"]: call.end - call.at for call in bench.stand.calls() if call.tag}
    added = sorted((took_s - own[str(n)]) * 1e3 for n, took_s in enumerate(load.each_s))
    bench.stand.dismiss(worker)
    worker.wait()
    mean = statistics.fmean(added)
    p50, p99 = quantile(added, 0.5), quantile(added, 0.99)
    return [
        Row(f"added to a waiting call, mean of {count}, ms", f"< {OVERHEAD_MS}", f"{mean:.1f}", mean < OVERHEAD_MS),
        Row("the same, p50 / p99, ms", f"p99 < {OVERHEAD_P99_MS}", f"{p50:.1f} / {p99:.1f}", p99 < OVERHEAD_P99_MS),
    ]


# -- how many a second


def new_job(number: int) -> str:
    """The body of a job of a usual size."""
    return json.dumps({"request": request(number), "metadata": {"job": str(number)}})


def _floods(bench: Bench, count: int) -> list[Row]:
    """Three rounds each, in turn with the bare application; nobody takes the jobs off meanwhile."""
    posts, gets, bare, ids = [], [], [], []
    cpu_s = -cpu_of(bench.api, bench.valkey)
    for turn in range(3):
        asks = [Ask("POST", "/v1/jobs", new_job(turn * count + n)) for n in range(count)]
        bare.append(bench.load(asks, bench.bare_port, connections=CONNECTIONS))
        posts.append(bench.load(asks, connections=CONNECTIONS, keep=True))
        ids += [json.loads(body)["id"] for body in posts[-1].bodies]
    cpu_s += cpu_of(bench.api, bench.valkey)
    for turn in range(3):
        asks = [Ask("GET", f"/v1/jobs/{id}") for id in ids[turn * count : (turn + 1) * count]]
        gets.append(bench.load(asks, connections=CONNECTIONS))
    bench.ids = ids
    bench.singles_ms = cpu_s * 1e3 / len(ids)
    return [
        *_rates("POST /v1/jobs", posts, POSTS_S, bare),
        *_rates("GET /v1/jobs/{id}, queued", gets, GETS_S, bare),
    ]


def _rates(what: str, loads: list[Load], target: int | None, bare: list[Load]) -> list[Row]:
    rate, beside = (statistics.median(len(one.each_s) / one.took_s for one in some) for some in (loads, bare))
    each = sorted(second * 1e3 for load in loads for second in load.each_s)
    return [
        Row(
            f"{what} a second, {CONNECTIONS} connections, median of {len(loads)}",
            "" if target is None else f"≥ {target:,}",
            f"{rate:,.0f}, {rate / beside:.2f} of a bare POST's {beside:,.0f}",
            None if target is None else rate >= target,
        ),
        Row("the same, p50 / p99, ms", "", f"{quantile(each, 0.5):.1f} / {quantile(each, 0.99):.1f}"),
    ]


# -- singles beside bulk


def _singles_and_bulk(bench: Bench, count: int) -> list[Row]:
    """As many jobs, submitted one by one before, and as one batch now; each lot answered by one worker."""
    singles_per_s, singles_ms = _drained(bench, count)
    asks = [Ask("GET", f"/v1/jobs/{id}") for id in bench.ids]
    ended = bench.load(asks, connections=CONNECTIONS)
    lines = "".join(json.dumps({"body": request(count + n)}) + "\n" for n in range(count))
    cpu_s = -cpu_of(bench.api, bench.valkey)
    batch = bench.load([Ask("POST", "/v1/job-batches", lines, "application/jsonl")])
    cpu_s += cpu_of(bench.api, bench.valkey)
    bulk_per_s, bulk_ms = _drained(bench, count)
    each = sorted(second * 1e3 for second in ended.each_s)
    rate = len(ended.each_s) / ended.took_s
    return [
        Row(
            f"GET /v1/jobs/{{id}} a second, ended, {CONNECTIONS} connections",
            f"≥ {GETS_S:,}",
            f"{rate:,.0f}; p50 / p99 {quantile(each, 0.5):.1f} / {quantile(each, 0.99):.1f} ms",
            rate >= GETS_S,
        ),
        Row(f"a batch of {count:,} as JSON lines, jobs taken a second", "", f"{count / batch.took_s:,.0f}"),
        Row(
            "CPU of API and Valkey to take a job, singles / bulk, ms",
            "",
            f"{bench.singles_ms:.2f} / {cpu_s * 1e3 / count:.2f}",
        ),
        Row(
            "jobs a second of one worker, singles / bulk",
            "",
            f"{singles_per_s:,.0f} / {bulk_per_s:,.0f} ({singles_per_s / bulk_per_s:.2f})",
        ),
        Row("CPU of worker and Valkey to answer a job, singles / bulk, ms", "", f"{singles_ms:.2f} / {bulk_ms:.2f}"),
    ]


def _drained(bench: Bench, count: int) -> tuple[float, float]:
    """A worker answers all that is queued: jobs a second, and CPU ms a job of it and Valkey."""
    before = len(bench.stand.calls())
    (worker,) = bench.stand.workers("bulk", 1)
    process = psutil.Process(worker.pid)
    cpu_s = -cpu_of(process, bench.valkey)
    bench.stand.need(lambda: _answered(bench.stand.url) >= before + count, PATIENCE_S, f"the end of {count:,} jobs")
    time.sleep(SETTLE_S)  # the last of them are being written
    cpu_s += cpu_of(process, bench.valkey)
    bench.stand.dismiss(worker)
    worker.wait()
    calls = bench.stand.calls()[before:]
    return count / (max(call.end for call in calls) - calls[0].at), cpu_s * 1e3 / count


def _answered(url: str) -> int:
    with urllib.request.urlopen(f"{url}/_sim/ledger?only=totals", timeout=10) as answer:  # noqa: S310  # our simulator
        return int(json.load(answer)["totals"]["answered"])


# -- what waiting costs


def _waiting(bench: Bench, singles: int, others: int) -> list[Row]:
    """So many requests wait for a job each, which nobody calls: singles, cancelled one by one, and a batch, all at once."""
    posts = [Ask("POST", "/v1/jobs", new_job(-n)) for n in range(1, singles + 1)]
    ids = [json.loads(body)["id"] for body in bench.load(posts, connections=CONNECTIONS, keep=True).bodies]
    lines = "".join(json.dumps({"body": request(n)}) + "\n" for n in range(others))
    batch = bench.load([Ask("POST", "/v1/job-batches", lines, "application/jsonl")], keep=True).bodies[0]
    batch_id = json.loads(batch)["id"]
    count = singles + others
    rss = bench.api.memory_info().rss
    waited = [*ids, *(f"{batch_id}-{n}" for n in range(others))]
    load = bench.start([Ask("GET", f"/v1/jobs/{id}?wait=600") for id in waited], waiting=True)
    assert load.stdout is not None
    if load.stdout.readline() != b"waiting\n":
        raise Broken("the waiters did not come to wait")
    time.sleep(SETTLE_S)
    idle_s = -cpu_of(bench.api)
    time.sleep(WAIT_S)
    idle_s += cpu_of(bench.api)
    rss = bench.api.memory_info().rss - rss
    ended = []
    next_at = time.monotonic()
    for id in ids:
        next_at += 1 / ENDS_PER_S
        time.sleep(max(next_at - time.monotonic(), 0))
        ended.append(time.time())
        bench.stand.producer.cancel(id)
    all_ended = time.time()
    bench.stand.producer.cancel(batch_id)
    at = bench.loaded(load).at
    woken = sorted((answered - end) * 1e3 for answered, end in zip(at, ended, strict=False))
    return [
        Row(f"{count:,} waiters: CPU of the API while they wait, share of a core", "", f"{idle_s / WAIT_S:.1%}"),
        Row("memory of a waiter, KB", "", f"{rss / count / 1e3:.0f}"),
        Row(
            f"from a job's end to its waiter's answer, {ENDS_PER_S} a second, p50 / p99, ms",
            "",
            f"{quantile(woken, 0.5):.1f} / {quantile(woken, 0.99):.1f}",
        ),
        Row(f"{others:,} waiters of a batch that ends at once, answered within, s", "", f"{max(at) - all_ended:.2f}"),
    ]


# -- measures


def cpu_of(*processes: psutil.Process) -> float:
    """Seconds of CPU that they have used, all together."""
    return sum(times.user + times.system for times in (process.cpu_times() for process in processes))


def quantile(ordered: Sequence[float], share: float) -> float:
    """Of ordered values."""
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)]


def _bare() -> int:
    """Serves the application that does nothing, as the API is served."""
    app = FastAPI()

    @app.post("/v1/jobs")
    async def take(request: Request) -> Response:
        await request.body()
        return Response(b"{}", 202, media_type="application/json")

    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    listener.setblocking(False)
    end_when_stdin_closes(lambda: signal.raise_signal(signal.SIGTERM))
    print(f"listening on http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    config = uvicorn.Config(app, http="httptools", ws="none", loop="none", log_config=None, access_log=False)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(uvicorn.Server(config).serve(sockets=[listener]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
