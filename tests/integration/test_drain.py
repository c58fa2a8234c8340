"""How worker processes end, with calls in flight and while store or broker are away; and how they wait for these."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from jobs.connections import check_schema, connect
from jobs.settings import Settings
from jobs.store import NewBatch, Store
from jobs.workers import live_workers
from ops.simulator import RunningSimulator, running_simulator
from tests.components import Valkey
from tests.integration.worker_stand import CELERY, KEY, MODULE, SUPERVISOR, Process, Work, requests, working
from tests.waiting import wait_for
from worker.thread import EngineThread

TERM, INT, QUIT = signal.SIGTERM, signal.SIGINT, signal.SIGQUIT
#: Longer than any test waits: what ends sooner was not ended by the drain's time.
LONG = "120"


@pytest.fixture
def simulator() -> Iterator[RunningSimulator]:
    with running_simulator(key=KEY) as simulator:
        yield simulator


@pytest.fixture
def servers() -> Iterator[Callable[[], Valkey]]:
    """Makes servers of the test's own, which it may harm."""
    with ExitStack() as stack:

        def make() -> Valkey:
            server = Valkey(durable=True)
            stack.callback(server.stop)
            return server

        yield make


class Silence:
    """A bell that nobody hears."""

    def ring(self, batch_id: str, lane: str, upstream: str, times: int) -> None: ...

    def depth(self, lane: str, upstream: str) -> int:
        return 1


def held_up(work: Work, simulator: RunningSimulator, count: int = 40) -> str:
    """A batch of which 10 jobs are in flight, and stay so until the simulator lets go."""
    simulator.configure(hold=True)
    batch = work.submit(count)
    simulator.wait_until(lambda totals: totals.in_flight == 10)
    return batch


@pytest.mark.parametrize(
    ("argv", "signals"),
    [(CELERY, (INT, QUIT)), (MODULE, (TERM, TERM)), (SUPERVISOR, (INT, TERM))],
    ids=["celery", "module", "supervisor"],
)
def test_a_second_signal_ends_at_once_and_loses_nothing(
    argv: list[str], signals: tuple[int, int], simulator: RunningSimulator, store_url: str, tmp_path: Path
) -> None:
    each = "5" if argv is SUPERVISOR else "10"
    ready = argv is not MODULE  # whose engine has calls in flight while Celery is still on its way
    with working(argv, tmp_path, simulator, store_url, ready=ready, worker_max_in_flight=each, drain_s=LONG) as work:
        batch = held_up(work, simulator)
        work.process.told(signals[0])
        wait_for(lambda: work.store.status(batch).queued == 30, what="all that waited, given back")
        assert simulator.totals()["in_flight"] == 10, "calls in flight get their time"
        work.process.told(signals[1])
        work.process.ended(0)
        status = work.store.status(batch)
        assert (status.queued, status.running, status.failed) == (40, 0, 0), "given back, with no lease to run out"
        assert live_workers(work.store.client) == []
        assert "Ctrl+C" not in work.process.log.read_text(), "Celery's own handlers"
        if argv is MODULE:
            simulator.configure(hold=False)
            with working(MODULE, tmp_path, simulator, store_url, max_attempts="1"):
                work.succeeds(batch)  # so no attempt was counted


def test_a_third_signal_ends_it_as_it_is(
    simulator: RunningSimulator, servers: Callable[[], Valkey], tmp_path: Path
) -> None:
    server = servers()
    with working(MODULE, tmp_path, simulator, server.url, worker_max_in_flight="10", drain_s=LONG) as work:
        batch = held_up(work, simulator)
        server.pause()  # so that there is something to wait for
        for count, said in enumerate(("draining", "drain_ran_out"), 1):
            work.process.told()
            work.process.says(said)
            assert work.process.process.poll() is None, count
        work.process.told()
        work.process.ended(128 + TERM)
        server.go_on()
        status = work.store.status(batch)
        assert (status.queued + status.running, status.failed) == (40, 0), "their leases run out"


