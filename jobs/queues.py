"""Queues as Celery and kombu are to see them: one that is there is used as it is, and only a missing one is declared.

RabbitMQ refuses to declare a queue again as another type, and closes the channel over it: an app that knows nothing of this
project declares `mimoq.complete` as a classic queue, and a pipeline's next task may be for a queue of either type. So
whoever declares first decides, and nobody on this side clashes with it.

What goes wrong: a queue is declared by somebody else between our look and our declaration. That costs a channel of its own,
not the one that is published or consumed on.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import amqp  # type: ignore[import-untyped]  # ships no types
from celery.app import amqp as celery_amqp
from kombu.connection import Connection
from kombu.entity import Exchange, Queue
from kombu.transport import pyamqp, redis

from jobs import custody

#: The exchange that reaches every queue by its name, so that nothing is ever bound.
DIRECT = Exchange("")


class FoundQueue(Queue):
    """A queue that is declared only where it is missing, on RabbitMQ as `queue_type` then, if that is not None.

    The type is no part of `queue_arguments`: there it would have Celery declare 28 more queues, for delayed messages.
    """

    attrs: Any = (*Queue.attrs, ("queue_type", None))  # what kombu's copies keep
    queue_arguments: dict[str, Any] | None
    queue_type: str | None = None

    def declare(self, nowait: bool = False, channel: Any = None) -> str:
        """Returns its name. Raises what the transport raises, as when the broker is away."""
        channel = channel or self.channel
        if not isinstance(channel, amqp.Channel):  # elsewhere there are no types to clash
            super().declare(nowait, channel)  # type: ignore[no-untyped-call]  # kombu's own is untyped
        elif not self._is_there(channel):
            missing: Any = copy(self)
            if self.queue_type is not None:
                missing.queue_arguments = {**(self.queue_arguments or {}), "x-queue-type": self.queue_type}
            try:
                with channel.connection.channel() as side:
                    Queue.declare(missing, nowait, side)
            except amqp.PreconditionFailed:
                if not self._is_there(channel):
                    raise
        return self.name

    def _is_there(self, channel: Any) -> bool:
        try:
            with channel.connection.channel() as side:
                side.queue_declare(self.name, passive=True)
        except amqp.NotFound:
            return False
        return True


def found(name: str, queue_type: str | None = None) -> FoundQueue:
    """A queue of that name; RabbitMQ's default type is classic."""
    return FoundQueue(name, DIRECT, name, queue_type=queue_type)  # type: ignore[no-untyped-call]  # kombu's is untyped


class Queues(celery_amqp.Queues):  # type: ignore[misc]  # Celery ships no types
    """The app's queues; any other that a message is for is looked for before it is declared, too."""

    def new_missing(self, name: str) -> FoundQueue:
        """A queue of another app, such as that of a pipeline's next task; missing, it is what Celery makes by default."""
        return found(name)


class EachConsumer:
    """Prefetch counts hold for one consumer: on a quorum queue any other kind ends the connection."""

    def qos_semantics_matches_spec(self, _: Any) -> bool:
        """What Celery asks before it sets a count for whole channels instead."""
        return True


class RabbitMQ(EachConsumer, pyamqp.Transport):
    """RabbitMQ, whatever type a queue turns out to be of."""


class RabbitMQOverTLS(EachConsumer, pyamqp.SSLTransport):
    """The same over TLS."""


TRANSPORTS: dict[Any, Any] = {pyamqp.Transport: RabbitMQ, pyamqp.SSLTransport: RabbitMQOverTLS}


class BrokerConnection(Connection):
    """A connection whose transport is ours, however its address is spelled."""

    def get_transport_cls(self) -> Any:
        """Ours in place of kombu's."""
        kombus = super().get_transport_cls()  # type: ignore[no-untyped-call]  # kombu's own is untyped
        if kombus is redis.Transport and (self.transport_options or {}).get("ack_emulation"):
            return custody.Transport
        return TRANSPORTS.get(kombus, kombus)


class AMQP(celery_amqp.AMQP):  # type: ignore[misc]  # Celery ships no types
    """What a Celery app makes queues and connections with."""

    Connection = BrokerConnection
    BrokerConnection = BrokerConnection
    queues_cls = Queues

    @property
    def default_exchange(self) -> Exchange:
        """None but the direct one. Celery's is that of the caller's default queue, and our queues would be bound to it."""
        return DIRECT
