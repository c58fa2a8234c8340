"""Message batches by the official anthropic SDK, sync and async: an API process, real workers, and the simulator behind it.

Requests that say so meet a refusal, an answer that is none, or an upstream that says nothing until the client goes.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import pytest
from anthropic.pagination import SyncPage
from anthropic.types import ErrorResponse
from anthropic.types.beta.messages import BetaMessageBatch
from anthropic.types.messages import DeletedMessageBatch, MessageBatch, MessageBatchIndividualResponse
from openai.types import Batch

from jobs import keys
from tests.compat.conftest import Make
from tests.compat.sdk_types import exact
from tests.integration.api_stand import ApiStand, api_stand, ask_message
from tests.waiting import wait_for

BATCHES = "/v1/messages/batches"
#: What both SDKs would do by themselves.
RETRIES = 2
GOOD, REFUSED, PAGE, STALLED = "say hello", "meet a 400", "meet a page", "meet a stall"

#: As Anthropic's guide to batches has it, its parts one behind the other. Address and key come by the environment.
GUIDE = """
import time

import anthropic
from anthropic.types.message_create_params import MessageCreateParamsNonStreaming
from anthropic.types.messages.batch_create_params import Request

client = anthropic.Anthropic()

message_batch = client.messages.batches.create(
    requests=[
        Request(
            custom_id="my-first-request",
            params=MessageCreateParamsNonStreaming(
                model="claude-opus-4-7",
                max_tokens=1024,
                messages=[{"role": "user", "content": "Hello, world"}],
            ),
        ),
        Request(
            custom_id="my-second-request",
            params=MessageCreateParamsNonStreaming(
                model="claude-opus-4-7",
                max_tokens=1024,
                messages=[{"role": "user", "content": "Hi again, friend: meet a 400"}],
            ),
        ),
    ]
)
print(message_batch.processing_status)
MESSAGE_BATCH_ID = message_batch.id

while True:
    message_batch = client.messages.batches.retrieve(MESSAGE_BATCH_ID)
    if message_batch.processing_status == "ended":
        break
    time.sleep(60)
print(message_batch.request_counts.succeeded, message_batch.request_counts.errored)

for result in client.messages.batches.results(MESSAGE_BATCH_ID):
    match result.result.type:
        case "succeeded":
            print(f"Success! {result.custom_id} {result.result.message.role}")
        case "errored":
            if result.result.error.error.type == "invalid_request_error":
                print(f"Validation error {result.custom_id}")
            else:
                print(f"Server error {result.custom_id}")
        case "expired":
            print(f"Request expired {result.custom_id}")

for message_batch in client.messages.batches.list(limit=20):
    print(message_batch.id == MESSAGE_BATCH_ID)
"""
#: Nobody waits a minute here.
HURRIED = "import time; sleep = time.sleep; time.sleep = lambda _: sleep(0.05)"

Anthropic = Make[anthropic.Anthropic]
AsyncAnthropic = Make[anthropic.AsyncAnthropic]


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiStand]:
    triggers = {REFUSED: "400", PAGE: "not_json", STALLED: "stall"}
    with api_stand(tmp_path_factory.mktemp("api"), triggers=triggers) as stand:
        stand.api()
        stand.work("bulk", "interactive", max_attempts="1")
        yield stand
        stand.kept_secrets()


@pytest.fixture
def token(stand: ApiStand) -> str:
    return stand.token()


@pytest.fixture
def client(stand: ApiStand, token: str, anthropic_client: Anthropic) -> anthropic.Anthropic:
    """The SDK's client of a new tenant."""
    return anthropic_client(stand.apis[0].url, token, RETRIES)


def asking(*prompts: str) -> Any:
    """Requests of these prompts, called r0, r1, and so on."""
    bodies = [ask_message(messages=[{"role": "user", "content": prompt}]) for prompt in prompts]
    return [{"custom_id": f"r{number}", "params": body} for number, body in enumerate(bodies)]


def ended(client: anthropic.Anthropic, batch: str) -> MessageBatch:
    """The batch, once it has ended."""

    def look() -> MessageBatch | None:
        found = client.messages.batches.retrieve(batch)
        return found if found.processing_status == "ended" else None

    found = wait_for(look, what="the batch's end")
    assert found is not None
    return found


