"""What every broker must stand: Redis (or Valkey) and RabbitMQ, in the clear and over TLS, under real worker processes.

The store is another server, so a broker that is away takes nothing with it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kombu import pools

from jobs.broker import Bell, make_app
from jobs.connections import check_schema, connect
from jobs.errors import StoreRefused, StoreUnavailable, UsageError
from jobs.settings import Settings
from ops.simulator import RunningSimulator, running_simulator
from tests.components import RabbitMQ, Valkey
from tests.integration.worker_stand import MODULE, PATIENCE_S, Work, working
from tests.waiting import wait_for

KINDS = ["redis", "redis over TLS", "rabbitmq", "rabbitmq over TLS"]
IN_THE_CLEAR = ["redis", "rabbitmq"]
#: Enough that a batch is under way while a broker is killed: two jobs are called at a time.
JOBS = 120

Server = Valkey | RabbitMQ


class Broker:
    """One kind of broker: its server, and the address that workers are given."""

    def __init__(self, server: Server, url: str) -> None:
        self.server = server
        self.url = url


@pytest.fixture(scope="module")
def redis() -> Iterator[Valkey]:
    """A Valkey that is nothing but a broker, and keeps what it is told over its death."""
    server = Valkey(durable=True, secure=True)
    yield server
    server.stop()


@pytest.fixture
def broker(request: pytest.FixtureRequest) -> Iterator[Broker]:
    """The broker of the test's kind, without a message in it."""
    kind = request.param
    server: Any = request.getfixturevalue(kind.split()[0])
    plain = server.url.replace("unix://", "redis+socket://")
    found = Broker(server, server.tls_url if kind.endswith("TLS") else plain)
    if isinstance(server, Valkey):
        server.flush()
    else:
        app = make_app(Settings(broker_url=found.url), "unix:///none")
        with app.connection_for_write() as connection:
            for queue in app.conf.task_queues:
                # Not deleted: RabbitMQ 3.10 never serves a quorum queue again if it is killed in the moment it makes it.
                bound = queue(connection.default_channel)
                bound.declare()
                bound.purge()
        app.close()
    yield found
    pools.reset()


@pytest.fixture
def simulator() -> Iterator[RunningSimulator]:
    with running_simulator() as running:
        yield running


def deep(bell: Bell, rings: int, lane: str = "bulk") -> None:
    """So many messages wait there; RabbitMQ counts one a moment after it was sent."""
    wait_for(lambda: bell.depth(lane, "") == rings, PATIENCE_S, f"{rings} messages")


def hears(work: Work) -> None:
    """Waits until rings that nobody would look for by himself have been taken."""
    work.bell.ring("no batch", "bulk", "", 3)
    deep(work.bell, 0)


def paid_once(simulator: RunningSimulator, *batches: int) -> None:
    """Every job of these batches, whose first jobs are alike."""
    assert sorted(simulator.ledger()["paid"].values()) == sorted(
        sum(job < jobs for jobs in batches) for job in range(max(batches))
    )


@pytest.mark.parametrize("broker", KINDS, indirect=True)
def test_a_batch_is_rung_for_and_runs_to_its_end(
    broker: Broker, simulator: RunningSimulator, store_url: str, tmp_path: Path
) -> None:
    with working(MODULE, tmp_path, simulator, store_url, ready=False, broker_url=broker.url) as work:
        batch = work.submit(JOBS)
        work.bell.ring("no batch", "interactive", "", 3)
        work.succeeds(batch)
        deep(work.bell, 0)
        hears(work)
        deep(work.bell, 3, "interactive")  # which this worker does not serve
        assert work.process.end() == 0
        paid_once(simulator, JOBS)
        log = work.process.log.read_text()
        assert Valkey.PASSWORD not in log
        assert "nobody%20may%20see" not in log


def test_one_address_over_tls_serves_for_all(redis: Valkey, simulator: RunningSimulator, tmp_path: Path) -> None:
    """Store, broker and results, with a user and a password, in sync and async clients, kombu and Celery."""
    redis.flush()
    with working(MODULE, tmp_path, simulator, redis.tls_url) as work:
        batch = work.submit(JOBS)
        work.succeeds(batch)
        hears(work)
        assert work.app.AsyncResult(f"{batch}-0").get(timeout=10)["choices"]
        assert work.process.end() == 0
        paid_once(simulator, JOBS)
        log = work.process.log.read_text()
        assert Valkey.PASSWORD not in log
        assert "nobody%20may%20see" not in log
    pools.reset()


