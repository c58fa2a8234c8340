"""Rings on a real broker: how they get there, and what they carry."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from kombu import pools
from kombu.connection import Connection
from kombu.entity import Exchange
from kombu.exceptions import BatchPublishError

from jobs import identity
from jobs.broker import RING, Bell, make_app
from jobs.connections import celery_url, check_schema, connect
from jobs.errors import SchemaVersionError, StoreUnavailable
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


def test_a_ring_is_the_message_that_celery_sends(any_app: Celery) -> None:
    """Made apart from it, because Celery takes its time; but for their ids all are alike."""
    any_app.send_task(RING, ("b1",), queue="mimoq.bulk", ignore_result=True)
    bell = Bell(any_app)
    bell.ring("b1", "bulk", "", 2)
    deep(bell, "bulk", "", 3)
    found = []
    with any_app.connection_for_write() as connection:
        for _ in range(3):
            message: Any = connection.default_channel.basic_get("mimoq.bulk", no_ack=True)
            own = message.headers.pop("id")
            assert own == message.headers.pop("root_id") == message.properties.pop("correlation_id")
            message.properties.pop("delivery_tag", None)
            found.append((own, message.body, message.content_type, message.headers, message.properties))
    assert len({own for own, *_ in found}) == 3
    assert found[0][1:] == found[1][1:] == found[2][1:]


def test_a_queue_is_named_after_its_lane(app: Celery, client: Any) -> None:
    bell = Bell(app)
    bell.ring("b1", "bulk", "", 3)
    bell.ring("b3", "bulk", identity.SIMULATED, 2)
    assert client.llen("mimoq.bulk") == 3
    assert client.llen("mimoq.simulate.bulk") == 2


def queue_type(url: str, name: str) -> str:
    """What a queue of RabbitMQ is; "missing" where there is none."""
    with Connection(url) as connection, connection.channel() as channel:
        try:
            channel.queue_declare(name, passive=True)
            channel.queue_declare(name, durable=True, auto_delete=False, arguments={"x-queue-type": "classic"})
        except connection.channel_errors as error:
            return "missing" if "NOT_FOUND" in str(error) else "quorum"
    return "classic"


def removed(app: Celery, *names: str) -> None:
    """No queue of these names is there any longer."""
    with app.connection_for_write() as connection:
        for name in names:
            app.amqp.queues[name](connection.default_channel).delete()


def plain_app(url: str, **settings: Any) -> Celery:
    """Another app, which knows nothing of this project."""
    app = Celery("plain", broker=url, set_as_current=False)
    app.conf.update(settings)
    return app


@pytest.mark.parametrize("wanted", ["quorum", "classic"])
def test_a_missing_queue_is_made_of_the_type_that_is_set(rabbitmq: RabbitMQ, store_url: str, wanted: Any) -> None:
    ours = make_app(Settings(broker_url=rabbitmq.url, queue_type=wanted), store_url)
    removed(ours, "mimoq.bulk", "celery")
    Bell(ours).ring("b", "bulk", "", 1)
    assert queue_type(rabbitmq.url, "mimoq.bulk") == wanted
    ours.send_task("callers.task", ignore_result=True)
    assert queue_type(rabbitmq.url, "celery") == "classic", "another app's is as it would make it"
    ours.close()


@pytest.mark.parametrize(("theirs", "wanted"), [("classic", "quorum"), ("quorum", "classic")])
def test_another_apps_queues_are_used_as_they_are(rabbitmq: RabbitMQ, store_url: str, theirs: str, wanted: Any) -> None:
    """Both those it rings on and those that our messages for it go to, the exchange's type included."""
    ours = make_app(Settings(broker_url=rabbitmq.url, queue_type=wanted), store_url)
    plain = plain_app(
        rabbitmq.url, task_create_missing_queue_type=theirs, task_default_queue=theirs, task_default_queue_type=theirs
    )
    removed(ours, "mimoq.bulk")
    plain.send_task(RING, ("b1",), queue="mimoq.bulk", ignore_result=True)
    plain.send_task("callers.task", ignore_result=True)
    Bell(ours).ring("b1", "bulk", "", 1)
    for sender in (ours, plain):
        sender.send_task("callers.task", queue=theirs, ignore_result=True)
        sender.send_task(RING, ("b1",), queue="mimoq.bulk", ignore_result=True)
    deep(Bell(ours), "bulk", "", 4)
    with ours.connection_for_write() as connection:
        wait_for(lambda: connection.default_channel.queue_declare(theirs, passive=True).message_count == 3)
    assert {queue_type(rabbitmq.url, name) for name in ("mimoq.bulk", theirs)} == {theirs}
    removed(ours, theirs)
    plain.close()
    ours.close()