def counts(batch: MessageBatch) -> tuple[int, int, int, int, int]:
    """Of its requests: processing, succeeded, errored, canceled, expired."""
    told = batch.request_counts
    return told.processing, told.succeeded, told.errored, told.canceled, told.expired


def raw(stand: ApiStand, token: str, path: str) -> Any:
    """What the API says, as it comes."""
    response = stand.http(token).get(path)
    assert response.status_code == 200, response.text
    return response.json()


def shown(stand: ApiStand, token: str, batch: str) -> MessageBatch:
    """The batch as the API says it is, held against the SDK's type: all of its fields are there, and no others."""
    told = raw(stand, token, f"{BATCHES}/{batch}")
    found = exact(MessageBatch, told)
    exact(BetaMessageBatch, told)
    assert told.keys() == MessageBatch.model_fields.keys()
    assert all(told[name].endswith("Z") for name in told if name.endswith("_at") and told[name] is not None)
    return found


def lines(stand: ApiStand, token: str, batch: str) -> dict[str, MessageBatchIndividualResponse]:
    """Results by custom id, each line held against the SDK's type."""
    response = stand.http(token).get(f"{BATCHES}/{batch}/results")
    assert (response.status_code, response.headers["content-type"]) == (200, "application/x-jsonl")
    assert response.content.endswith(b"\n")
    assert not {b"", b"\r"} & set(response.content[:-1].split(b"\n"))
    rows = [json.loads(text) for text in response.text.splitlines()]
    found = [exact(MessageBatchIndividualResponse, row) for row in rows]
    assert len({line.custom_id for line in found}) == len(found)
    return {line.custom_id: line for line in found}


def settled(stand: ApiStand, batch: str, succeeded: int, running: int) -> None:
    """Returns once so many of its requests have been answered, and the others hang."""

    def look() -> bool:
        status = stand.store.status(batch.removeprefix("msgbatch_"))
        return (status.succeeded, status.running) == (succeeded, running)

    wait_for(look, what=f"{succeeded} answers")


# -- a batch's life