@pytest.mark.skipif(
    shutil.which("unshare") is None or os.geteuid() != 0, reason="needs a process id namespace of its own"
)
def test_the_first_process_of_a_container(simulator: RunningSimulator, store_url: str, tmp_path: Path) -> None:
    """Which the kernel spares every signal that it has no handler for."""
    before = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if subprocess.run([*before, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine gives no namespaces")
    with working(MODULE, tmp_path, simulator, store_url, before=before, worker_max_in_flight="10") as work:
        batch = held_up(work, simulator)
        (first,) = psutil.Process(work.process.process.pid).children()
        first.terminate()
        wait_for(lambda: work.store.status(batch).queued == 30, what="all that waited, given back")
        simulator.configure(hold=False)
        work.process.ended(0)
        status = work.store.status(batch)
        assert (status.queued, status.running, status.succeeded) == (30, 0, 10)


# -- the store is away


def test_answers_are_written_when_the_store_comes_back(
    simulator: RunningSimulator, servers: Callable[[], Valkey], tmp_path: Path
) -> None:
    server = servers()
    with working(MODULE, tmp_path, simulator, server.url, worker_max_in_flight="10") as work:
        batch = held_up(work, simulator)
        server.kill()
        work.process.told()
        work.process.says("draining")
        simulator.configure(hold=False)
        simulator.wait_until(lambda totals: totals.in_flight == 0)
        work.process.says("store_away")
        server.start()
        work.process.ended(0)
        status = work.store.status(batch)
        assert (status.queued, status.running, status.succeeded) == (30, 0, 10)


def test_a_drain_that_can_not_write_says_so(servers: Callable[[], Valkey], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.engine.WRITE_S", 0.1)
    monkeypatch.setattr("worker.thread.LEAVE_S", 0.1)
    server = servers()
    client = connect(server.url)
    check_schema(client)
    store = Store(client)
    deaths: list[str] = []
    settings = Settings(rpm=1, api_key=KEY)
    engine = EngineThread(settings, server.url, Silence(), lambda: deaths.append("died"))
    batch = store.submit(requests(2), NewBatch())[0]
    engine.start()
    engine.serve(["bulk"])
    wait_for(lambda: store.status(batch).running > 0, what="a claim")
    server.pause()
    engine.drain()
    engine.join()
    assert not engine.written
    assert deaths == []
    assert engine.ring("bulk") == 0, "a ring that comes too late"
    server.go_on()
    client.close()


def test_a_worker_waits_for_its_store(
    simulator: RunningSimulator, servers: Callable[[], Valkey], tmp_path: Path
) -> None:
    server = servers()
    with working(CELERY, tmp_path, simulator, server.url, ready=False) as work:
        server.kill()
        work.process.says("waiting_for_store")
        assert "check MIMOQ_REDIS_URL" in work.process.said("waiting_for_store")[0]["reason"]
        server.start()
        work.process.says("store_answers")
        work.succeeds(work.submit(3))
        assert work.process.end() == 0


def test_told_to_end_while_it_waits_for_its_store(tmp_path: Path) -> None:
    process = Process(CELERY, tmp_path, redis_url=f"unix://{tmp_path}/none", log_format="json")
    try:
        process.says("waiting_for_store")
        process.told()
        process.ended(0)
    finally:
        process.close()


# -- the broker is away


def heard(work: Work) -> None:
    """Rings reach the worker: looking by itself, it would leave them there."""
    work.bell.ring("no batch", "bulk", "", 3)
    wait_for(lambda: work.bell.depth("bulk", "") == 0, what="rings heard")


def test_rings_are_heard_again_after_the_broker_was_away(
    simulator: RunningSimulator, servers: Callable[[], Valkey], store_url: str, tmp_path: Path
) -> None:
    broker = servers()
    with working(
        MODULE, tmp_path, simulator, store_url, worker_max_in_flight="10", broker_url=celery_of(broker)
    ) as work:
        heard(work)
        # Cut with rings that wait for room: they are answered, and then acknowledged to nobody.
        simulator.configure(hold=True)
        cut = work.submit(200)
        simulator.wait_until(lambda totals: totals.in_flight > 0)
        broker.kill()
        simulator.configure(hold=False)
        work.succeeds(cut)
        # What is submitted meanwhile is found without being rung for.
        work.succeeds(work.submit(120, ring=False))
        broker.start()
        heard(work)
        assert work.process.end() == 0
        assert "Traceback" not in work.process.log.read_text()


@pytest.mark.parametrize(("argv", "away"), [(CELERY, "killed"), (MODULE, "silent")], ids=["killed", "silent"])
def test_a_broker_that_is_away_does_not_hold_up_the_end(
    argv: list[str],
    away: str,
    simulator: RunningSimulator,
    servers: Callable[[], Valkey],
    store_url: str,
    tmp_path: Path,
) -> None:
    broker = servers()
    with working(argv, tmp_path, simulator, store_url, worker_max_in_flight="10", broker_url=celery_of(broker)) as work:
        work.process.says("worker_ready")
        batch = held_up(work, simulator)
        if away == "killed":
            broker.kill()
        else:
            broker.pause()
        work.process.told()
        wait_for(lambda: work.store.status(batch).queued == 30, what="all that waited, given back")
        simulator.configure(hold=False)
        work.process.ended(0)
        assert work.store.status(batch).succeeded == 10


def test_a_worker_works_and_ends_without_ever_having_seen_a_broker(
    simulator: RunningSimulator, store_url: str, tmp_path: Path
) -> None:
    broker_url = f"redis+socket://{tmp_path}/none"
    with working(MODULE, tmp_path, simulator, store_url, broker_url=broker_url) as work:
        work.succeeds(work.submit(120, ring=False))
        assert work.process.end() == 0


def celery_of(server: Valkey) -> str:
    return "redis+socket://" + server.url.removeprefix("unix://")