def test_an_app_that_finds_our_quorum_queue_must_say_so(rabbitmq: RabbitMQ, store_url: str) -> None:
    ours = make_app(Settings(broker_url=rabbitmq.url), store_url)
    removed(ours, "mimoq.complete")
    ours.send_task("any", queue="mimoq.complete", ignore_result=True)
    plain, told = plain_app(rabbitmq.url), plain_app(rabbitmq.url, task_create_missing_queue_type="quorum")
    with pytest.raises(Exception, match="PRECONDITION_FAILED"):
        plain.send_task("any", queue="mimoq.complete", ignore_result=True)
    told.send_task("any", queue="mimoq.complete", ignore_result=True)
    deep(Bell(ours), "complete", "", 2)
    for app in (ours, plain, told):
        app.close()


@pytest.mark.parametrize(("there", "wanted"), [("classic", "quorum"), ("quorum", "classic")])
def test_a_worker_hears_a_queue_of_either_type(
    rabbitmq: RabbitMQ, store_url: str, tmp_path: Path, there: Any, wanted: str
) -> None:
    """A quorum queue would end the connection of a consumer that sets a prefetch count for its whole channel."""
    first = make_app(Settings(broker_url=rabbitmq.url, queue_type=there), store_url)
    removed(first, "mimoq.bulk")
    Bell(first).ring("no batch", "bulk", "", 9)
    first.close()
    more: dict[str, Any] = {"broker_url": rabbitmq.url, "queue_type": wanted}
    with running_simulator() as simulator, working(MODULE, tmp_path, simulator, store_url, **more) as work:
        deep(work.bell, "bulk", "", 0)
        work.succeeds(work.submit(120))
        deep(work.bell, "bulk", "", 0)
        assert work.process.end() == 0
        log = work.process.log.read_text()
        assert "celery_delayed" not in log
        assert "connection_lost" not in log
        assert "Connection to broker lost" not in log
    assert queue_type(rabbitmq.url, "mimoq.bulk") == there
    assert queue_type(rabbitmq.url, "celery_delayed_0") == "missing"


def test_what_others_send_to_their_exchange_never_gets_to_us(any_app: Celery) -> None:
    """Celery by itself would bind every queue that names no exchange to that of the default queue."""
    Bell(any_app).ring("b", "bulk", "", 1)
    with any_app.connection_for_write() as connection:
        theirs = Exchange("celery")(connection.default_channel)
        theirs.declare()
        connection.Producer(exchange=theirs).publish("theirs", routing_key="celery")
    any_app.send_task("callers.task", ignore_result=True)
    deep(Bell(any_app), "bulk", "", 1)


def test_nobody_consumes_what_is_not_ours(app: Celery) -> None:
    assert app.conf.task_default_queue == "celery"
    assert app.amqp.default_queue.name == "celery"
    assert {name.split(".")[0] for name in app.amqp.queues.consume_from} == {"mimoq"}
    assert len(app.amqp.queues.consume_from) == 6
    assert make_app(Settings(default_queue="theirs"), "unix:///s").amqp.default_queue.name == "theirs"


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


def test_options_of_a_tcp_store() -> None:
    app = make_app(Settings(broker_url="rediss://h/0"), "redis://h:1/0")
    assert app.conf.broker_transport_options["socket_keepalive"] is True
    assert app.conf.broker_transport_options["ack_emulation"] is False
    assert connect("redis://h:1/0").connection_pool.connection_kwargs["socket_keepalive"] is True
    rabbitmq = make_app(Settings(broker_url="amqp://h"), "unix:///s").conf.broker_transport_options
    assert rabbitmq == {"read_timeout": 30.0, "write_timeout": 30.0, "confirm_publish": True}
    pipelines = make_app(Settings(), "redis://h:1/0", acknowledges=True).conf.broker_transport_options
    assert pipelines["ack_emulation"] is True
    assert pipelines["unacked_key"] == "mimoq:unacked", "other apps on this Redis give back by another timeout"
