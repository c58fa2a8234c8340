"""Webhooks from a submit over HTTP to its receiver, and what a tenant sees of them."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest
from aiohttp import web
from openai.types.webhooks import BatchCompletedWebhookEvent
from standardwebhooks import Webhook

from jobs import tokens
from jobs.connections import connect
from tests.integration.api_stand import answer, ask, claim, core_standing, line
from tests.integration.outbox_stand import receiving, until

#: Receivers of these tests are on this machine.
ALLOWED = {"webhook_allow_http": True, "webhook_allow_private": True}


def test_the_end_of_a_job_and_of_a_batch_is_told(store_url: str) -> None:
    async def main() -> None:
        async with core_standing(store_url, **ALLOWED) as (_, http), receiving() as receiver:
            told = {"lane": "interactive", "callback_url": receiver.url}
            job = (await http.post("/v1/jobs", json={"request": ask(), **told})).json()["id"]
            batch = (await http.post("/v1/job-batches", json={"requests": [line(), line()], **told})).json()["id"]
            assert (await http.get("/v1/webhook-deliveries")).json()["data"] == []
            for ids in ([job], [f"{batch}-0", f"{batch}-1"]):
                claimed = await asyncio.to_thread(claim, store_url, *ids)
                await asyncio.to_thread(answer, store_url, *claimed)
            await until(lambda: len(receiver.received) == 2)
            secret = (await http.get("/v1/webhook-secret")).json()["secret"]
            events = {}
            for request in receiver.received:
                Webhook(secret).verify(request.body, request.headers)
                event = json.loads(request.body)
                events[event["type"]] = event["data"]["id"]
                assert set(event) == {"id", "object", "type", "created_at", "data"}
                assert set(event["data"]) == {"id"}
            assert events == {"job.succeeded": job, "batch.completed": batch}
            ended = [item for item in receiver.received if b"batch.completed" in item.body]
            unwrapped = openai.OpenAI(api_key="x").webhooks.unwrap(ended[0].body, ended[0].headers, secret=secret)
            assert isinstance(unwrapped, BatchCompletedWebhookEvent)
            assert unwrapped.data.id == batch

            async def delivered() -> bool:
                found = (await http.get("/v1/webhook-deliveries", params={"state": "delivered"})).json()["data"]
                return {item["subject"] for item in found} == {job, batch}

            await until(delivered)
            first = (await http.get("/v1/webhook-deliveries", params={"limit": 1})).json()
            assert (first["data"][0]["subject"], first["has_more"]) == (batch, True)
            second = (await http.get("/v1/webhook-deliveries", params={"limit": 1, "after": first["after"]})).json()
            assert second["data"][0]["subject"] == job
            again = await http.post(f"/v1/webhook-deliveries/{first['data'][0]['id']}/retry")
            assert (again.status_code, again.json()["code"]) == (409, "delivered")

    asyncio.run(main())


def test_what_fails_can_be_seen_and_sent_again(store_url: str) -> None:
    async def main() -> None:
        async with core_standing(store_url, **ALLOWED) as (_, http), receiving() as receiver:
            receiver.answers.append(web.Response(status=500))
            told = {"lane": "interactive", "callback_url": receiver.url}
            job = (await http.post("/v1/jobs", json={"request": ask(), **told})).json()["id"]
            await http.post(f"/v1/jobs/{job}/cancel")

            async def failed() -> list[dict[str, object]]:
                found = (await http.get("/v1/webhook-deliveries", params={"state": "pending"})).json()["data"]
                return [item for item in found if item["last_status"] == 500]

            (event,) = await until(failed)
            assert (event["type"], event["subject"], event["last_error"]) == ("job.cancelled", job, "status_500")
            assert event["next_at"] > event["created_at"]
            assert (await http.post(f"/v1/webhook-deliveries/{event['id']}/retry")).status_code == 204
            await until(lambda: len(receiver.received) == 2)
            assert len(set(receiver.ids)) == 1

    asyncio.run(main())


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/x",
        "https://127.0.0.1/x",
        "https://[::1]/x",
        "https://169.254.169.254/latest/meta-data",
        "https://user:hunter2@example.com/",
        "ftp://example.com/",
        "https://",
        "x",
    ],
)
def test_an_address_that_may_not_be_called_is_refused_at_once(store_url: str, url: str) -> None:
    async def main() -> None:
        async with core_standing(store_url) as (_, http):
            for path, body in (("/v1/jobs", {"request": ask()}), ("/v1/job-batches", {"requests": [line()]})):
                refused = await http.post(path, json={**body, "callback_url": url})
                assert refused.status_code == 422, refused.text
                assert "hunter2" not in refused.text
            assert (await http.get("/v1/jobs")).json()["data"] == []

    asyncio.run(main())


def test_tenants_have_secrets_and_webhooks_of_their_own(store_url: str) -> None:
    async def main() -> None:
        with connect(store_url) as client:
            one, two = ({"Authorization": f"Bearer {tokens.create(client, name)}"} for name in ("one", "two"))
        async with core_standing(store_url, api_auth=True, **ALLOWED) as (_, http), receiving() as receiver:
            body = {"request": ask(), "callback_url": receiver.url}
            job = (await http.post("/v1/jobs", json=body, headers=one)).json()["id"]
            await http.post(f"/v1/jobs/{job}/cancel", headers=one)
            await until(lambda: receiver.received)
            (event,) = (await http.get("/v1/webhook-deliveries", headers=one)).json()["data"]
            assert (await http.get("/v1/webhook-deliveries", headers=two)).json()["data"] == []
            for path in (f"/v1/webhook-deliveries/{event['id']}/retry", "/v1/webhook-deliveries/evt_none_1/retry"):
                assert (await http.post(path, headers=two)).status_code == 404
            secrets = [(await http.get("/v1/webhook-secret", headers=who)).json()["secret"] for who in (one, two, one)]
            assert secrets[0] == secrets[2] != secrets[1]

    asyncio.run(main())
