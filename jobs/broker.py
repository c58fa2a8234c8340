"""The Celery app and the bell: how rings get onto the queues and how deep these are.

A ring says "there is a ready slice on this lane" and carries ids only. Nothing depends on it: a lost one is replaced by
the reaper, a surplus one finds nothing, and while none are heard workers look for themselves.

What goes wrong: the broker is away. Workers connect again for ever, every 2 s at first, every 30 s at last; whoever rings
is told at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from jobs import identity
from jobs.connections import celery_url
from jobs.errors import StoreUnavailable
from jobs.keys import LANES
from jobs.settings import Settings

if TYPE_CHECKING:
    from celery import Celery

RING = "mimoq.ring"
#: Rings flushed to the broker together.
RING_BLOCK = 500
#: What RabbitMQ makes of our queues; Redis has but one kind. A ring may be lost, so it needs no replicas. Said in so many
#: words, it is the same queue that another app's `send_task` declares by saying nothing, and also where the default of
#: the virtual host is another type, which Celery would have to be told of (no global QoS).
QUEUE_ARGUMENTS = {"x-queue-type": "classic"}
#: Seconds after which a silent RabbitMQ counts as gone.
SILENT_S = 30.0


def make_app(settings: Settings, redis_url: str) -> Celery:
    """The Celery app for these settings; `redis_url` is the store, used where no broker or backend is set."""
    from celery import Celery
    from kombu.entity import Queue

    broker = settings.broker_url.get_secret_value() if settings.broker_url else celery_url(redis_url)
    backend = settings.result_backend.get_secret_value() if settings.result_backend else celery_url(redis_url)
    app = Celery("mimoq", broker=broker, backend=backend, set_as_current=False)
    options: dict[str, Any] = {}
    if broker.startswith(("amqp", "pyamqp")):
        options = {"read_timeout": SILENT_S, "write_timeout": SILENT_S}
    elif broker.startswith(("redis", "rediss")):
        # A ring may be lost, so it needs no record of unacked messages, which costs two round trips each.
        # The polling interval is how long one BRPOP waits, and a worker that ends waits for its last one.
        options = {
            "ack_emulation": False,
            "polling_interval": 0.2,
            "socket_timeout": 30,
            "socket_connect_timeout": 5,
        }
        if not broker.startswith("redis+socket"):
            options |= {"socket_keepalive": True, "health_check_interval": 15}
    app.conf.update(
        broker_transport_options=options,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_channel_error_retry=True,
        broker_connection_timeout=5,
        task_acks_late=True,
        task_ignore_result=True,
        task_queues=[
            Queue(identity.queue(lane, upstream), queue_arguments=QUEUE_ARGUMENTS)
            for lane in LANES
            for upstream in ("", identity.SIMULATED)
        ],
        task_default_queue=identity.queue("bulk", ""),
        task_send_sent_event=False,
        worker_send_task_events=False,
        worker_prefetch_multiplier=1,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        # After the broker was away: rings that are being answered are, those it sends again find nothing, and all threads
        # hear rings.
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_enable_prefetch_count_reduction=False,
        result_compression="gzip" if settings.result_compression == "gzip" else None,
        result_expires=settings.result_ttl_s,
        redis_socket_timeout=10.0,
        redis_backend_health_check_interval=None if "socket" in backend.split("://")[0] else 15,
        redis_retry_on_timeout=True,
    )
    return app


class Bell:
    """Rings the queues of the lanes."""

    def __init__(self, app: Celery) -> None:
        self._app = app

    def ring(self, batch_id: str, lane: str, upstream: str, times: int) -> None:
        """Puts `times` rings on the lane's queue. Raises `StoreUnavailable` when the broker does not answer."""
        if times <= 0:
            return
        name = identity.queue(lane, upstream)
        with self._errors(), self._app.producer_or_acquire() as producer, producer.batch(RING_BLOCK):
            for _ in range(times):
                self._app.send_task(RING, (batch_id,), queue=name, producer=producer, ignore_result=True)
            if producer.connection.transport.driver_type == "amqp":
                # RabbitMQ takes messages without a word, and a cut connection takes some more: one answer for all of them.
                producer.channel.queue_declare(name, passive=True)

    def depth(self, lane: str, upstream: str) -> int:
        """Rings waiting on the lane's queue; an unknown queue has none. Raises `StoreUnavailable` as `ring` does."""
        name = identity.queue(lane, upstream)
        with self._errors(), self._app.connection_for_write() as connection, connection.channel() as channel:
            try:
                return int(channel.queue_declare(name, passive=True).message_count)
            except connection.channel_errors:
                return 0

    @staticmethod
    @contextmanager
    def _errors() -> Iterator[None]:
        """Whatever a transport raises when its broker is away, in a line for people."""
        from kombu import exceptions
        from redis.exceptions import RedisError

        away = (exceptions.KombuError, exceptions.ConnectionError, exceptions.ChannelError)
        try:
            yield
        except (*away, RedisError, OSError) as error:
            raise StoreUnavailable(
                f"the broker does not answer ({type(error).__name__}): check MIMOQ_BROKER_URL"
            ) from None
