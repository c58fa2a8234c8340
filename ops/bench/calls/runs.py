"""How each kind of row is run once. Each stands on a stand of its own: simulator, Valkey, workers; they end with it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import psutil

from jobs import tokens
from jobs.runtime import Runtime
from ops.bench.api_load import Ask, Plan
from ops.bench.calls import environments
from ops.bench.calls.measure import LOAD, PRODUCER, Measured
from ops.bench.calls.standing import alive, api, process, standing, valkey, watch
from ops.bench.corpus import Corpus
from ops.bench.limits.stand import Broken

PEERS = Path(__file__).parent / "peers"
PROMPT_BYTES = 500
#: Connections that submit over HTTP, where nobody waits for the answer.
CONNECTIONS = 64
SUBMIT_S, WAIT_S = 120.0, 60.0


class Trial(NamedTuple):
    """What is run: so many jobs, so many at once; `bodies` holds at least as many requests, a line each."""

    jobs: int
    concurrency: int
    bodies: Path

    def each(self) -> Iterator[dict[str, Any]]:
        """The requests."""
        with self.bodies.open("rb") as lines:
            for line in islice(lines, self.jobs):
                yield json.loads(line)


Run = Callable[[Trial], Measured]


def write_bodies(path: Path, count: int) -> None:
    """Chat requests whose prompts are natural text."""
    corpus = Corpus()
    with path.open("w") as file:
        file.writelines(json.dumps(corpus.body(PROMPT_BYTES)) + "\n" for _ in range(count))


# -- bare loops, SDKs, Celery


def client(script: str, how: str = "", *simulator: str, peer: str = "") -> Run:
    """A script that makes all the calls itself; without `peer` in the project's own environment."""

    def run(trial: Trial) -> Measured:
        python = environments.python(peer) if peer else Path(sys.executable)
        with standing(*simulator) as stand:
            argv = [str(python), str(PEERS / script), stand.url, str(trial.bodies)]
            argv += [str(trial.jobs), str(trial.concurrency), *how.split()]
            with process(argv, {}, stand.folder) as caller:
                return watch(stand, [caller.pid]).until(trial.jobs, caller.alive)

    return run


def celery(how: str) -> Run:
    """Jobs queued as tasks, then the worker."""

    def run(trial: Trial) -> Measured:
        python = environments.python("celery")
        with standing() as stand:
            socket = Runtime.of(stand.folder / "data").socket
            variables = {"BENCH_REDIS": f"redis+socket://{socket}", "BENCH_HOW": how}
            script = [str(python), str(PEERS / "celery_queue.py"), stand.url, str(trial.bodies)]
            argv = [*script, str(trial.jobs), str(trial.concurrency)]
            with process([*argv, "submit"], variables, stand.folder) as submit:
                submit.done(SUBMIT_S)
            with process([*argv, "work"], variables, stand.folder) as worker:
                return watch(stand, [worker.pid], valkey=valkey(stand)).until(trial.jobs, worker.alive)

    return run


# -- mimoq


def bulk(*simulator: str, workers: int = 1, held: bool = False, **settings: Any) -> Run:
    """A batch, queued before the workers start; `held`, each has `concurrency` calls in flight, and no other limit."""

    def run(trial: Trial) -> Measured:
        limits: dict[str, Any] = {} if held else {"max_in_flight": trial.concurrency}
        with standing(*simulator, worker_max_in_flight=trial.concurrency, **limits, **settings) as stand:
            stand.producer.submit_many(trial.each())
            started = stand.workers("bulk", workers)
            looks = watch(stand, [worker.pid for worker in started], valkey=valkey(stand))
            return looks.until(trial.jobs, lambda: alive(started))

    return run


def singles_by_client(trial: Trial) -> Measured:
    """A Python program submits jobs one by one, then waits for each, while a worker answers."""
    with standing(max_in_flight=trial.concurrency, worker_max_in_flight=trial.concurrency) as stand:
        started = stand.workers("bulk", 1)
        data = str(stand.folder / "data")
        variables = {"MIMOQ_DATA_DIR": data, "MIMOQ_BASE_URL": stand.url, "MIMOQ_API_KEY": "bench"}
        argv = [sys.executable, "-P", "-m", "ops.bench.calls.singles", str(trial.bodies), str(trial.jobs)]
        with process(argv, variables, stand.folder) as producer:
            others = {"valkey": valkey(stand), PRODUCER: psutil.Process(producer.pid)}
            looks = watch(stand, [started[0].pid], **others)
            found = looks.until(trial.jobs, lambda: alive(started, producer), whole=True)
            producer.done(WAIT_S)  # it has had every answer, or this is no row
            try:
                cpu_s = float(producer.last_line())
            except ValueError:
                raise Broken(f"the producer said: {producer.last_line()}") from None
            return found._replace(cpu_ms=found.cpu_ms + cpu_s * 1e3 / trial.jobs)


def singles_by_api(waiting: bool) -> Run:
    """Jobs posted one by one to an API process, while a worker answers; `waiting`, by calls that wait for their answers.

    What posts them stands for many programs elsewhere, and is no cost of the row.
    """
    lane = "interactive" if waiting else "bulk"

    def asks(trial: Trial) -> Iterator[Ask]:
        for body in trial.each():
            if waiting:
                yield Ask("POST", "/v1/chat/completions", json.dumps(body))
            else:
                yield Ask("POST", "/v1/jobs", json.dumps({"request": body, "lane": lane}))

    def run(trial: Trial) -> Measured:
        limits: dict[str, Any] = {"max_in_flight": trial.concurrency, "worker_max_in_flight": trial.concurrency}
        with standing(**limits) as stand, api(stand) as (serving, port):
            started = stand.workers(lane, 1)
            plan = Plan(port, list(asks(trial)), connections=trial.concurrency if waiting else CONNECTIONS)
            token = {"MIMOQ_BENCH_TOKEN": tokens.create(stand.client, "bench")}
            argv = [sys.executable, "-P", "-m", "ops.bench.api_load"]
            with process(argv, token, stand.folder, msgspec.json.encode(plan)) as posts:
                others = {"valkey": valkey(stand), "api": serving, LOAD: psutil.Process(posts.pid)}
                looks = watch(stand, [started[0].pid], **others)
                return looks.until(trial.jobs, lambda: alive(started, posts), whole=True)

    return run
