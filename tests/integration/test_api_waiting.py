"""Waiting without asking again, submitting together, and how an API process ends."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from api import bodies, groups, streams, uploads, waiters
from api.auth import ANYBODY
from api.core import Core
from api.job_routes import _waited
from jobs import keys, singles
from jobs.connections import connect
from jobs.errors import Conflict, NoRoom
from jobs.looks import JobLook
from jobs.patience import no_patience
from jobs.requests import CHAT, Request
from jobs.singles import Enlisted, Single, enlist
from jobs.states import job_id
from jobs.store import NewBatch, Store
from tests.components import Valkey
from tests.integration.api_stand import ApiStand, answer, api_stand, ask, claim, core_standing, line, lines
from tests.integration.engine_stand import in_loop, until
from tests.waiting import wait_for


def request(number: int = 0, size: int = 0) -> Request:
    """A request of about so many bytes."""
    return Request(CHAT, b'{"model":"m","messages":[{"role":"user","content":"%d%s"}]}' % (number, b"x" * size))


def asked(client: Any, command: str = "evalsha") -> int:
    """How often the store was asked so."""
    return int(client.info("commandstats").get(f"cmdstat_{command}", {}).get("calls", 0))


class Looks:
    """Counts how often each job has been looked at: only a look that is over can't see an end any more."""

    def __init__(self, core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
        self.of: Counter[str] = Counter()
        look = core.look

        async def counted(caller: Any, job: str) -> JobLook:
            found = await look(caller, job)
            self.of[job] += 1
            return found

        monkeypatch.setattr(core, "look", counted)


# -- waiting


@in_loop
async def five_thousand(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with core_standing(url) as (core, _):
        store = Store(connect(url))
        batch = store.submit([request(n) for n in range(3_000)], NewBatch())[0]
        alone = [Single(NewBatch(), request(n)) for n in range(2_000)]
        enlisted = await asyncio.gather(*(core.submit(single) for single in alone))
        jobs = [job_id(batch, n) for n in range(3_000)] + [job_id(one.batch_id, 0) for one in enlisted]
        looks = Looks(core, monkeypatch)
        waits = {job: asyncio.create_task(_waited(core, ANYBODY, job, 600.0)) for job in jobs}
        # Each looks twice before it waits: without and with a waiter, so that no end between is missed.
        await until(lambda: all(looks.of[job] == 2 for job in jobs), "5,000 who wait", 60.0)
        assert len(core.waiters) == 5_000
        ending = [*jobs[:3_000:100], *jobs[3_000::100]]
        held = await asyncio.to_thread(claim, url, *ending, lane="bulk")
        before = asked(store.client)
        await asyncio.to_thread(answer, url, *(job for job in held if job.batch_id == batch))
        for job in held:
            if job.batch_id != batch:
                await asyncio.to_thread(answer, url, job)
        ends = len(held) - sum(job.batch_id == batch for job in held) + 1
        looked = await asyncio.wait_for(asyncio.gather(*(waits.pop(job) for job in ending)), 10.0)
        assert {look.state for look in looked} == {"succeeded"}
        # Those that were told have looked once more, together; the others have not stirred.
        assert not any(wait.done() for wait in waits.values())
        assert looks.of.total() == 10_000 + len(ending)
        assert asked(store.client) - before <= ends + len(ending)
        assert len(core.waiters) == 5_000 - len(ending)
        for wait in waits.values():
            wait.cancel()
        await asyncio.wait(waits.values())
        assert len(core.waiters) == 0
        await until(lambda: len(store.client.pubsub_channels("mimoq:batch:*")) <= 1, "nothing left that is listened to")
        store.client.close()


def test_five_thousand_wait_and_each_wakes_when_its_own_job_ends(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiters, "LOOK_S", 600.0)
    five_thousand(store_url, monkeypatch)


@in_loop
async def test_who_waits_wakes_though_the_store_was_away_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiters, "LOOK_S", 600.0)
    valkey = Valkey(durable=True)
    try:
        async with core_standing(valkey.url) as (core, http):
            sent = [await http.post("/v1/jobs", json={"request": ask()}) for _ in range(20)]
            jobs = [response.json()["id"] for response in sent]
            waits = [asyncio.create_task(http.get(f"/v1/jobs/{job}", params={"wait": 600})) for job in jobs]
            await until(lambda: len(core.waiters) == 20, "20 who wait")
            held = await asyncio.to_thread(claim, valkey.url, *jobs, lane="bulk")
            for round in range(2):
                valkey.kill()
                valkey.start()
                # Before the process can have noticed: nobody hears of it.
                await asyncio.to_thread(answer, valkey.url, held[round])
                found = (await asyncio.wait_for(waits[round], 20.0)).json()
                assert (found["id"], found["state"]) == (jobs[round], "succeeded")
            # And those after it are told again.
            await asyncio.to_thread(answer, valkey.url, held[10])
            assert (await asyncio.wait_for(waits[10], 20.0)).json()["state"] == "succeeded"
            assert not waits[15].done()
            assert not core.died
            for wait in waits:
                wait.cancel()
            await asyncio.wait(waits)
    finally:
        valkey.stop()


@in_loop
async def test_who_comes_while_the_store_is_away_waits_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    valkey = Valkey(durable=True)
    try:
        async with core_standing(valkey.url) as (core, http):
            job = (await http.post("/v1/jobs", json={"request": ask()})).json()["id"]
            valkey.kill()
            wait = asyncio.create_task(http.get(f"/v1/jobs/{job}", params={"wait": 600}))
            await asyncio.sleep(0)
            valkey.start()
            await until(lambda: len(core.waiters) == 1, "one who waits", 20.0)
            held = await asyncio.to_thread(claim, valkey.url, job, lane="bulk")
            await asyncio.to_thread(answer, valkey.url, *held)
            assert (await asyncio.wait_for(wait, 20.0)).json()["state"] == "succeeded"
    finally:
        valkey.stop()


# -- submitting together


@in_loop
async def test_what_is_submitted_at_once_is_written_and_rung_for_together(store_url: str) -> None:
    async with core_standing(store_url) as (_, http):
        client = connect(store_url)
        first = {"request": ask(), "custom_id": "first"}
        await http.post("/v1/jobs", json=first, headers={"Idempotency-Key": "k"})  # and the scripts are loaded
        await until(lambda: client.llen("mimoq.bulk") == 1, "the first ring")
        before = asked(client)

        async def one(number: int) -> tuple[int, httpx.Response]:
            headers = {"Idempotency-Key": "k"} if number % 10 == 0 else {}
            new = {"request": ask(), "custom_id": f"c{number}", "metadata": {"n": str(number)}}
            return number, await http.post("/v1/jobs", json=new, headers=headers)

        answers = await asyncio.gather(*map(one, range(300)))
        assert asked(client) - before < 60
        ids = set()
        for number, response in answers:
            if number % 10 == 0:  # another body under a key that is taken
                assert (response.status_code, response.json()["code"]) == (409, "conflict")
                continue
            job = response.json()
            assert (response.status_code, job["custom_id"], job["metadata"]) == (202, f"c{number}", {"n": str(number)})
            ids.add(job["id"])
        assert len(ids) == 270
        looked = await asyncio.gather(*(http.get(f"/v1/jobs/{job}") for job in ids))
        assert {response.json()["state"] for response in looked} == {"queued"}
        # A ring stands for a slice's worth of jobs.
        await until(lambda: client.llen("mimoq.bulk") >= 1 + 270 / 50, "rings for all of them")
        assert client.llen("mimoq.bulk") < 60
        client.close()


def test_of_a_group_each_gets_what_is_its_own(store_url: str) -> None:
    client = connect(store_url)
    same = NewBatch(identity="i", content="a")
    new = [
        Single(same, request(1)),
        Single(NewBatch(identity="i", content="b"), request(2)),
        Single(NewBatch(), request(3)),
        Single(NewBatch(identity="i", content="a"), request(1)),
        Single(NewBatch(), request(4, 100_000)),
    ]
    came = enlist(client, new, no_patience(), Store(client)._room)
    assert [type(item) for item in came] == [Enlisted, Conflict, Enlisted, Enlisted, Enlisted]
    found = [item for item in came if isinstance(item, Enlisted)]
    assert [item.created for item in found] == [True, True, False, True]
    assert found[2].batch_id == found[0].batch_id == same.batch_id
    assert Store(client).requests(found[3].batch_id, [0], 50)[0] == request(4, 100_000)
    # Asked again, because the answer got lost: the same, and nothing is made twice.
    again = enlist(client, new, no_patience(), Store(client)._room)
    assert [item.batch_id for item in again if isinstance(item, Enlisted)] == [item.batch_id for item in found]
    assert client.zcard(keys.BATCHES) == 3
    client.close()


class Full:
    """Room for so many steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def check(self, jobs: int, size: int) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise NoRoom("no room")

    def added(self, jobs: int) -> None:
        """Nobody counts."""


def test_what_was_made_before_a_group_failed_is_told(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is told that nothing was submitted submits again, and would pay twice."""
    monkeypatch.setattr(singles, "STEP_BYTES", 2_000)
    client = connect(store_url)
    new = [Single(NewBatch(), request(n, 1_000)) for n in range(4)]
    room: Any = Full(2)
    came = enlist(client, new, no_patience(), room)
    assert [type(item) for item in came] == [Enlisted, Enlisted, NoRoom, NoRoom]
    assert client.zcard(keys.BATCHES) == 2
    client.close()


@in_loop
async def test_a_group_is_never_larger_than_said(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "MOST", 7)
    async with core_standing(store_url) as (core, _):
        sizes: list[int] = []
        work = core._commits._work

        def counted(store: Store, items: Any) -> Any:
            sizes.append(len(items))
            return work(store, items)

        monkeypatch.setattr(core._commits, "_work", counted)
        came = await asyncio.gather(*(core.submit(Single(NewBatch(), request(n))) for n in range(40)))
        assert len({item.batch_id for item in came}) == sum(sizes) == 40
        assert max(sizes) <= 7


# -- ending


@pytest.fixture
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiStand]:
    with api_stand(tmp_path_factory.mktemp("api")) as stand:
        yield stand