@pytest.mark.parametrize("broker", ["redis over TLS", "rabbitmq over TLS"], indirect=True)
def test_a_certificate_nobody_vouches_for_is_told_in_a_line(broker: Broker) -> None:
    address = broker.url.split("?")[0]
    app = make_app(Settings(broker_url=address), "unix:///none")
    with pytest.raises(StoreUnavailable, match="the broker's certificate is not trusted: check MIMOQ_BROKER_URL"):
        Bell(app).ring("b", "bulk", "", 1)
    app.close()
    if isinstance(broker.server, Valkey):
        with pytest.raises(StoreRefused, match="Redis's certificate is not trusted: check MIMOQ_REDIS_URL"):
            check_schema(connect(address))
    with pytest.raises(UsageError, match="ssl_ca_certs names no file that is there"):
        make_app(Settings(broker_url=f"{address}?ssl_ca_certs=/nowhere"), "unix:///none")


@pytest.mark.parametrize("broker", IN_THE_CLEAR, indirect=True)
def test_a_broker_that_dies_in_the_middle_takes_nothing_with_it(
    broker: Broker, simulator: RunningSimulator, store_url: str, tmp_path: Path
) -> None:
    with working(MODULE, tmp_path, simulator, store_url, broker_url=broker.url, worker_max_in_flight="2") as work:
        batch = work.submit(JOBS)
        simulator.wait_until(lambda totals: totals.arrived > 4)
        broker.server.kill()
        with pytest.raises(StoreUnavailable, match="check MIMOQ_BROKER_URL"):
            work.bell.ring("b", "bulk", "", 1)
        with pytest.raises(StoreUnavailable, match="check MIMOQ_BROKER_URL"):
            work.bell.depth("bulk", "")
        work.succeeds(batch)
        work.succeeds(work.submit(10, ring=False))
        broker.server.start()
        hears(work)
        assert work.process.end() == 0
        paid_once(simulator, JOBS, 10)


@pytest.mark.parametrize("broker", IN_THE_CLEAR, indirect=True)
def test_a_broker_that_is_down_at_the_start_is_heard_once_it_is_there(
    broker: Broker, simulator: RunningSimulator, store_url: str, tmp_path: Path
) -> None:
    broker.server.kill()
    with working(MODULE, tmp_path, simulator, store_url, broker_url=broker.url) as work:
        work.succeeds(work.submit(JOBS, ring=False))
        broker.server.start()
        hears(work)
        assert work.process.end() == 0
        paid_once(simulator, JOBS)


@pytest.mark.parametrize("broker", IN_THE_CLEAR, indirect=True)
def test_a_broker_that_says_nothing_stops_no_work(
    broker: Broker, simulator: RunningSimulator, store_url: str, tmp_path: Path
) -> None:
    with working(MODULE, tmp_path, simulator, store_url, broker_url=broker.url, worker_max_in_flight="2") as work:
        batch = work.submit(JOBS)
        simulator.wait_until(lambda totals: totals.arrived > 4)
        broker.server.pause()
        try:
            work.succeeds(batch)
            work.succeeds(work.submit(10, ring=False))
        finally:
            broker.server.go_on()
        hears(work)
        assert work.process.end() == 0
        paid_once(simulator, JOBS, 10)


HOLDER = r"""
import os
import sys
from jobs.broker import make_app
from jobs.settings import load_settings

app = make_app(load_settings(), "unix:///none", acknowledges=True)
options = app.conf.broker_transport_options
if "visibility_timeout" in options:
    # In its own time a message comes again after minutes.
    app.conf.broker_transport_options = {**options, "visibility_timeout": 1, "unacked_restore_interval": 0.1}


@app.task(name="test.held")
def held(number):
    os.write(1, f"held {number}\n".encode())  # at once: another thread prints too
    if sys.argv[1] == "holds":
        import threading

        threading.Event().wait()


app.Worker(
    pool_cls="threads", concurrency=2, queues=["mimoq.complete"], quiet=True, without_gossip=True, without_mingle=True
).start()
"""