def test_the_guides_script_as_it_is(stand: ApiStand, token: str) -> None:
    environment = {"ANTHROPIC_BASE_URL": stand.apis[0].url, "ANTHROPIC_API_KEY": token}
    ran = subprocess.run(
        [sys.executable, "-P", "-c", f"{HURRIED}\n{GUIDE}"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    first, counts, *results, listed = ran.stdout.splitlines()
    assert first in ("in_progress", "ended")
    assert (counts, listed) == ("1 1", "True")
    assert sorted(results) == ["Success! my-first-request assistant", "Validation error my-second-request"]


def test_from_create_to_results(stand: ApiStand, token: str, client: anthropic.Anthropic) -> None:
    stand.simulator.configure(hold=True)
    made = client.messages.batches.create(requests=asking(GOOD, REFUSED, PAGE, GOOD))
    stand.simulator.configure(hold=False)
    assert made.id.startswith("msgbatch_")
    assert (made.type, made.processing_status) == ("message_batch", "in_progress")
    assert counts(made) == (4, 0, 0, 0, 0)
    assert (made.expires_at - made.created_at).total_seconds() == pytest.approx(86_400, abs=0.01)
    assert made.created_at.utcoffset() is not None
    assert {made.results_url, made.ended_at, made.cancel_initiated_at, made.archived_at} == {None}
    over = ended(client, made.id)
    assert shown(stand, token, made.id) == over
    assert counts(over) == (0, 2, 2, 0, 0)
    assert over.results_url == f"{stand.apis[0].url}{BATCHES}/{made.id}/results"
    assert over.ended_at is not None
    assert over.created_at == made.created_at < over.ended_at < over.expires_at == made.expires_at
    found = {result.custom_id: result.result for result in client.messages.batches.results(made.id)}
    assert found == {name: line.result for name, line in lines(stand, token, made.id).items()}
    good, refused, page = found["r0"], found["r1"], found["r2"]
    assert good.type == "succeeded"
    assert good.message.content
    assert good.message.usage.output_tokens > 0
    assert refused.type == page.type == "errored"
    assert (refused.error.error.type, refused.error.error.message) == ("invalid_request_error", "Param Incorrect")
    assert page.error.error.type == "api_error"


def test_an_answer_is_what_a_call_would_have_given(client: anthropic.Anthropic) -> None:
    body: Any = {**ask_message(), "thinking": {"type": "disabled"}}
    batch = client.messages.batches.create(requests=[{"custom_id": "a", "params": body}])
    ended(client, batch.id)
    (line,) = client.messages.batches.results(batch.id)
    assert line.result.type == "succeeded"
    assert line.result.message == client.messages.create(**body)


def test_cancelled_at_half(stand: ApiStand, token: str, client: anthropic.Anthropic) -> None:
    made = client.messages.batches.create(requests=asking(*[GOOD, STALLED] * 10))
    settled(stand, made.id, succeeded=10, running=10)
    assert shown(stand, token, made.id).request_counts.processing == 20
    cancelled = client.messages.batches.cancel(made.id)
    assert cancelled.processing_status in ("canceling", "ended")  # as soon as the worker hears of it
    assert sum(counts(cancelled)) == 20
    assert cancelled.cancel_initiated_at is not None
    over = ended(client, made.id)
    assert shown(stand, token, made.id) == over
    assert counts(over) == (0, 10, 0, 10, 0)
    assert over.cancel_initiated_at == cancelled.cancel_initiated_at
    kinds = {name: line.result.type for name, line in lines(stand, token, made.id).items()}
    assert kinds == {f"r{number}": "canceled" if number % 2 else "succeeded" for number in range(20)}
    with pytest.raises(anthropic.BadRequestError, match="has ended"):
        client.messages.batches.cancel(made.id)


def test_expired_at_half(stand: ApiStand, token: str, client: anthropic.Anthropic) -> None:
    made = client.messages.batches.create(requests=asking(*[GOOD, STALLED] * 3))
    settled(stand, made.id, succeeded=3, running=3)
    stand.redis.zadd(keys.DEADLINES, {made.id.removeprefix("msgbatch_"): 1.0})
    over = ended(client, made.id)
    assert shown(stand, token, made.id) == over
    assert counts(over) == (0, 3, 0, 0, 3)
    assert over.cancel_initiated_at is None
    assert Counter(line.result.type for line in lines(stand, token, made.id).values()) == {"succeeded": 3, "expired": 3}


def test_deleted(stand: ApiStand, token: str, client: anthropic.Anthropic) -> None:
    made = client.messages.batches.create(requests=asking(STALLED))
    with pytest.raises(anthropic.BadRequestError, match="cancel it first"):
        client.messages.batches.delete(made.id)
    with pytest.raises(anthropic.AnthropicError, match="results_url"):
        client.messages.batches.results(made.id)
    client.messages.batches.cancel(made.id)
    ended(client, made.id)
    gone = stand.http(token).delete(f"{BATCHES}/{made.id}").json()
    assert exact(DeletedMessageBatch, gone).id == made.id
    calls: list[Callable[[str], object]] = [
        client.messages.batches.retrieve,
        client.messages.batches.cancel,
        client.messages.batches.delete,
        client.messages.batches.results,
    ]
    for call in calls:
        with pytest.raises(anthropic.NotFoundError):
            call(made.id)


def test_the_beta_client(client: anthropic.Anthropic) -> None:
    batches = client.beta.messages.batches
    made = batches.create(requests=asking(GOOD), betas=["message-batches-2024-09-24"])
    ended(client, made.id)
    assert [line.result.type for line in batches.results(made.id)] == ["succeeded"]
    assert [batch.id for batch in batches.list(limit=1)] == [made.id]
    assert batches.retrieve(made.id).processing_status == "ended"
    with pytest.raises(anthropic.BadRequestError):
        batches.cancel(made.id)
    assert batches.delete(made.id).type == "message_batch_deleted"


def test_asynchronous(stand: ApiStand, token: str, async_anthropic_client: AsyncAnthropic) -> None:
    async def main() -> None:
        async with async_anthropic_client(stand.apis[0].url, token, RETRIES) as client:
            batches = client.messages.batches
            made = [await batches.create(requests=asking(GOOD, REFUSED)) for _ in range(3)]
            for batch in made:
                found = await batches.retrieve(batch.id)
                while found.processing_status != "ended":
                    await asyncio.sleep(0.02)
                    found = await batches.retrieve(batch.id)
                assert (found.request_counts.succeeded, found.request_counts.errored) == (1, 1)
                kinds = {line.custom_id: line.result.type async for line in await batches.results(batch.id)}
                assert kinds == {"r0": "succeeded", "r1": "errored"}
            assert [batch.id async for batch in batches.list(limit=1)] == [batch.id for batch in reversed(made)]
            stalled = await batches.create(requests=asking(STALLED))
            assert (await batches.cancel(stalled.id)).cancel_initiated_at is not None
            assert (await batches.delete(made[0].id)).id == made[0].id
            with pytest.raises(anthropic.NotFoundError):
                await batches.retrieve(made[0].id)

    asyncio.run(main())


# -- lists


def test_pages(stand: ApiStand, token: str, client: anthropic.Anthropic) -> None:
    batches = client.messages.batches
    assert raw(stand, token, BATCHES) == {"data": [], "has_more": False, "first_id": None, "last_id": None}
    made = [batches.create(requests=asking(GOOD)).id for _ in range(5)][::-1]
    assert [batch.id for batch in batches.list()] == made
    for limit in range(1, 6):
        assert [batch.id for batch in batches.list(limit=limit)] == made
    page = batches.list(limit=2)
    assert ([batch.id for batch in page.data], page.has_more) == (made[:2], True)
    assert (page.first_id, page.last_id) == (made[0], made[1])
    assert [batch.id for batch in batches.list(limit=2, after_id=made[2])] == made[3:]
    # Backwards: each page lies right before the one before it, the newest of it first as ever.
    page = batches.list(limit=2, before_id=made[4])
    assert ([batch.id for batch in page.data], page.has_more) == (made[2:4], True)
    assert [batch.id for batch in page] == [*made[2:4], *made[:2]]
    last = batches.list(limit=2, before_id=made[2])
    assert ([batch.id for batch in last.data], last.has_more) == (made[:2], False)
    exact(SyncPage[MessageBatch], raw(stand, token, f"{BATCHES}?limit=2"))


def test_who_deletes_what_a_page_shows_sees_all(client: anthropic.Anthropic) -> None:
    batches = client.messages.batches
    made = [batches.create(requests=asking(GOOD)).id for _ in range(5)][::-1]
    for batch in made:
        ended(client, batch)
    seen = []
    for found in batches.list(limit=2):
        seen.append(found.id)
        batches.delete(found.id)
    assert seen == made
    assert batches.list().data == []


# -- errors


def test_a_request_that_breaks_a_rule_is_named(stand: ApiStand, token: str, client: anthropic.Anthropic) -> None:
    requests = asking(GOOD, GOOD, GOOD)
    requests[1]["params"]["max_tokens"] = 0
    with pytest.raises(anthropic.BadRequestError, match=r"requests\.1\.params\.max_tokens: 0 is under 1") as refused:
        client.messages.batches.create(requests=requests)
    body = exact(ErrorResponse, refused.value.body)
    assert body.error.type == "invalid_request_error"
    assert body.request_id == refused.value.request_id is not None
    requests[1] = {**requests[0], "custom_id": "not an id"}
    with pytest.raises(anthropic.BadRequestError, match=r"requests\.1\.custom_id: "):
        client.messages.batches.create(requests=requests)
    with pytest.raises(anthropic.BadRequestError, match="requests: is empty"):
        client.messages.batches.create(requests=[])
    assert client.messages.batches.list().data == []


def test_what_is_not_there(client: anthropic.Anthropic, anthropic_client: Anthropic, stand: ApiStand) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.batches.retrieve("msgbatch_013Zva2CMHLNnXjNJJKqJ2EF")
    assert exact(ErrorResponse, missing.value.body).error.type == "not_found_error"
    with pytest.raises(anthropic.BadRequestError) as unknown:
        client.messages.batches.list(after_id="msgbatch_013Zva2CMHLNnXjNJJKqJ2EF")
    assert exact(ErrorResponse, unknown.value.body).error.type == "invalid_request_error"
    with pytest.raises(anthropic.AuthenticationError) as stranger:
        anthropic_client(stand.apis[0].url, "mq_wrong").messages.batches.list()
    assert exact(ErrorResponse, stranger.value.body).error.type == "authentication_error"


def test_a_key_with_other_requests_is_not_tried_again(client: anthropic.Anthropic) -> None:
    def create(*prompts: str) -> MessageBatch:
        return client.messages.batches.create(requests=asking(*prompts), extra_headers={"Idempotency-Key": "k"})

    made = create(GOOD)
    assert create(GOOD).id == made.id
    with pytest.raises(anthropic.ConflictError) as other:
        create(REFUSED)
    assert other.value.response.headers["x-should-retry"] == "false"
    assert other.value.response.request.headers["x-stainless-retry-count"] == "0"
    assert [batch.id for batch in client.messages.batches.list()] == [made.id]


# -- the check itself

COUNTS = {"processing": 2, "succeeded": 0, "errored": 0, "canceled": 0, "expired": 0}
BATCH = {
    "id": "msgbatch_01",
    "type": "message_batch",
    "processing_status": "in_progress",
    "request_counts": COUNTS,
    "created_at": "2026-08-07T18:37:24.100435Z",
    "expires_at": "2026-08-08T18:37:24.100435Z",
}
ERROR = {"type": "api_error", "message": "m"}
OPENAI_BATCH = {
    "id": "batch_01",
    "object": "batch",
    "endpoint": "/v1/messages",
    "input_file_id": "file-01",
    "completion_window": "24h",
    "status": "failed",
    "created_at": 1_711_471_533,
    "errors": {"object": "list", "data": [{"code": "c", "line": None, "message": "m", "param": None}]},
    "metadata": {"k": "v"},
}


def errored(error: Any) -> dict[str, Any]:
    """A line of results."""
    return {"custom_id": "a", "result": {"type": "errored", "error": error}}


def test_what_fits_a_type_of_an_sdk() -> None:
    assert exact(MessageBatch, BATCH).request_counts.processing == 2
    exact(MessageBatch, {**BATCH, "results_url": None, "ended_at": None})
    exact(MessageBatchIndividualResponse, errored({"type": "error", "error": ERROR, "request_id": None}))
    own = errored({"type": "error", "error": {**ERROR, "code": "c"}})
    exact(MessageBatchIndividualResponse, own, besides=("result.error.error.code",))
    exact(SyncPage[MessageBatch], {"data": [BATCH], "has_more": False, "first_id": None, "last_id": None})
    assert exact(Batch, OPENAI_BATCH).status == "failed"


@pytest.mark.parametrize(
    ("model", "value", "why"),
    [
        (MessageBatch, {k: v for k, v in BATCH.items() if k != "expires_at"}, "expires_at: Field required"),
        (MessageBatch, {**BATCH, "expires_at": None}, "expires_at"),
        (MessageBatch, {**BATCH, "created_at": 1_711_471_533}, "created_at"),
        (MessageBatch, {**BATCH, "processing_status": "done"}, "processing_status"),
        (MessageBatch, {**BATCH, "request_counts": {**COUNTS, "expired": "0"}}, "request_counts.expired"),
        (MessageBatch, {**BATCH, "more": None}, "does not name more"),
        (MessageBatch, {**BATCH, "request_counts": {**COUNTS, "total": 2}}, "does not name request_counts.total"),
        (SyncPage[MessageBatch], {"data": [BATCH, {**BATCH, "more": 1}]}, r"does not name data\[1\].more"),
        (MessageBatchIndividualResponse, errored(ERROR), "Field required"),
        (
            MessageBatchIndividualResponse,
            errored({"type": "error", "error": {**ERROR, "code": "c"}}),
            "does not name result.error.error.code",
        ),
        (Batch, {**OPENAI_BATCH, "created_at": 1_711_471_533.5}, "created_at"),
        (Batch, {**OPENAI_BATCH, "status": "running"}, "status"),
        (Batch, {**OPENAI_BATCH, "metadata": {"k": 1}}, "metadata.k"),
        (Batch, {**OPENAI_BATCH, "errors": {"data": [{"line": "1"}]}}, "errors.data.0.line"),
        (Batch, {**OPENAI_BATCH, "errors": {"data": [{"text": "m"}]}}, r"does not name errors.data\[0\].text"),
    ],
)
def test_what_does_not_fit(model: Any, value: Any, why: str) -> None:
    with pytest.raises(AssertionError, match=why):
        exact(model, value)