def test_told_to_stop_it_lets_nobody_wait(stand: ApiStand) -> None:
    http = stand.http(api=stand.api())
    job = http.post("/v1/jobs", json={"request": ask()}).json()["id"]
    batch = http.post("/v1/job-batches", json={"requests": [line()]}).json()["id"]

    def streamed(path: str) -> tuple[int, str]:
        with http.stream("GET", f"/v1/job-batches/{batch}/{path}") as response:
            began.append(path)
            return response.status_code, "".join(response.iter_text())

    began: list[str] = []
    with ThreadPoolExecutor() as pool:
        poll = pool.submit(http.get, f"/v1/jobs/{job}", params={"wait": 600})
        posted = pool.submit(http.post, "/v1/jobs", json={"request": ask()}, params={"wait": 600})
        call = pool.submit(http.post, "/v1/chat/completions", json=ask())
        results = pool.submit(streamed, "results?follow=true")
        events = pool.submit(streamed, "events")
        wait_for(
            lambda: len(began) == 2 and len(stand.redis.pubsub_channels("mimoq:batch:*:events")) >= 5,
            what="all who wait",
        )
        told = time.monotonic()
        assert stand.apis[0].end(signal.SIGTERM) == 0
        assert time.monotonic() - told < 8.0
        assert (poll.result().status_code, poll.result().json()["state"]) == (200, "queued")
        assert (posted.result().status_code, posted.result().json()["state"]) == (202, "queued")
        assert (call.result().status_code, call.result().headers["x-should-retry"]) == (503, "true")
        assert call.result().json()["error"]["job_id"] == call.result().headers["x-mimoq-job-id"]
        assert results.result() == (200, "")
        assert events.result()[0] == 200
        assert "event: progress" in events.result()[1]
    assert [record for record in stand.apis[0].records() if record["level"] == "error"] == []
    stand.kept_secrets()


