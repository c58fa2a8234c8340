"""Calls that make a batch and are made again by an SDK, because it did not hear what became of them."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from api.retries import Made
from jobs import keys
from jobs.connections import connect
from jobs.requests import CHAT
from jobs.submission import heard, made_digest
from tests.integration.api_stand import ApiStand, api_stand, ask, ask_message, core_standing
from tests.integration.engine_stand import in_loop
from tests.waiting import wait_for

AGAIN = {"x-stainless-retry-count": "1"}
FIRST = {"x-stainless-retry-count": "0"}


def of_openai(**more: Any) -> dict[str, Any]:
    """The body of an OpenAI batch, unlike every other."""
    return {"endpoint": CHAT, "requests": [{"custom_id": "a", "body": ask()}], **more}


def of_anthropic() -> dict[str, Any]:
    """The body of a message batch, unlike every other."""
    return {"requests": [{"custom_id": "a", "params": ask_message()}, {"custom_id": "b", "params": ask_message()}]}


BOTH = pytest.mark.parametrize(("path", "make"), [("/v1/batches", of_openai), ("/v1/messages/batches", of_anthropic)])


@pytest.fixture
def client(store_url: str) -> Iterator[Any]:
    found: redis.Redis = connect(store_url)
    yield found
    found.close()


def age(client: Any, seconds: float = 1.0) -> list[str]:
    """Lets whatever is found by a call made again be so much older; returns the names of it."""
    names = [raw.decode() for raw in client.scan_iter(keys.made("*"))]
    for name in names:
        for member, made_at in client.zrange(name, 0, -1, withscores=True):
            client.zadd(name, {member: made_at - seconds})
    return names


@pytest.fixture
def unheard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of which nobody knows whether they were heard."""
    monkeypatch.setattr(Made, "__call__", super(Made, Made).__call__)


@BOTH
def test_a_call_made_again_finds_what_it_made(
    store_url: str, tmp_path: Path, client: Any, unheard: None, path: str, make: Any
) -> None:
    @in_loop
    async def tell() -> None:
        async with core_standing(store_url, data_dir=tmp_path) as (_, http):
            body = make()

            async def made(headers: dict[str, str], body: Any = body) -> str:
                answered = await http.post(path, json=body, headers=headers)
                assert answered.is_success, answered.text
                return str(answered.json()["id"])

            first = await made(FIRST)
            # So soon after it was made its maker may hear of it yet.
            age(client, -100.0)
            second = await made(AGAIN)
            assert second != first
            age(client, 101.0)  # by which the second seems to be the older one
            assert await made(AGAIN) == second
            # Calls alike may be meant: of several that nobody has heard of the oldest is made again.
            third = await made(FIRST)
            assert third not in {first, second}
            age(client)
            assert await made(AGAIN) == second
            # One that never arrived is made by its retry. One that was stopped is no more.
            assert await made(AGAIN, make()) not in {first, second, third}
            await http.post(f"{path}/{second}/cancel")
            assert await made(AGAIN) == first
            # A key says it better.
            fourth = await made({**AGAIN, "Idempotency-Key": "k"})
            assert fourth not in {first, second, third}
            assert await made({"Idempotency-Key": "k"}) == fourth
            assert len((await http.get(path)).json()["data"]) == 5

    tell()


@BOTH
def test_what_was_heard_is_found_by_no_other_call(
    store_url: str, tmp_path: Path, client: Any, path: str, make: Any
) -> None:
    @in_loop
    async def tell() -> None:
        async with core_standing(store_url, data_dir=tmp_path) as (_, http):
            body = make()
            first = (await http.post(path, json=body)).json()["id"]
            assert age(client) == []
            # Its retry count says that this one's first try was refused, not that it has made anything.
            assert (await http.post(path, json=body, headers=AGAIN)).json()["id"] != first

    tell()


@BOTH
def test_ten_alike_at_once_are_ten_though_some_were_refused_before(
    store_url: str, tmp_path: Path, path: str, make: Any
) -> None:
    @in_loop
    async def tell() -> None:
        async with core_standing(store_url, data_dir=tmp_path) as (_, http):
            body = make()
            calls = (http.post(path, json=body, headers=AGAIN if number % 2 else FIRST) for number in range(10))
            assert len({answered.json()["id"] for answered in await asyncio.gather(*calls)}) == 10

    tell()


@in_loop
async def test_another_window_is_another_batch(store_url: str, tmp_path: Path, unheard: None) -> None:
    async with core_standing(store_url, data_dir=tmp_path) as (_, http):
        client = connect(store_url)
        body = of_openai()
        first = (await http.post("/v1/batches", json=body)).json()["id"]
        age(client)
        other = await http.post("/v1/batches", json={**body, "completion_window": "1h"}, headers=AGAIN)
        assert other.json()["id"] != first
        files = (await http.get("/v1/files")).json()["data"]
        assert len(files) == 2
        assert (await http.post("/v1/batches", json=body, headers=AGAIN)).json()["id"] == first
        assert (await http.get("/v1/files")).json()["data"] == files
        client.close()


def test_tenants_have_digests_of_their_own(client: Any) -> None:
    assert made_digest("", "x") == ""
    assert len({made_digest("openai\na", "x"), made_digest("openai\nb", "x"), made_digest("openai\na", "y")}) == 3
    heard(client, "0" * 24)  # of nothing


#: Dies as soon as a batch has been made, before anybody is told.
DIES = """
import api.retries, os, signal, sys
api.retries.Made.__call__ = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
"""


@BOTH
def test_the_retry_of_a_call_whose_process_died_makes_nothing_new(tmp_path: Path, path: str, make: Any) -> None:
    with api_stand(tmp_path) as stand:
        token, body = stand.token(), make()
        dying = stand.api(DIES)
        with pytest.raises(httpx.RemoteProtocolError):
            stand.http(token, dying).post(path, json=body)
        assert dying.process.wait(30) == -signal.SIGKILL
        wait_for(lambda: old(stand), what="a batch that was made long enough ago")
        http = stand.http(token, stand.api())
        (made,) = http.get(path).json()["data"]
        assert http.post(path, json=body, headers=AGAIN).json()["id"] == made["id"]
        assert len(http.get(path).json()["data"]) == 1


def old(stand: ApiStand) -> bool:
    """Whether what was made is older than an answer takes."""
    (name,) = stand.redis.scan_iter(keys.made("*"))
    found: Any = stand.redis.zrange(name, 0, -1, withscores=True)
    seconds, micros = stand.redis.time()
    return seconds + micros / 1e6 - float(found[0][1]) > 0.25
