"""Messages on Redis that are the only copy of something: taken and recorded in one step.

kombu pops a message and then records it as unacked, so one whose taker dies between the two is lost; and between them
lies all the time that the popped message waits in a socket for a process that is busy, or suspended. Here the process waits
for a message to be there without taking it, and has a script take and record it. The rest is kombu's own: what is not acked
within the visibility timeout is given back by whoever consumes.

What goes wrong: Redis is out of memory and refuses the wait. Then the queues are looked at a few times a second.
"""

from __future__ import annotations

import time
from queue import Empty
from typing import Any

from kombu.transport import redis
from redis.exceptions import ResponseError

from jobs.scripts import source

TAKE = source("jobs", "take_message")

kombu_redis: Any = redis  # whose types are not complete


class QoS(kombu_redis.QoS):  # type: ignore[misc]  # see above
    """What is known of messages that are taken and not yet acked."""

    def append(self, message: Any, delivery_tag: str) -> None:
        """Remembers a message; the script has recorded it already."""
        if self.channel.records:
            super(kombu_redis.QoS, self).append(message, delivery_tag)
        else:
            super().append(message, delivery_tag)


class Channel(kombu_redis.Channel):  # type: ignore[misc]  # see above
    """A channel that takes messages by the script, unless one of its consumers does not ack."""

    QoS = QoS
    records = True
    _asked = False  # whether the replies that are to be read are those of the script and the wait before it

    def basic_consume(self, queue: str, no_ack: bool, *args: Any, **kwargs: Any) -> Any:
        """Begins to consume from a queue."""
        if no_ack and queue not in self._fanout_queues:
            self.records = False
        return super().basic_consume(queue, no_ack, *args, **kwargs)

    def _brpop_start(self, timeout: float | None = None) -> None:
        self._asked = self.records
        if not self.records:
            super()._brpop_start(timeout)
            return
        queues = self._queue_cycle.consume(len(self.active_queues))
        if not queues:
            return
        lists = [self._q_for_pri(queue, priority) for priority in self.priority_steps for queue in queues]
        # Moved from its end to its end, a list stays as it is: this waits for a message and leaves it there. On the other
        # lists, as of other priorities, one waits until this has waited in vain.
        wait = ("BLMOVE", lists[0], lists[0], "RIGHT", "RIGHT", timeout or self.brpop_timeout)
        keys = (self.unacked_key, self.unacked_index_key, *lists)
        take = ("EVAL", TAKE, len(keys), *keys, time.time())
        connection = self._in_poll = self.client.connection
        self._brpop_sent_at = time.monotonic()
        connection.send_packed_command(connection.pack_commands([wait, take]))

    def _brpop_read(self, **options: Any) -> Any:
        waited = True
        if self._asked:
            connection = self.client.connection
            try:
                self.client.parse_response(connection, "BLMOVE")
            except ResponseError:
                waited = False  # should the script be refused too, its reply says why
            except self.connection_errors:
                self._in_poll = None
                connection.disconnect()
                raise
        try:
            return super()._brpop_read(**options)  # the script replies as BRPOP would
        except Empty:
            if not waited:
                time.sleep(self.brpop_timeout)
            raise


class Transport(kombu_redis.Transport):  # type: ignore[misc]  # see above
    """Redis as a broker whose messages must not be lost."""

    Channel = Channel