DIES = """
import sys
from api.waiters import Waiters

async def dies(waiters):
    raise RuntimeError("a fault")

Waiters.run = dies
"""


def test_a_process_whose_part_has_died_ends(stand: ApiStand) -> None:
    api = stand.api(DIES)
    assert api.process.wait(60) == 1
    assert [record["error"] for record in api.records() if record["event"] == "api_task_died"] == ["RuntimeError"]


def test_an_upload_that_hangs_does_not_keep_it(stand: ApiStand) -> None:
    api = stand.api("import sys\nimport api.__main__\napi.__main__.STOP_S = 1.0")
    host, port = api.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/job-batches HTTP/1.1\r\nHost: x\r\nX-Api-Key: {stand.token()}\r\nContent-Length: 9999\r\n"
        connection.sendall(f"{head}Content-Type: application/jsonl\r\n\r\n".encode() + json.dumps(line()).encode())
        http = stand.http(api=api)
        assert http.get("/v1/jobs").status_code == 200
        assert api.end(signal.SIGTERM) == 0
    assert stand.redis.zcard(keys.BATCHES) == 0


# -- what there is only so much of


@in_loop
async def test_a_tenant_has_so_much_open_at_once(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "TENANT_STREAMS", 1)
    monkeypatch.setattr(uploads, "TENANT_UPLOADS", 1)
    monkeypatch.setattr(uploads, "TURN_S", 0.05)
    monkeypatch.setattr(bodies, "TENANT_LARGE", 1)
    large = json.dumps({"request": ask(user="x" * bodies.LARGE_BYTES)}).encode()
    many = json.dumps({"requests": [ask(user="x" * bodies.LARGE_BYTES)]}).encode()
    async with core_standing(store_url) as (core, http):
        batch = (await http.post("/v1/job-batches", json={"requests": [line()]})).json()["id"]
        await http.post(f"/v1/job-batches/{batch}/cancel")

        async def tries() -> list[int]:
            return [
                (await http.get(f"/v1/job-batches/{batch}/results")).status_code,
                (await http.get(f"/v1/job-batches/{batch}/events")).status_code,
                (await http.post("/v1/job-batches", content=many)).status_code,
                (await http.post("/v1/jobs", content=large)).status_code,
            ]

        turns = core.turns
        with turns.now("", "streams", 1), turns.now("", "uploads", 1), turns.now("", "large bodies", 1):
            assert await tries() == [429] * 4
            assert (await http.post("/v1/jobs", json={"request": ask()})).status_code == 202
            assert (await http.post("/v1/job-batches", json={"requests": [line()]})).status_code == 202
        assert await tries() == [200, 200, 202, 202]
        assert not core.turns


@in_loop
async def test_told_to_stop_it_tells_who_is_still_sending(store_url: str) -> None:
    async with core_standing(store_url) as (core, http):
        begun = asyncio.Event()

        async def body() -> AsyncIterator[bytes]:
            yield lines(line())
            begun.set()
            await asyncio.Event().wait()

        headers = {"Content-Type": "application/jsonl"}
        sending = asyncio.create_task(http.post("/v1/job-batches", content=body(), headers=headers))
        await begun.wait()
        await until(lambda: core.reading, "a body that is waited for")
        core.stop()
        told = await sending
        assert (told.status_code, told.json()["code"], told.headers["retry-after"]) == (503, "stopping", "1")
        assert (await http.get("/v1/job-batches")).json()["data"] == []


@in_loop
async def test_a_body_that_stands_still_is_not_waited_for(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "CHUNK_S", 0.01)

    async def body() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    async with core_standing(store_url) as (_, http):
        for path in ("/v1/jobs", CHAT):
            slow = await http.post(path, content=body())
            assert slow.status_code == 408
