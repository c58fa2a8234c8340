"""Delivers webhooks: takes due events from the outbox, signs and posts them, and writes what came of it.

What can go wrong: a process that dies has its events taken by another once their lease is over, so a receiver may see one
twice, with the same id. Redis away: what is under way is written when it is back, or sent again; nothing new is taken.
A receiver that is slow holds four places and no others, and a tenant's receivers together sixteen; one that is away is asked
less and less often, for a day.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import structlog
from redis.exceptions import RedisError
from standardwebhooks import Webhook

from api.outbound import Answer
from jobs import keys, outbox
from jobs.outbox import Due, Told

#: Seconds to wait after the first, second, ... try that failed; the last of them from then on.
WAITS_S = (5.0, 30.0, 120.0, 600.0, 1_800.0, 3_600.0, 7_200.0, 14_400.0, 28_800.0)
#: A wait is this much shorter or longer, by chance: who failed together is not tried together.
JITTER = 0.2
#: Longest wait that a receiver's Retry-After is granted.
RETRY_AFTER_S = 3_600.0
#: Deliveries at once, and of them to one host, and of one tenant.
AT_ONCE = 64
PER_HOST = 4
PER_TENANT = 16
#: Seconds after which the outbox is looked at without a call.
LOOK_S = 15.0
#: Least seconds between two looks.
PAUSE_S = 0.02
#: Seconds to wait for a Redis that is away.
AWAY_S = 1.0
#: Seconds that deliveries under way get at the end.
GRACE_S = 5.0

Send = Callable[[str, bytes, Mapping[str, str]], Awaitable[Answer]]

log = structlog.get_logger("api.deliverer")


def _nobody(result: str) -> None:
    """Counts nothing."""


class Deliverer:
    """One process's share in delivering webhooks; `run` it in a task.

    `client` is an async one, whose pool also carries a subscription. `send` posts (`Outbound.post`); `counted` is told
    `delivered`, `failed` (it is tried again) or `dead` of each try. `clock` is unix time, for the signature; `chance`
    gives 0 to 1.
    """

    def __init__(
        self,
        client: Any,
        send: Send,
        counted: Callable[[str], object] = _nobody,
        *,
        waits_s: Sequence[float] = WAITS_S,
        lease_s: float = outbox.LEASE_S,
        at_once: int = AT_ONCE,
        per_host: int = PER_HOST,
        per_tenant: int = PER_TENANT,
        clock: Callable[[], float] = time.time,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._client = client
        self._send = send
        self._counted = counted
        self._waits_s = waits_s
        self._lease_s = lease_s
        self._at_once = at_once
        self._per_host = per_host
        self._per_tenant = per_tenant
        self._clock = clock
        self._chance = chance
        self._flying: dict[asyncio.Task[None], tuple[str, str]] = {}  # host and tenant
        self._woken = asyncio.Event()

    async def run(self) -> None:
        """Delivers until cancelled; what is under way then gets a few seconds, and what is not done is due again."""
        listener = asyncio.create_task(self._listen())
        me = asyncio.current_task()
        try:
            while me is None or not me.cancelling():  # a cancel that came inside redis-py may have been swallowed: _end
                self._woken.clear()
                wait_s = await self._look()
                with suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._woken.wait()
                await asyncio.sleep(PAUSE_S)
            raise asyncio.CancelledError
        finally:
            try:
                await _end({listener})
                if self._flying:
                    await asyncio.wait(self._flying, timeout=GRACE_S)
            finally:
                await _end(set(self._flying))

    async def _listen(self) -> None:
        """Wakes the loop when an event comes into the outbox."""
        while True:
            try:
                async with self._client.pubsub() as channel:
                    await channel.subscribe(keys.OUTBOX)
                    while True:
                        # The confirmation of the subscription wakes it too: what came before it was not heard.
                        if await channel.get_message(timeout=LOOK_S) is not None:
                            self._woken.set()
            except (RedisError, OSError) as error:
                log.debug("outbox_unheard", error=type(error).__name__)
            await asyncio.sleep(AWAY_S)

    async def _look(self) -> float:
        """Takes what is due and has room; returns seconds until the next look."""
        room = self._at_once - len(self._flying)
        if room <= 0:
            return LOOK_S  # the end of a delivery wakes
        try:
            taken, wait_s = await outbox.take(
                self._client, room, self._per_host, self._per_tenant, self._flying.values(), self._lease_s
            )
        except (RedisError, OSError) as error:
            log.debug("outbox_unread", error=type(error).__name__)
            return AWAY_S
        for due in taken:
            task = asyncio.create_task(self._deliver(due))
            self._flying[task] = due.host, due.tenant
            task.add_done_callback(self._landed)
        return LOOK_S if wait_s is None else min(wait_s, LOOK_S)

    def _landed(self, task: asyncio.Task[None]) -> None:
        del self._flying[task]
        self._woken.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("delivery_broken", error=type(error).__name__)

    async def _deliver(self, due: Due) -> None:
        """One try of one event."""
        give_up_at = time.monotonic() + self._lease_s
        try:
            secret = await outbox.secret_of(self._client, due.tenant)
        except (RedisError, OSError):
            return  # it is due again when its lease is over
        answer = await self._post(due, secret)
        told: Told = "delivered" if answer.ok else "gone" if answer.status == 410 else "failed"
        wait_s = self._wait_s(due, answer)
        while True:
            try:
                settled = await outbox.settle(self._client, due, told, answer.status, answer.error, wait_s)
                break
            except (RedisError, OSError) as error:
                if time.monotonic() > give_up_at:
                    log.warning("delivery_unwritten", event_id=due.id, error=type(error).__name__)
                    return
                await asyncio.sleep(AWAY_S)
        if settled == "stale":
            return
        self._counted(settled)
        # Of an address only the host: paths and queries may be what lets one in.
        if settled == "dead":
            log.warning("webhook_dead", event_id=due.id, host=due.host, attempt=due.attempt, error=answer.error)
        elif settled == "failed":
            log.info("webhook_failed", event_id=due.id, host=due.host, attempt=due.attempt, error=answer.error)

    async def _post(self, due: Due, secret: str) -> Answer:
        try:
            body = payload(due)
            return await self._send(due.url, body, signed(due.id, body, secret, self._clock()))
        except Exception as error:
            # A fault of ours, or a secret that somebody spoilt: it must not be tried at the end of each lease for ever.
            log.error("delivery_broken", event_id=due.id, error=type(error).__name__)
            return Answer(error="internal_error")

    def _wait_s(self, due: Due, answer: Answer) -> float:
        wait_s = self._waits_s[min(due.tries, len(self._waits_s)) - 1]
        wait_s *= 1 - JITTER + 2 * JITTER * self._chance()
        if answer.status in (429, 503) and answer.retry_after_s is not None:
            wait_s = max(wait_s, min(answer.retry_after_s, RETRY_AFTER_S))
        return wait_s


async def _end(tasks: set[asyncio.Task[None]]) -> None:
    """Cancels tasks until they have ended: on Python 3.11 `wait_for`, by which redis-py sends, may swallow a cancel."""
    while tasks:
        for task in tasks:
            task.cancel()
        _, tasks = await asyncio.wait(tasks, timeout=0.1)


def payload(due: Due) -> bytes:
    """The body of an event: what ended, and how; never a prompt or an answer."""
    event = {
        "id": due.id,
        "object": "event",
        "type": due.type,
        "created_at": int(due.created_at),
        "data": {"id": due.subject},
    }
    return json.dumps(event, separators=(",", ":")).encode()


def signed(event_id: str, body: bytes, secret: str, at: float) -> dict[str, str]:
    """The headers of a delivery sent at that unix time, as Standard Webhooks has them."""
    moment = datetime.fromtimestamp(int(at), UTC)
    return {
        "Content-Type": "application/json",
        "webhook-id": event_id,
        "webhook-timestamp": str(int(at)),
        "webhook-signature": Webhook(secret).sign(event_id, moment, body.decode()),
    }
