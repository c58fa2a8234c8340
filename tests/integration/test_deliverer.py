"""Webhooks from a real Valkey to a real receiver."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from aiohttp import web
from standardwebhooks import Webhook, WebhookVerificationError
from structlog.testing import capture_logs

from api import deliverer, outbound
from api.deliverer import JITTER, WAITS_S, Deliverer
from api.outbound import Outbound
from jobs import keys, outbox
from jobs.outbox import TRIED_S
from jobs.settings import Settings
from tests.components import Valkey
from tests.integration.outbox_stand import drive, put, receiving, server_time, state, until

PAGE = Path(__file__).parents[2] / "docs" / "webhooks.md"
AT_ONCE = (0.01,)


def open_settings() -> Settings:
    return Settings(webhook_allow_http=True, webhook_allow_private=True)


@asynccontextmanager
async def delivering(
    client: Any, counted: list[str] | None = None, **options: Any
) -> AsyncIterator[asyncio.Task[None]]:
    """A deliverer at work, with waits of nearly nothing unless it is told otherwise."""
    told: list[str] = [] if counted is None else counted
    async with Outbound(open_settings()) as calls:
        one = Deliverer(client, calls.post, told.append, **{"waits_s": AT_ONCE, **options})
        task = asyncio.create_task(one.run())
        try:
            yield task
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def settled(client: Any, event_id: str, wanted: str) -> None:
    async def look() -> bool:
        return await state(client, event_id) == wanted

    await until(look)


async def tried(client: Any, event_id: str, times: int) -> outbox.Event:
    """The event once that many tries have been written."""

    async def look() -> outbox.Event | None:
        for event in (await outbox.events_of(client, "t")).events:
            if event.id == event_id and event.attempts >= times and event.last_at is not None:
                return event
        return None

    found: outbox.Event = await until(look)
    return found


def test_an_event_arrives_as_both_libraries_want_it(store_url: str) -> None:
    async def main(client: Any) -> None:
        async with receiving() as receiver, delivering(client):
            for kind in ("batch.completed", "batch.cancelled", "batch.expired"):
                await put(client, f"evt_{kind}_1", url=receiver.url, kind=kind, subject="batch_abc")
                await settled(client, f"evt_{kind}_1", "delivered")
            secret = await outbox.secret_of(client, "t")
            sdk = openai.OpenAI(api_key="unused", webhook_secret=secret)
            for kind, request in zip(
                ("batch.completed", "batch.cancelled", "batch.expired"), receiver.received, strict=True
            ):
                event = sdk.webhooks.unwrap(request.body, request.headers)
                assert type(event).__name__ == f"Batch{kind.removeprefix('batch.').title()}WebhookEvent"
                read = event.model_dump()
                assert (read["type"], read["id"], read["data"]) == (kind, f"evt_{kind}_1", {"id": "batch_abc"})
                said = Webhook(secret).verify(request.body, request.headers)
                assert sorted(said) == ["created_at", "data", "id", "object", "type"]
                assert said["created_at"] == pytest.approx(await server_time(client), abs=10)
                assert said["object"] == "event"
                assert request.headers["content-type"] == "application/json"
                with pytest.raises(WebhookVerificationError):
                    Webhook(secret).verify(request.body.replace(b"abc", b"abd"), request.headers)

    drive(store_url, main)


def test_each_tenants_events_are_signed_with_its_own_secret(store_url: str) -> None:
    async def main(client: Any) -> None:
        async with receiving() as receiver, delivering(client):
            for tenant in ("t", "u"):
                await put(client, f"evt_{tenant}_1", url=receiver.url, tenant=tenant)
                await settled(client, f"evt_{tenant}_1", "delivered")
        for tenant, request in zip(("t", "u"), receiver.received, strict=True):
            Webhook(await outbox.secret_of(client, tenant)).verify(request.body, request.headers)
            with pytest.raises(WebhookVerificationError):
                Webhook(await outbox.secret_of(client, "u" if tenant == "t" else "t")).verify(
                    request.body, request.headers
                )

    drive(store_url, main)


def test_what_fails_comes_again_with_the_same_id(store_url: str) -> None:
    counted: list[str] = []

    async def main(client: Any) -> None:
        answers = (web.Response(status=500, text="private words"), web.Response(status=404), web.Response(status=204))
        async with receiving(*answers) as receiver, delivering(client, counted):
            with capture_logs() as logs:
                await put(client, "evt_b_1", url=receiver.url)
                await settled(client, "evt_b_1", "delivered")
            assert receiver.ids == ["evt_b_1"] * 3
            assert len({request.body for request in receiver.received}) == 1
        assert counted == ["failed", "failed", "delivered"]
        assert [line["error"] for line in logs if line["event"] == "webhook_failed"] == ["status_500", "status_404"]
        assert "private" not in repr(logs)

    drive(store_url, main)


def test_an_event_wakes_its_deliverer_and_so_does_its_time(store_url: str) -> None:
    async def main(client: Any) -> None:
        async with receiving() as receiver, delivering(client):
            await put(client, "evt_first_1", url=receiver.url)
            await settled(client, "evt_first_1", "delivered")  # it waits for 15 s or a word now
            began = time.monotonic()
            await put(client, "evt_told_1", url=receiver.url)
            await until(lambda: len(receiver.received) == 2)
            await put(client, "evt_due_1", url=receiver.url, due_in_s=0.3)
            await until(lambda: len(receiver.received) == 3)
            assert time.monotonic() - began < deliverer.LOOK_S / 2

    drive(store_url, main)


@pytest.mark.parametrize("tries", range(1, len(WAITS_S) + 3))
def test_the_waits_are_those_of_the_table(store_url: str, tries: int) -> None:
    async def main(client: Any) -> None:
        chances = {1: 0.0, 2: 1.0}
        chance = chances.get(tries, 0.5)
        async with receiving(web.Response(status=503)) as receiver:
            await put(client, "evt_b_1", url=receiver.url, attempts=tries - 1)
            async with delivering(client, waits_s=WAITS_S, chance=lambda: chance):
                event = await tried(client, "evt_b_1", tries)
        assert event.due_at is not None
        assert event.last_at is not None
        table = WAITS_S[min(tries, len(WAITS_S)) - 1]
        assert event.due_at - event.last_at == pytest.approx(table * (1 + JITTER * (2 * chance - 1)), abs=0.01)

    drive(store_url, main)


@pytest.mark.parametrize(
    ("status", "asked", "waited"), [(429, "100", 100), (503, "999999", 3600), (429, "2", 5), (500, "100", 5)]
)
def test_a_retry_after_is_granted_up_to_an_hour(store_url: str, status: int, asked: str, waited: float) -> None:
    async def main(client: Any) -> None:
        async with receiving(web.Response(status=status, headers={"Retry-After": asked})) as receiver:
            await put(client, "evt_b_1", url=receiver.url)
            async with delivering(client, waits_s=WAITS_S, chance=lambda: 0.5):
                event = await tried(client, "evt_b_1", 1)
        assert event.due_at is not None
        assert event.last_at is not None
        assert event.due_at - event.last_at == pytest.approx(waited, abs=0.01)

    drive(store_url, main)


def test_a_day_after_its_beginning_an_event_is_dead_and_can_be_sent_again(store_url: str) -> None:
    counted: list[str] = []

    async def main(client: Any) -> None:
        async with receiving(web.Response(status=500)) as receiver, delivering(client, counted):
            await put(client, "evt_b_1", url=receiver.url, age_s=TRIED_S + 1)
            await settled(client, "evt_b_1", "dead")
            await until(lambda: counted == ["dead"])
            assert await client.zcard(keys.OUTBOX) == 0
            assert await outbox.again(client, "t", "evt_b_1")
            await settled(client, "evt_b_1", "delivered")
            assert receiver.ids == ["evt_b_1"] * 2

    drive(store_url, main)


def test_a_receiver_that_says_gone_is_not_asked_again(store_url: str) -> None:
    counted: list[str] = []

    async def main(client: Any) -> None:
        async with receiving(web.Response(status=410)) as receiver, delivering(client, counted):
            await put(client, "evt_b_1", url=receiver.url)
            await settled(client, "evt_b_1", "dead")
            (event,) = (await outbox.events_of(client, "t", state="dead")).events
            assert (event.last_status, event.last_error, event.attempts) == (410, "status_410", 1)
            assert len(receiver.received) == 1

    drive(store_url, main)


def test_a_redirect_is_a_failure_and_is_not_followed(store_url: str) -> None:
    async def main(client: Any) -> None:
        async with receiving() as inner:
            moved = [web.Response(status=code, headers={"Location": inner.url}) for code in (301, 302, 303, 307, 308)]
            async with receiving(*moved) as receiver, delivering(client):
                await put(client, "evt_b_1", url=receiver.url)
                await settled(client, "evt_b_1", "delivered")
                assert len(receiver.received) == 6
            assert inner.received == []

    drive(store_url, main)


def test_two_deliverers_share_the_work_and_send_nothing_twice(store_url: str) -> None:
    count = 60

    async def main(client: Any) -> None:
        first: list[str] = []
        second: list[str] = []
        async with receiving() as receiver, delivering(client, first), delivering(client, second):
            receiver.gate.clear()
            for number in range(count):
                await put(client, f"evt_{number}_1", url=receiver.url)
            await until(lambda: receiver.here == 2 * deliverer.PER_HOST)
            receiver.gate.set()
            await until(lambda: len(first) + len(second) == count)
            assert sorted(receiver.ids) == sorted(f"evt_{number}_1" for number in range(count))
            assert first
            assert second

    drive(store_url, main)


def test_a_process_that_dies_between_taking_and_telling_is_made_up_for(store_url: str) -> None:
    async def main(client: Any) -> None:
        async with receiving() as receiver:
            await put(client, "evt_b_1", url=receiver.url)
            (due,), _ = await outbox.take(client, 1, 1, 1, lease_s=0.3)
            async with Outbound(open_settings()) as calls:
                sent = deliverer.payload(due)
                secret = await outbox.secret_of(client, "t")
                assert (await calls.post(due.url, sent, deliverer.signed(due.id, sent, secret, time.time()))).ok
            async with delivering(client):
                await settled(client, "evt_b_1", "delivered")
            assert receiver.ids == ["evt_b_1", "evt_b_1"]
            assert receiver.received[0].body == receiver.received[1].body

    drive(store_url, main)


def test_a_slow_host_holds_its_own_places_and_no_others(store_url: str) -> None:
    async def main(client: Any) -> None:
        async with receiving() as slow, receiving() as quick, delivering(client):
            slow.gate.clear()
            for number in range(20):
                await put(client, f"evt_{number}_1", url=slow.url)
            await until(lambda: slow.here == deliverer.PER_HOST)
            other = quick.url.replace("127.0.0.1", "localhost")
            for number in range(20, 30):
                await put(client, f"evt_{number}_1", url=other)
            await until(lambda: len(quick.received) == 10)
            assert len(slow.received) == deliverer.PER_HOST
            slow.gate.set()
            await until(lambda: len(slow.received) == 20)
            assert slow.most == deliverer.PER_HOST

    drive(store_url, main)


@pytest.mark.parametrize("silent", ["receivers", "names"])
def test_a_tenant_of_many_silent_hosts_holds_its_own_places_and_no_others(
    store_url: str, silent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = 100
    asked: list[str] = []
    answered = threading.Event()

    def look_up(host: str, port: int, family: socket.AddressFamily) -> list[Any]:
        asked.append(host)
        if silent == "names" and host.startswith("silent"):
            answered.wait(60)
        return list(socket.getaddrinfo("127.0.0.1", port, socket.AF_INET, socket.SOCK_STREAM))

    monkeypatch.setattr(outbound, "_look_up", look_up)

    async def main(client: Any) -> None:
        async with receiving() as slow, receiving() as quick:
            if silent == "receivers":
                slow.gate.clear()
            for number in range(hosts):
                await put(client, f"evt_{number}_1", url=slow.url.replace("127.0.0.1", f"silent{number}.example"))
            try:
                async with delivering(client):
                    await until(lambda: len(asked) == deliverer.PER_TENANT)
                    await put(client, "evt_other_1", url=quick.url.replace("127.0.0.1", "quick.example"), tenant="u")
                    await settled(client, "evt_other_1", "delivered")
                    assert len(asked) == deliverer.PER_TENANT + 1, "the other tenant's is the one that came through"
                    answered.set()
                    slow.gate.set()
                    await until(lambda: len(slow.received) == hosts)
                    assert slow.most <= deliverer.PER_TENANT
            finally:
                answered.set()

    drive(store_url, main)


def test_no_more_are_under_way_than_one_process_may_have(store_url: str) -> None:
    async def main(client: Any) -> None:
        async with receiving() as receiver, delivering(client, at_once=3, per_host=10):
            receiver.gate.clear()
            for number in range(8):
                await put(client, f"evt_{number}_1", url=receiver.url)
            await until(lambda: receiver.here == 3)
            assert await client.zcount(keys.OUTBOX, "-inf", await server_time(client)) == 5
            receiver.gate.set()
            await until(lambda: len(receiver.received) == 8)
            assert receiver.most == 3

    drive(store_url, main)


@pytest.fixture
def own_valkey() -> Any:
    server = Valkey(durable=True)
    yield server
    server.stop()


def test_a_redis_that_goes_away_during_a_delivery_is_told_later(own_valkey: Valkey) -> None:
    async def main(client: Any) -> None:
        async with receiving() as receiver, delivering(client):
            receiver.gate.clear()
            await put(client, "evt_b_1", url=receiver.url)
            await until(lambda: receiver.here == 1)
            own_valkey.kill()
            receiver.gate.set()
            await until(lambda: receiver.here == 0)
            await asyncio.to_thread(own_valkey.start)
            await settled(client, "evt_b_1", "delivered")
            await put(client, "evt_b_2", url=receiver.url)
            await settled(client, "evt_b_2", "delivered")
            assert receiver.ids == ["evt_b_1", "evt_b_2"]

    drive(own_valkey.url, main)


def test_what_is_under_way_at_the_end_gets_a_moment(store_url: str) -> None:
    async def main(client: Any) -> None:
        async with receiving() as receiver, delivering(client) as task:
            receiver.gate.clear()
            await put(client, "evt_b_1", url=receiver.url)
            await until(lambda: receiver.here == 1)
            task.cancel()
            await put(client, "evt_b_2", url=receiver.url)
            receiver.gate.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await state(client, "evt_b_1") == "delivered"
            assert receiver.ids == ["evt_b_1"], "nothing new is begun"

    drive(store_url, main)


def test_a_cancel_that_redis_py_swallows_ends_it_all_the_same(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take = outbox.take

    async def swallow(*args: Any) -> Any:
        with contextlib.suppress(asyncio.CancelledError):
            looking.set()
            await asyncio.Event().wait()
        return await take(*args)

    looking = asyncio.Event()
    monkeypatch.setattr(outbox, "take", swallow)

    async def main(client: Any) -> None:
        async with delivering(client) as task:
            await looking.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(task, 5)

    drive(store_url, main)


def test_what_is_not_done_at_the_end_is_due_again(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deliverer, "GRACE_S", 0.05)

    async def main(client: Any) -> None:
        async with receiving() as receiver:
            receiver.gate.clear()
            async with delivering(client, lease_s=0.3):
                await put(client, "evt_b_1", url=receiver.url)
                await until(lambda: receiver.here == 1)
            await until(lambda: receiver.here == 0)  # it was broken off
            assert await state(client, "evt_b_1") == "pending"
            receiver.gate.set()
            async with delivering(client):
                await settled(client, "evt_b_1", "delivered")
            assert receiver.ids == ["evt_b_1"] * 2

    drive(store_url, main)


def test_a_spoilt_secret_is_a_failure_like_others(store_url: str) -> None:
    async def main(client: Any) -> None:
        await client.hset(keys.SECRETS, "t", "whsec_")
        async with receiving() as receiver:
            await put(client, "evt_b_1", url=receiver.url)
            with capture_logs():
                async with delivering(client, waits_s=WAITS_S):
                    event = await tried(client, "evt_b_1", 1)
            assert event.last_error == "internal_error"
            assert receiver.received == []

    drive(store_url, main)


def test_a_refused_address_is_on_record(store_url: str) -> None:
    async def main(client: Any) -> None:
        async with receiving() as receiver, Outbound(Settings(webhook_allow_http=True)) as calls:
            one = Deliverer(client, calls.post)
            task = asyncio.create_task(one.run())
            await put(client, "evt_b_1", url=receiver.url)
            event = await tried(client, "evt_b_1", 1)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert (event.state, event.last_status, event.last_error) == ("pending", None, "refused_address")
            assert receiver.received == []

    drive(store_url, main)


def test_the_code_of_the_page_takes_what_is_sent(store_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    page: dict[str, Any] = {}
    for block in re.findall(r"(?s)```python\n(.*?)```", PAGE.read_text(encoding="utf-8")):
        exec(block, page)

    async def main(client: Any) -> None:
        async with receiving() as receiver, delivering(client):
            await put(client, "evt_b_1", url=receiver.url, kind="batch.completed", subject="batch_abc")
            await settled(client, "evt_b_1", "delivered")
        (request,) = receiver.received
        secret = await outbox.secret_of(client, "t")
        seen: set[str] = set()
        for _ in range(2):
            assert page["receive"](request.body, request.headers, secret, seen) == 204
        assert capsys.readouterr().out == "batch.completed batch_abc\n"
        assert page["receive"](request.body + b" ", request.headers, secret, seen) == 400
        assert page["receive_batch"](request.body, request.headers, secret) == ("batch_abc", "batch.completed")
        with pytest.raises(openai.InvalidWebhookSignatureError):
            page["receive_batch"](request.body + b" ", request.headers, secret)

    drive(store_url, main)


def minutes(text: str) -> float:
    number, unit = text.split()
    return float(number) * {"s": 1, "min": 60, "h": 3600}[unit]


def test_the_page_has_the_table_of_waits() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    row = next(line for line in lines if line.startswith("| wait |"))
    assert tuple(minutes(cell.strip()) for cell in row.split("|")[2:-1]) == WAITS_S


def test_the_example_of_the_page_is_what_is_sent() -> None:
    example = json.loads(PAGE.read_text(encoding="utf-8").partition("```json\n")[2].partition("```")[0])
    due = outbox.Due(
        example["id"], "h", 1, 1, example["type"], example["data"]["id"], "", "t", example["created_at"] + 0.5
    )
    assert json.loads(deliverer.payload(due)) == example
