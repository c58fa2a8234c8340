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

from jobs import identity, keys, tls
from jobs.connections import celery_url
from jobs.errors import StoreUnavailable
from jobs.keys import SERVED
from jobs.settings import Settings

if TYPE_CHECKING:
    from celery import Celery

RING = "mimoq.ring"
#: Rings flushed to the broker together.
RING_BLOCK = 500
#: Seconds after which a message that was taken off Redis and neither acked nor given back is delivered again. One is
#: held for a minute while it waits for room, and may have waited as long behind others that its process had fetched.
VISIBILITY_S = 180.0
#: Seconds after which a silent RabbitMQ counts as gone.
SILENT_S = 30.0


def check_address(settings: Settings) -> None:
    """Raises `UsageError` for the address of a broker whose options can't be met."""
    if settings.broker_url is not None:
        tls.split(settings.broker_url.get_secret_value(), "MIMOQ_BROKER_URL")


def make_app(settings: Settings, redis_url: str, *, acknowledges: bool = False) -> Celery:
    """The Celery app for these settings; `redis_url` is the store, used where no broker or backend is set.

    `acknowledges` is for processes whose messages must not be lost: those of Celery pipelines, which may be the only copy
    of a job. Raises `UsageError` for an address that can't be read.
    """
    from celery import Celery

    from jobs.queues import AMQP, found

    broker = settings.broker_url.get_secret_value() if settings.broker_url else celery_url(redis_url)
    backend = settings.result_backend.get_secret_value() if settings.result_backend else celery_url(redis_url)
    broker, broker_tls = tls.split(broker, "MIMOQ_BROKER_URL" if settings.broker_url else "MIMOQ_REDIS_URL")
    backend_tls = None
    if backend.startswith("redis"):
        backend, backend_tls = tls.split(
            backend, "MIMOQ_RESULT_BACKEND" if settings.result_backend else "MIMOQ_REDIS_URL"
        )
    app = Celery("mimoq", broker=broker, backend=backend, set_as_current=False, amqp=AMQP)
    app.conf.update(
        broker_transport_options=_transport_options(broker, acknowledges),
        broker_use_ssl=broker_tls,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_channel_error_retry=True,
        broker_connection_timeout=5,
        task_acks_late=True,
        task_ignore_result=True,
        task_queues=[
            found(name, settings.queue_type)
            for lane in SERVED
            for name in (identity.queue(lane, ""), identity.queue(lane, identity.SIMULATED))
        ],
        task_default_queue=settings.default_queue,
        task_send_sent_event=False,
        worker_send_task_events=False,
        worker_prefetch_multiplier=1,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        # After the broker was away: rings that are being answered are, those it sends again find nothing, and all threads
        # hear rings.
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_enable_prefetch_count_reduction=False,
        # Other backends of Celery have no way to it, and say so with a warning.
        result_compression="gzip" if settings.result_compression == "gzip" and backend.startswith("redis") else None,
        result_expires=settings.result_ttl_s,
        redis_backend_use_ssl=backend_tls,
        redis_socket_timeout=10.0,
        redis_backend_health_check_interval=None if "socket" in backend.split("://")[0] else 15,
        redis_retry_on_timeout=True,
    )
    return app


def _transport_options(broker: str, acknowledges: bool) -> dict[str, Any]:
    if broker.startswith(("amqp", "pyamqp")):
        # Unconfirmed, RabbitMQ may lose what is sent to it without a word. A ring may be lost: `Bell` does without.
        return {"read_timeout": SILENT_S, "write_timeout": SILENT_S, "confirm_publish": True}
    if not broker.startswith("redis"):
        return {}
    # A ring may be lost, so it needs no record of unacked messages, which costs two round trips each.
    # The polling interval is how long one BRPOP waits, and a worker that ends waits for its last one.
    options: dict[str, Any] = {
        "ack_emulation": acknowledges,
        "polling_interval": 0.2,
        "socket_timeout": 30,
        "socket_connect_timeout": 5,
    }
    if acknowledges:
        options |= {
            "visibility_timeout": VISIBILITY_S,
            # kombu would look for overdue messages every 100 s, and keep the lock of a dead process for 300.
            "unacked_restore_interval": 10,
            "unacked_restore_throttle": 1,
            "unacked_mutex_expire": 30,
            # Other apps on this Redis have a timeout of their own, by which theirs are to be judged.
            "unacked_key": keys.UNACKED,
            "unacked_index_key": keys.UNACKED_INDEX,
            "unacked_mutex_key": keys.UNACKED_LOCK,
        }
    if not broker.startswith("redis+socket"):
        options |= {"socket_keepalive": True, "health_check_interval": 15}
    return options


class Bell:
    """Rings the queues of the lanes."""

    def __init__(self, app: Celery) -> None:
        self._app = app

    def ring(self, batch_id: str, lane: str, upstream: str, times: int) -> None:
        """Puts `times` rings on the lane's queue. Raises `StoreUnavailable` when the broker does not answer."""
        if times <= 0:
            return
        name = identity.queue(lane, upstream)
        with self._errors(), self._producers().acquire(block=True) as producer, producer.batch(RING_BLOCK):
            conf = self._app.conf
            retry = {"retry": conf.task_publish_retry, "retry_policy": dict(conf.task_publish_retry_policy)}
            producer.maybe_declare(self._app.amqp.queues[name], retry["retry"], **retry["retry_policy"])
            for headers, told in self._messages(batch_id, name, times):
                producer.publish(headers=headers, correlation_id=headers["id"], **told, **retry)
            if producer.connection.transport.driver_type == "amqp":
                # RabbitMQ takes messages without a word, and a cut connection takes some more. One answer for all of them:
                # a confirmation of each would take three times as long.
                producer.channel.queue_declare(name, passive=True)

    def _messages(self, batch_id: str, name: str, times: int) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Headers of each ring, and what else kombu is to publish it with.

        They are as `Celery.send_task` makes them, but what all have in common is made once: it would take most of the time.
        """
        from celery.utils import uuid
        from kombu.serialization import dumps

        message = self._app.amqp.as_task_v2("", RING, (batch_id,), ignore_result=True)
        content_type, encoding, body = dumps(message.body, serializer=self._app.conf.task_serializer)
        told = {
            "body": body,
            "content_type": content_type,
            "content_encoding": encoding,
            "exchange": "",
            "routing_key": name,
            "delivery_mode": self._app.conf.task_default_delivery_mode,
            "reply_to": self._app.thread_oid,
        }
        for _ in range(times):
            task_id = uuid()
            yield {**message.headers, "id": task_id, "root_id": task_id}, told

    def depth(self, lane: str, upstream: str) -> int:
        """Rings waiting on the lane's queue; an unknown queue has none. Raises `StoreUnavailable` as `ring` does."""
        name = identity.queue(lane, upstream)
        with self._errors(), self._app.connection_for_write() as connection, connection.channel() as channel:
            try:
                return int(channel.queue_declare(name, passive=True).message_count)
            except connection.channel_errors:
                return 0

    def _producers(self) -> Any:
        from kombu.pools import producers

        if not self._app.conf.broker_transport_options.get("confirm_publish"):
            return self._app.producer_pool
        return producers[self._app.connection_for_write(transport_options={"confirm_publish": False})]

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
            hint = "check MIMOQ_BROKER_URL"
            if tls.untrusted(error):
                raise StoreUnavailable(f"the broker's certificate is not trusted: {hint}, {tls.HINT}") from None
            raise StoreUnavailable(f"the broker does not answer ({type(error).__name__}): {hint}") from None
