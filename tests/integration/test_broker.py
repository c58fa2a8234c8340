"""Rings on a real broker: how they get there, and what they carry."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from kombu import pools
from kombu.exceptions import BatchPublishError

from jobs import identity
from jobs.broker import RING, Bell, make_app
from jobs.connections import celery_url, check_schema, connect, results_url
from jobs.errors import SchemaVersionError, StoreUnavailable, UsageError
from jobs.settings import Settings
from ops.simulator import running_simulator
from tests.components import RabbitMQ
from tests.integration.worker_stand import MODULE, working
from tests.waiting import wait_for


@pytest.fixture(autouse=True)
def _no_pools_left() -> Iterator[None]:
    """kombu keeps one pool a broker address for the whole process."""
    yield
    pools.reset()


@pytest.fixture(scope="module")
def rabbitmq() -> Iterator[RabbitMQ]:
    """One for all of these tests: it takes seconds to start."""
    server = RabbitMQ()
    yield server
    server.stop()


@pytest.fixture
def app(store_url: str) -> Iterator[Celery]:
    app = make_app(Settings(), store_url)
    yield app
    app.close()


@pytest.fixture(params=["redis", "rabbitmq"])
def any_app(request: pytest.FixtureRequest, store_url: str) -> Iterator[Celery]:
    """The app on each kind of broker, its queues empty."""
    url = None if request.param == "redis" else request.getfixturevalue("rabbitmq").url
    app = make_app(Settings(broker_url=url), store_url)
    with app.connection_for_write() as connection:
        for queue in app.conf.task_queues:
            queue(connection.default_channel).delete()
    yield app
    app.close()


@pytest.fixture
def client(store_url: str) -> Iterator[Any]:
    client = connect(store_url)
    yield client
    client.close()


def deep(bell: Bell, lane: str, upstream: str, rings: int) -> None:
    """So many rings wait there; RabbitMQ counts one a moment after it was sent."""
    wait_for(lambda: bell.depth(lane, upstream) == rings, what=f"{rings} rings")


def test_one_ring_a_slice_on_the_queue_of_the_lane(any_app: Celery) -> None:
    bell = Bell(any_app)
    assert bell.depth("bulk", "") == 0, "a queue that nobody has used yet is silent"
    bell.ring("b1", "bulk", "", 3)
    bell.ring("b2", "interactive", "", 1)
    bell.ring("b3", "bulk", identity.SIMULATED, 2)
    bell.ring("b4", "bulk", "", 0)
    deep(bell, "bulk", "", 3)
    deep(bell, "bulk", "any other upstream", 3)
    deep(bell, "interactive", "", 1)
    deep(bell, "bulk", identity.SIMULATED, 2)


def test_more_rings_than_one_block(any_app: Celery) -> None:
    bell = Bell(any_app)
    bell.ring("b1", "bulk", "", 1_203)
    deep(bell, "bulk", "", 1_203)


def test_a_queue_is_named_after_its_lane(app: Celery, client: Any) -> None:
    bell = Bell(app)
    bell.ring("b1", "bulk", "", 3)
    bell.ring("b3", "bulk", identity.SIMULATED, 2)
    assert client.llen("mimoq.bulk") == 3
    assert client.llen("mimoq.simulate.bulk") == 2


@pytest.mark.parametrize("ours_first", [True, False])
def test_another_app_may_ring_too(rabbitmq: RabbitMQ, store_url: str, ours_first: bool) -> None:
    """Without our settings it declares a queue of that name by its name alone, which must be the same queue."""
    ours = make_app(Settings(broker_url=rabbitmq.url), store_url)
    plain = Celery("plain", broker=rabbitmq.url, set_as_current=False)
    with ours.connection_for_write() as connection:
        ours.amqp.queues["mimoq.bulk"](connection.default_channel).delete()
    for app in (ours, plain) if ours_first else (plain, ours):
        app.send_task(RING, ("b1",), queue="mimoq.bulk", ignore_result=True)
    deep(Bell(ours), "bulk", "", 2)
    plain.close()
    ours.close()


def test_a_worker_hears_rabbitmq_again_when_it_is_back(rabbitmq: RabbitMQ, store_url: str, tmp_path: Path) -> None:
    with (
        running_simulator() as simulator,
        working(MODULE, tmp_path, simulator, store_url, broker_url=rabbitmq.url) as work,
    ):
        work.succeeds(work.submit(120))
        deep(work.bell, "bulk", "", 0)
        rabbitmq.kill()
        with pytest.raises(StoreUnavailable, match="check MIMOQ_BROKER_URL"):
            work.bell.ring("b", "bulk", "", 1)
        with pytest.raises(StoreUnavailable, match="check MIMOQ_BROKER_URL"):
            work.bell.depth("bulk", "")
        work.succeeds(work.submit(120, ring=False))
        rabbitmq.start()
        # Looking by itself, the worker would leave them there.
        work.bell.ring("no batch", "bulk", "", 3)
        deep(work.bell, "bulk", "", 0)
        assert work.process.end() == 0


def test_a_ring_is_small_and_carries_ids_only(app: Celery, client: Any) -> None:
    Bell(app).ring("0123456789abcdef01234567", "bulk", "", 1)
    raw = client.lindex("mimoq.bulk", 0)
    message = json.loads(raw)
    assert message["headers"]["task"] == RING
    assert message["headers"]["ignore_result"] is True
    assert len(raw) < 1_400
    names = {name.decode() for name in client.keys("*")}
    assert not [name for name in names if "celery-task-meta" in name or "unacked" in name]


@pytest.mark.parametrize("broker", ["redis://127.0.0.1:1/0", "redis+socket:///tmp/none/none.sock"])
def test_a_broker_that_is_away_is_one_clear_error(store_url: str, broker: str) -> None:
    app = make_app(Settings(broker_url=broker), store_url)
    with pytest.raises(StoreUnavailable, match="check MIMOQ_BROKER_URL"):
        Bell(app).ring("b", "bulk", "", 1)


def test_a_broker_that_goes_away_in_the_middle_of_a_block_is_the_same_error() -> None:
    with pytest.raises(StoreUnavailable, match="BatchPublishError"), Bell._errors():
        raise BatchPublishError("3 of 500")


def test_a_broker_address_never_shows(store_url: str) -> None:
    app = make_app(Settings(broker_url="redis://:secret@127.0.0.1:1/0"), store_url)
    with pytest.raises(StoreUnavailable) as caught:
        Bell(app).ring("b", "bulk", "", 1)
    assert "secret" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_the_schema_is_marked_once_and_a_newer_one_refused(client: Any, tmp_path: Any) -> None:
    check_schema(client)
    check_schema(client)
    for found in ("2", "junk"):
        client.set("mimoq:schema", found)
        with pytest.raises(SchemaVersionError, match=f"schema version {found}, this mimoq reads 1"):
            check_schema(client)
    with pytest.raises(StoreUnavailable, match="check MIMOQ_REDIS_URL"):
        check_schema(connect(f"unix://{tmp_path}/none"))


@pytest.mark.parametrize(
    ("url", "celery"),
    [
        ("redis://h:1/2", "redis://h:1/2"),
        ("unix:///a/b.sock", "redis+socket:///a/b.sock?virtual_host=0"),
        ("unix:///a/b.sock?db=3", "redis+socket:///a/b.sock?virtual_host=3"),
        ("rediss://h/0", "rediss://h/0?ssl_cert_reqs=required"),
        ("rediss://h/0?x=1", "rediss://h/0?x=1&ssl_cert_reqs=required"),
        ("rediss://h/0?ssl_cert_reqs=none", "rediss://h/0?ssl_cert_reqs=none"),
    ],
)
def test_celerys_spelling_of_an_address(url: str, celery: str) -> None:
    assert celery_url(url) == celery


@pytest.mark.parametrize(
    ("backend", "expected"),
    [
        (None, "unix:///s"),
        ("redis://r/1", "redis://r/1"),
        ("redis+socket:///a.sock?virtual_host=2", "unix:///a.sock?db=2"),
        ("redis+socket:///a.sock", "unix:///a.sock"),
    ],
)
def test_where_results_are(backend: str | None, expected: str) -> None:
    settings = Settings(result_backend=backend)
    assert results_url(settings, "unix:///s") == expected


def test_another_kind_of_result_backend_is_refused() -> None:
    with pytest.raises(UsageError, match="MIMOQ_RESULT_BACKEND"):
        results_url(Settings(result_backend="db+sqlite:///x"), "unix:///s")


def test_options_of_a_tcp_store() -> None:
    app = make_app(Settings(broker_url="rediss://h/0"), "redis://h:1/0")
    assert app.conf.broker_transport_options["socket_keepalive"] is True
    assert app.conf.broker_transport_options["ack_emulation"] is False
    assert connect("redis://h:1/0").connection_pool.connection_kwargs["socket_keepalive"] is True
    rabbitmq = make_app(Settings(broker_url="amqp://h"), "unix:///s").conf.broker_transport_options
    assert rabbitmq == {"read_timeout": 30.0, "write_timeout": 30.0}