class Holder:
    """A process that takes messages off `mimoq.complete`, and `holds` them for ever or `ends` each at once."""

    def __init__(self, broker: Broker, folder: Path, does: str) -> None:
        self.said = folder / does
        with self.said.open("wb") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", HOLDER, does],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                env=os.environ | {"MIMOQ_BROKER_URL": broker.url},
            )

    def has(self, *numbers: int) -> None:
        """Waits until it has had these messages."""
        wanted = {f"held {number}" for number in numbers}

        def had() -> bool:
            return wanted <= set(self.said.read_text(errors="replace").splitlines())

        with contextlib.suppress(AssertionError):
            wait_for(lambda: had() or self.process.poll() is not None, PATIENCE_S)
        assert had(), self.said.read_text(errors="replace")

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.mark.parametrize("broker", IN_THE_CLEAR, indirect=True)
def test_what_a_killed_process_had_not_acked_comes_again(broker: Broker, tmp_path: Path) -> None:
    """Until it is acked a message counts against the prefetch count, so a process has only those that it works on."""
    app = make_app(Settings(broker_url=broker.url), "unix:///none")
    for number in range(6):
        app.send_task("test.held", (number,), queue="mimoq.complete", ignore_result=True)
    holder = Holder(broker, tmp_path, "holds")
    other = None
    try:
        holder.has(0, 1)
        deep(Bell(app), 4, "complete")
        holder.kill()
        other = Holder(broker, tmp_path, "ends")
        other.has(*range(6))
        deep(Bell(app), 0, "complete")
    finally:
        for process in (holder, other):
            if process is not None:
                process.kill()
        app.close()


def taken(bell: Bell) -> bool:
    """Whether the message on the queue goes to somebody who has asked for one."""
    try:
        wait_for(lambda: bell.depth("complete", "") == 0, 0.5)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("broker", IN_THE_CLEAR, indirect=True)
def test_a_message_on_its_way_to_a_killed_process_comes_again(broker: Broker, tmp_path: Path) -> None:
    """Redis has handed it out, and the process can't have done anything about it: it is suspended, then killed."""
    app = make_app(Settings(broker_url=broker.url), "unix:///none")
    bell = Bell(app)
    holder = Holder(broker, tmp_path, "ends")
    other = None
    try:
        for number in range(50):
            if number:
                holder.pause()
            app.send_task("test.held", (number,), queue="mimoq.complete", ignore_result=True)
            if number and taken(bell):
                break
            holder.go_on()  # it was suspended a moment before it asked for more
            holder.has(number)
        holder.kill()
        (tmp_path / "ends").rename(tmp_path / "first")
        other = Holder(broker, tmp_path, "ends")
        other.has(number)
    finally:
        for process in (holder, other):
            if process is not None:
                process.kill()
        app.close()


@pytest.mark.parametrize("memory", ["0", "1"], ids=["with room", "out of memory"])
def test_messages_are_taken_the_most_urgent_first_whole_and_once(redis: Valkey, memory: str) -> None:
    """By the script, which keeps their text as it is, and also where Redis lets nobody wait for them."""
    redis.flush()
    client = connect(redis.url)
    app = make_app(Settings(broker_url=redis.url.replace("unix://", "redis+socket://")), "", acknowledges=True)
    texts = {0: [[], {}, 12345678901234567890], 3: "\u0000 \U0001f600 \\", 9: None}
    had: list[Any] = []

    def hear(body: Any, message: Any) -> None:
        assert client.hexists("mimoq:unacked", message.delivery_tag)
        had.append(body)
        message.ack()

    with app.connection_for_write() as connection:
        for priority, text in texts.items():
            connection.Producer().publish(text, routing_key="mimoq.complete", priority=priority)
        client.config_set("maxmemory", memory)
        try:
            with connection.Consumer([app.amqp.queues["mimoq.complete"]], callbacks=[hear]):
                while len(had) < len(texts):
                    connection.drain_events(timeout=10)
        finally:
            client.config_set("maxmemory", "0")
    assert sorted(map(str, had)) == sorted(map(str, texts.values()))
    assert client.keys("mimoq*") == []
    client.close()
    app.close()
    pools.reset()
