"""The same batch on every pair of broker and result backend: workers, broker, store and results are harmed as it goes on.

What is harmed comes at shares of the batch that are done, so each harm meets work under way, however slow the machine.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from random import Random
from typing import NamedTuple

from jobs.requests import CHAT
from ops.simulator.ledger import Totals
from tests.chaos import trial
from tests.chaos.oracle import judge
from tests.chaos.plan import Batch
from tests.chaos.play import BROKER_KEYS
from tests.chaos.spans import Span
from tests.chaos.stand import Stand
from tests.chaos.trial import Result
from tests.chaos.workers import Life
from tests.components import PostgreSQL, RabbitMQ
from tests.waiting import wait_for

JOBS = 5_000
LIMIT = 210
MAX_ATTEMPTS = 5
#: Seconds in which the next share of the batch must be done.
PATIENCE_S = 120.0
#: No 429: at random they are no limit, and what would be learned of them makes the batch take minutes.
FAULTS = {
    "500": 0.01,
    "503": 0.01,
    "400_backend": 0.005,
    "reset": 0.01,
    "not_json": 0.005,
    "truncated": 0.01,
    "thinking_only": 0.01,
    "sse_error": 0.01,
    "stream_cut": 0.02,
}


class Backends(NamedTuple):
    """Where rings and results go; None: to the store's Redis."""

    broker: RabbitMQ | None
    results: PostgreSQL | None

    def settings(self) -> dict[str, str]:
        """What tells mimoq so."""
        told = {"broker_url": self.broker, "result_backend": self.results}
        return {name: server.url for name, server in told.items() if server is not None}


def run(backends: Backends, seed: int, say: Callable[[str], None]) -> Result:
    """The batch from its submit to its end. Raises `trial.Stalled`."""
    begun = time.monotonic()
    simulator = {"latency": 0.8, "latency_p99": 2.0, "answer_bytes": 300, "faults": FAULTS, "seed": seed}
    settings = {"max_in_flight": LIMIT, "max_attempts": MAX_ATTEMPTS, "drain_s": 3.0, **backends.settings()}
    batch = Batch(0, JOBS, "bulk", CHAT, False, None)
    with Stand(("bulk",) * 2, simulator, settings) as stand:
        harms = Harms(stand, backends, Random(f"backends {seed}"))
        stand.producers.submit(batch)
        stand.start_workers()
        for answered, harm in harms.planned():
            stand.sim.wait_until(partial(_answered, answered), PATIENCE_S)
            say(f"{time.monotonic() - begun:8.2f} s  {harm()}")
        trial.settle(stand)
        say(f"{time.monotonic() - begun:8.2f} s  the batch has finished")
        evidence = trial.close(stand, [batch], LIMIT, MAX_ATTEMPTS)
    return Result(judge(evidence), harms.counts, time.monotonic() - begun)


def _answered(least: int, totals: Totals) -> bool:
    return totals.answered >= least


class Harms:
    """What is done to a stand, each with its line for people."""

    def __init__(self, stand: Stand, backends: Backends, random: Random) -> None:
        self._stand = stand
        self._backends = backends
        self._random = random
        self.counts: Counter[str] = Counter()

    def planned(self) -> Iterator[tuple[int, Callable[[], str]]]:
        """Numbers of answers, and what is done when so many have been given."""
        harms = [
            self.kill_worker,
            self.harm_broker,
            self.kill_store,
            self.harm_results,
            self.drain_worker,
            self.kill_worker,
        ]
        for number, harm in enumerate(harms):
            yield round(JOBS * (0.08 + 0.14 * number + self._random.uniform(0, 0.04))), harm
            self.counts[harm.__name__] += 1

    def _someone(self) -> tuple[int, Life]:
        place = self._random.randrange(len(self._stand.workers.places))
        life = self._stand.workers.places[place]
        assert life is not None, "a worker ended by itself"
        return place, life

    def kill_worker(self) -> str:
        place, life = self._someone()
        self._stand.workers.kill(life)
        self._stand.workers.start(place)
        self._stand.wait_for_workers()
        return f"{life.name} killed, and another started"

    def drain_worker(self) -> str:
        place, life = self._someone()
        self._stand.workers.tell(life)
        self._stand.workers.start(place)
        self._stand.wait_for_workers()
        return f"{life.name} told to end, and another started"

    def harm_broker(self) -> str:
        if self._backends.broker is None:
            self._stand.valkey.ask(f"DEL {BROKER_KEYS}")
            return "every ring removed from Redis"
        self._backends.broker.kill()
        self._backends.broker.start()
        return "RabbitMQ killed and started again"

    def kill_store(self) -> str:
        valkey = self._stand.valkey
        valkey.kill()
        time.sleep(self._random.uniform(0.5, 2.0))
        valkey.start()
        wait_for(valkey.look, what="an answer of the store")
        return "the store killed and started again"

    def harm_results(self) -> str:
        seconds = self._random.uniform(2.0, 5.0)
        if self._backends.results is None:
            self._stand.valkey.pause()
            time.sleep(seconds)
            self._stand.valkey.resume()
            wait_for(self._stand.valkey.look, what="an answer of the store")
            return f"the store paused for {seconds:.1f} s, with its results"
        with self._away():
            self._backends.results.kill()
            time.sleep(seconds)
            self._backends.results.start()
        return f"PostgreSQL killed and started again after {seconds:.1f} s"

    @contextlib.contextmanager
    def _away(self) -> Iterator[None]:
        span = Span(time.time())
        self._stand.results_away.append(span)
        yield
        span.end = time.time()
