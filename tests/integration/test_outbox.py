"""The outbox in a real Valkey: who takes what, what becomes of it, and what a tenant sees."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from typing import Any

import pytest

from jobs import keys, outbox
from jobs.connections import connect
from jobs.errors import NotFound
from jobs.outbox import DEAD_KEPT_S, DELIVERED_KEPT_S, LEASE_S, PUT_OFF_S, STAYING, TRIED_S, Due
from tests.components import Valkey
from tests.integration.outbox_stand import URL, drive, put, server_time, state

OTHER = "https://elsewhere.example/b"


async def take(client: Any, wanted: int = 64, flying: Iterable[tuple[str, str]] = ()) -> list[Due]:
    taken, _ = await outbox.take(client, wanted, 4, 16, flying)
    return taken


async def take_one(client: Any) -> Due:
    (due,) = await take(client)
    return due


async def fail(client: Any, due: Due, wait_s: float = 5.0) -> str:
    return await outbox.settle(client, due, "failed", 500, "status_500", wait_s)


async def deliver(client: Any, due: Due) -> str:
    return await outbox.settle(client, due, "delivered", 200, None, 5.0)


def dead(url: str) -> int:
    with connect(url) as client:
        return outbox.dead_count(client)


async def end_lease(client: Any, event_id: str) -> None:
    await client.zadd(keys.OUTBOX, {event_id: 0})


def test_what_is_due_is_taken_once_and_again_when_its_taker_died(store_url: str) -> None:
    async def main(client: Any) -> None:
        await put(client, "evt_b_1", kind="batch.completed", subject="b", tenant="acme")
        await put(client, "evt_later_1", due_in_s=100)
        taken, wait_s = await outbox.take(client, 64, 4, 16)
        assert [(due.id, due.attempt, due.tries, due.host) for due in taken] == [("evt_b_1", 1, 1, "hooks.example")]
        (due,) = taken
        assert (due.type, due.subject, due.tenant, due.url) == ("batch.completed", "b", "acme", URL)
        assert wait_s == pytest.approx(LEASE_S, abs=5)
        assert (await outbox.take(client, 64, 4, 16))[0] == []
        await end_lease(client, "evt_b_1")
        assert [(due.id, due.attempt) for due in await take(client)] == [("evt_b_1", 2)]

    drive(store_url, main)


def test_an_empty_outbox_says_that_nothing_is_due(store_url: str) -> None:
    async def main(client: Any) -> None:
        assert await outbox.take(client, 64, 4, 16) == ([], None)

    drive(store_url, main)


def test_no_more_are_taken_than_wanted_nor_more_than_four_to_one_host(store_url: str) -> None:
    async def main(client: Any) -> None:
        spellings = ("https://Hooks.example/a", "https://hooks.example:8443/b", "https://hooks.example?c")
        for number in range(6):
            await put(client, f"evt_{number}_1", url=spellings[number % 3])
        await put(client, "evt_6_1", url=OTHER)
        assert [due.id for due in await take(client, wanted=2)] == ["evt_0_1", "evt_1_1"]
        taken = await take(client, flying=[("hooks.example", "t")] * 2)
        assert [due.id for due in taken] == ["evt_2_1", "evt_3_1", "evt_6_1"]
        assert await take(client, flying=[("hooks.example", "t")] * 4) == []
        assert [due.id for due in await take(client, flying=[("hooks.example", "t")] * 3)] == ["evt_4_1"]

    drive(store_url, main)


def test_the_host_of_an_ipv6_address_is_what_stands_in_brackets(store_url: str) -> None:
    async def main(client: Any) -> None:
        await put(client, "evt_b_1", url="https://[2001:DB8::1]:8443/a")
        assert (await take_one(client)).host == "[2001:db8::1]"

    drive(store_url, main)


def test_no_more_are_taken_than_sixteen_of_one_tenant(store_url: str) -> None:
    async def main(client: Any) -> None:
        for number in range(20):
            await put(client, f"evt_{number:02}_1", url=f"https://h{number}.example/")
        await put(client, "evt_theirs_1", tenant="u")
        flying = [(f"elsewhere{number}.example", "t") for number in range(14)]
        assert [due.id for due in await take(client, flying=flying)] == ["evt_00_1", "evt_01_1", "evt_theirs_1"]
        assert len(await take(client)) == 16
        assert len(await take(client)) == 2

    drive(store_url, main)


@pytest.mark.parametrize(
    ("busy", "url", "room"),
    [
        ([("hooks.example", "x")] * 4, "https://hooks.example/", 4),
        ([(f"elsewhere{number}.example", "t") for number in range(16)], "https://h{number}.example/", 16),
    ],
    ids=["host", "tenant"],
)
def test_a_crowd_of_one_busy_host_or_tenant_does_not_hide_the_others(
    store_url: str, busy: list[tuple[str, str]], url: str, room: int
) -> None:
    crowd = 1_200

    async def main(client: Any) -> None:
        for number in range(crowd):
            await put(client, f"evt_{number}_1", url=url.format(number=number), tell=False)
        await put(client, "evt_other_1", url=OTHER, tenant="u")
        found: list[Due] = []
        for _ in range(1 + crowd // (outbox.LOOKED_AT - STAYING)):
            found, wait_s = await outbox.take(client, 64, 4, 16, busy)
            assert found or wait_s == 0, "there is more to look at"
            if found:
                break
        assert [due.id for due in found] == ["evt_other_1"]
        at = await server_time(client)
        assert await client.zcount(keys.OUTBOX, "-inf", at) >= STAYING, "some stay for when there is room"
        assert await client.zcount(keys.OUTBOX, "-inf", at + PUT_OFF_S) == crowd
        assert len(await take(client)) == room

    drive(store_url, main)


def test_what_arrived_is_kept_for_a_day_and_nothing_changes_it(store_url: str) -> None:
    async def main(client: Any) -> None:
        await put(client, "evt_b_1")
        due = await take_one(client)
        assert await deliver(client, due) == "delivered"
        assert await fail(client, due) == "stale"
        assert await deliver(client, due) == "stale"
        assert await client.zcard(keys.OUTBOX) == 0
        assert 0 < await client.ttl(keys.event("evt_b_1")) <= DELIVERED_KEPT_S
        (event,) = (await outbox.events_of(client, "t")).events
        assert (event.state, event.attempts, event.last_status, event.last_error) == ("delivered", 1, 200, None)
        assert event.due_at is None
        assert event.last_at == pytest.approx(await server_time(client), abs=10)

    drive(store_url, main)


def test_what_failed_is_due_again(store_url: str) -> None:
    async def main(client: Any) -> None:
        await put(client, "evt_b_1")
        assert await fail(client, await take_one(client), 120) == "failed"
        (event,) = (await outbox.events_of(client, "t")).events
        assert (event.state, event.attempts, event.last_status, event.last_error) == ("pending", 1, 500, "status_500")
        assert event.due_at is not None
        assert event.last_at is not None
        assert event.due_at - event.last_at == pytest.approx(120, abs=0.01)
        assert await client.ttl(keys.event("evt_b_1")) == -1

    drive(store_url, main)


def test_the_last_try_is_at_the_end_of_its_day_and_then_it_is_dead(store_url: str) -> None:
    async def main(client: Any) -> None:
        await put(client, "evt_b_1", age_s=TRIED_S - 100)
        assert await fail(client, await take_one(client), 8 * 3600) == "failed"
        (event,) = (await outbox.events_of(client, "t")).events
        assert event.due_at == pytest.approx(event.created_at + TRIED_S, abs=0.01)

        await client.hset(keys.event("evt_b_1"), "created_at", event.created_at - 101)
        await end_lease(client, "evt_b_1")
        due = await take_one(client)
        assert await fail(client, due) == "dead"
        assert await fail(client, due) == "stale"
        assert await client.zcard(keys.OUTBOX) == 0
        assert DELIVERED_KEPT_S < await client.ttl(keys.event("evt_b_1")) <= DEAD_KEPT_S
        assert (await client.zcard(keys.OUTBOX), dead(store_url)) == (0, 1)

    drive(store_url, main)


def test_a_receiver_that_is_gone_gets_no_more_tries(store_url: str) -> None:
    async def main(client: Any) -> None:
        await put(client, "evt_b_1")
        due = await take_one(client)
        assert await outbox.settle(client, due, "gone", 410, "status_410", 5.0) == "dead"
        assert await take(client) == []

    drive(store_url, main)


def test_a_failure_told_late_does_not_move_what_another_has_taken(store_url: str) -> None:
    async def main(client: Any) -> None:
        await put(client, "evt_b_1")
        stalled = await take_one(client)
        await end_lease(client, "evt_b_1")
        await take_one(client)
        before = await client.zscore(keys.OUTBOX, "evt_b_1")
        assert await fail(client, stalled, 1.0) == "stale"
        assert await client.zscore(keys.OUTBOX, "evt_b_1") == before

    drive(store_url, main)


def test_a_delivery_told_late_counts_even_if_the_event_is_dead(store_url: str) -> None:
    async def main(client: Any) -> None:
        await put(client, "evt_b_1", age_s=TRIED_S + 1)
        stalled = await take_one(client)
        await end_lease(client, "evt_b_1")
        assert await fail(client, await take_one(client)) == "dead"
        assert await deliver(client, stalled) == "delivered"
        assert (await client.zcard(keys.OUTBOX), dead(store_url)) == (0, 0)
        assert await client.ttl(keys.event("evt_b_1")) <= DELIVERED_KEPT_S

    drive(store_url, main)


def test_what_has_no_record_is_taken_off_the_lists(store_url: str) -> None:
    async def main(client: Any) -> None:
        for number in range(3):
            await put(client, f"evt_{number}_1", age_s=number)
        await client.delete(keys.event("evt_0_1"))
        await client.hdel(keys.event("evt_1_1"), "url")
        await client.hset(keys.event("evt_of_a_later_mimoq"), "kind", "task")
        await client.zadd(keys.OUTBOX, {"evt_of_a_later_mimoq": 1})
        assert [due.id for due in await take(client)] == ["evt_2_1"]
        assert sorted(await client.zrange(keys.OUTBOX, 0, -1)) == [b"evt_2_1", b"evt_of_a_later_mimoq"]
        await client.delete(keys.event("evt_1_1"))
        assert [event.id for event in (await outbox.events_of(client, "t")).events] == ["evt_2_1"]
        assert await client.zrange(keys.tenant_events("t"), 0, -1) == [b"evt_2_1"]

    drive(store_url, main)


def test_a_list_that_nobody_reads_stays_short(store_url: str) -> None:
    async def main(client: Any) -> None:
        for number in range(60):
            await put(client, f"evt_{number}_1")
            await deliver(client, await take_one(client))
            await client.delete(keys.event(f"evt_{number}_1"))  # its day is over
        assert await client.zcard(keys.tenant_events("t")) < 30
        assert await client.ttl(keys.tenant_events("t")) > DEAD_KEPT_S

    drive(store_url, main)


def test_a_tenant_sees_its_own_events_the_newest_first_page_by_page(store_url: str) -> None:
    async def main(client: Any) -> None:
        for number in range(7):
            await put(client, f"evt_{number}_1", age_s=number * 10)
        await put(client, "evt_theirs_1", tenant="u")
        seen: list[str] = []
        after = None
        for _ in range(3):
            page = await outbox.events_of(client, "t", limit=3, after=after)
            seen += [event.id for event in page.events]
            after = page.next
        assert seen == [f"evt_{number}_1" for number in range(7)]
        assert after is None
        assert [event.id for event in (await outbox.events_of(client, "u")).events] == ["evt_theirs_1"]
        assert await outbox.events_of(client, "nobody") == outbox.Page([], None)
        for unknown in ("evt_theirs_1", "evt_never_1"):
            with pytest.raises(NotFound, match=unknown):
                await outbox.events_of(client, "t", after=unknown)

    drive(store_url, main)


def test_a_page_goes_on_after_an_event_that_has_expired_meanwhile(store_url: str) -> None:
    async def main(client: Any) -> None:
        for number in range(4):
            await put(client, f"evt_{number}_1", age_s=number * 10)
        first = await outbox.events_of(client, "t", limit=2)
        await client.delete(keys.event("evt_1_1"))
        rest = await outbox.events_of(client, "t", limit=2, after=first.next)
        assert [event.id for event in rest.events] == ["evt_2_1", "evt_3_1"]

    drive(store_url, main)


def test_a_page_that_ends_on_an_expired_event_can_be_gone_on_from(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "LOOKED_AT", 2)

    async def main(client: Any) -> None:
        for number in range(4):
            await put(client, f"evt_{number}_1", age_s=number * 10)
        await client.delete(keys.event("evt_1_1"))
        first = await outbox.events_of(client, "t", limit=2)
        assert [event.id for event in first.events] == ["evt_0_1"]
        rest = await outbox.events_of(client, "t", limit=2, after=first.next)
        assert [event.id for event in rest.events] == ["evt_2_1", "evt_3_1"]

    drive(store_url, main)


def test_events_are_listed_by_state(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "LOOKED_AT", 5)

    async def main(client: Any) -> None:
        for number in range(12):
            await put(client, f"evt_{number:02}_1", age_s=TRIED_S + number)
        for due in await take(client):
            await fail(client, due)
        dead = {f"evt_{number:02}_1" for number in range(12) if await state(client, f"evt_{number:02}_1") == "dead"}
        assert len(dead) == 4
        found: set[str] = set()
        after = None
        for _ in range(3):  # 12 events, 5 looked at in each step
            page = await outbox.events_of(client, "t", limit=4, after=after, state="dead")
            found |= {event.id for event in page.events}
            after = page.next
        assert found == dead
        assert after is None
        assert len((await outbox.events_of(client, "t", limit=12, state="pending")).events) == 8

    drive(store_url, main)


def test_a_dead_event_goes_again_with_a_day_of_its_own(store_url: str) -> None:
    async def main(client: Any) -> None:
        await put(client, "evt_b_1", age_s=TRIED_S + 1)
        await fail(client, await take_one(client))
        async with client.pubsub() as channel:
            await channel.subscribe(keys.OUTBOX)
            assert (await channel.get_message(timeout=5))["type"] == "subscribe"
            assert await outbox.again(client, "t", "evt_b_1")
            assert (await channel.get_message(timeout=5))["data"] == b"evt_b_1"
        assert await client.ttl(keys.event("evt_b_1")) == -1
        assert (await client.zcard(keys.OUTBOX), dead(store_url)) == (1, 0)
        due = await take_one(client)
        assert (due.attempt, due.tries) == (2, 1)
        assert await fail(client, due, 2 * TRIED_S) == "failed"
        (event,) = (await outbox.events_of(client, "t")).events
        assert event.due_at == pytest.approx(await server_time(client) + TRIED_S, abs=10)

    drive(store_url, main)


def test_a_waiting_event_goes_at_once_and_an_arrived_one_does_not(store_url: str) -> None:
    async def main(client: Any) -> None:
        await put(client, "evt_b_1")
        await fail(client, await take_one(client), 3600)
        assert await take(client) == []
        assert await outbox.again(client, "t", "evt_b_1")
        await deliver(client, await take_one(client))
        assert not await outbox.again(client, "t", "evt_b_1")
        assert await take(client) == []

    drive(store_url, main)


def test_nobody_sends_an_event_of_another_tenant_again(store_url: str) -> None:
    async def main(client: Any) -> None:
        await put(client, "evt_b_1", due_in_s=100)
        for tenant, event_id in (("u", "evt_b_1"), ("", "evt_b_1"), ("t", "evt_never_1")):
            with pytest.raises(NotFound, match=event_id):
                await outbox.again(client, tenant, event_id)
        assert await take(client) == []

    drive(store_url, main)


def test_the_dead_are_counted_while_they_can_be_seen(store_url: str) -> None:
    async def main(client: Any) -> None:
        at = await server_time(client)
        await client.zadd(keys.DEAD, {"evt_old_1": at - DEAD_KEPT_S - 1, "evt_new_1": at - 60})
        await put(client, "evt_b_1", age_s=TRIED_S + 1)
        assert (await client.zcard(keys.OUTBOX), dead(store_url)) == (1, 1)
        await fail(client, await take_one(client))
        assert await client.zrange(keys.DEAD, 0, -1) == [b"evt_new_1", b"evt_b_1"]

    drive(store_url, main)


def test_a_tenant_has_a_secret_of_its_own(store_url: str) -> None:
    async def main(client: Any) -> None:
        found = await outbox.secret_of(client, "t")
        assert found.startswith("whsec_")
        assert 24 <= len(base64.b64decode(found.removeprefix("whsec_"), validate=True)) <= 64
        assert await outbox.secret_of(client, "t") == found
        assert await outbox.secret_of(client, "u") != found

    drive(store_url, main)


def test_of_two_that_make_a_secret_the_first_has_made_it(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def overtaken() -> str:
        with connect(store_url) as other:
            other.hset(keys.SECRETS, "t", "whsec_theirs")
        return "whsec_ours"

    monkeypatch.setattr(outbox, "new_secret", overtaken)

    async def main(client: Any) -> None:
        assert await outbox.secret_of(client, "t") == "whsec_theirs"

    drive(store_url, main)


def test_out_of_memory_what_came_of_a_delivery_is_still_written(valkey: Valkey, store_url: str) -> None:
    async def main(client: Any) -> None:
        await put(client, "evt_b_1")
        await client.config_set("maxmemory", 1)
        try:
            assert await deliver(client, await take_one(client)) == "delivered"
        finally:
            await client.config_set("maxmemory", 0)

    drive(store_url, main)


def test_nothing_that_is_shown_tells_the_address(store_url: str) -> None:
    async def main(client: Any) -> None:
        await put(client, "evt_b_1")
        (event,) = (await outbox.events_of(client, "t")).events
        assert event.url == URL
        assert "private-part" not in repr(event) + repr(await take_one(client))

    drive(store_url, main)
