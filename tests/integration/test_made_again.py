"""Calls that make a batch and are made again by an SDK, because it did not hear what became of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.requests import CHAT
from jobs.submission import made_digest
from tests.integration.api_stand import ask, ask_message, core_standing
from tests.integration.engine_stand import in_loop

AGAIN = {"x-stainless-retry-count": "1"}
FIRST = {"x-stainless-retry-count": "0"}


def of_openai(**more: Any) -> dict[str, Any]:
    """The body of an OpenAI batch, unlike every other."""
    return {"endpoint": CHAT, "requests": [{"custom_id": "a", "body": ask()}], **more}


def of_anthropic() -> dict[str, Any]:
    """The body of a message batch, unlike every other."""
    return {"requests": [{"custom_id": "a", "params": ask_message()}, {"custom_id": "b", "params": ask_message()}]}


@pytest.mark.parametrize(("path", "make"), [("/v1/batches", of_openai), ("/v1/messages/batches", of_anthropic)])
def test_a_call_made_again_finds_what_it_made(store_url: str, tmp_path: Path, path: str, make: Any) -> None:
    @in_loop
    async def tell() -> None:
        async with core_standing(store_url, data_dir=tmp_path) as (_, client):
            body = make()

            async def made(headers: dict[str, str], body: Any = body) -> str:
                answered = await client.post(path, json=body, headers=headers)
                assert answered.status_code == 200, answered.text
                return str(answered.json()["id"])

            first = await made(FIRST)
            assert await made(AGAIN) == first
            # Calls alike may be meant; it is the last one that is made again.
            second = await made(FIRST)
            assert second != first
            assert await made(AGAIN) == second
            # One that never arrived is made by its retry.
            assert await made(AGAIN, make()) not in {first, second}
            # A key says it better.
            third = await made({**AGAIN, "Idempotency-Key": "k"})
            assert third not in {first, second}
            assert await made({"Idempotency-Key": "k"}) == third
            found = (await client.get(path)).json()["data"]
            assert len(found) == 4

    tell()


@in_loop
async def test_another_window_is_another_batch(store_url: str, tmp_path: Path) -> None:
    async with core_standing(store_url, data_dir=tmp_path) as (_, client):
        body = of_openai()
        first = (await client.post("/v1/batches", json=body)).json()["id"]
        other = await client.post("/v1/batches", json={**body, "completion_window": "1h"}, headers=AGAIN)
        assert other.json()["id"] != first
        files = (await client.get("/v1/files")).json()["data"]
        assert len(files) == 2
        await client.post("/v1/batches", json=body, headers=AGAIN)
        assert (await client.get("/v1/files")).json()["data"] == files


def test_tenants_have_digests_of_their_own() -> None:
    assert made_digest("", "x") == ""
    assert len({made_digest("openai\na", "x"), made_digest("openai\nb", "x"), made_digest("openai\na", "y")}) == 3
