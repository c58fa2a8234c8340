"""OpenAI's files and batches by its official SDK as it is: an API process, a worker, and the simulator that is paid.

Every answer of the API to a client of these tests is held against the SDK's own types (`Checks`).
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import openai
import pytest
from anthropic.types import Message
from openai.types import Batch, BatchError, FileDeleted, FileObject
from openai.types.chat import ChatCompletion
from openai.types.webhooks import (
    BatchCancelledWebhookEvent,
    BatchCompletedWebhookEvent,
    BatchExpiredWebhookEvent,
    BatchFailedWebhookEvent,
)
from pydantic import BaseModel

from jobs.requests import MESSAGES
from ops.simulator import digest
from tests.compat.sdk_types import exact
from tests.integration.api_stand import PROMPT, ApiStand, api_stand, ask_message, line, lines
from tests.waiting import wait_for

CHAT: Any = "/v1/chat/completions"
ENDED = ("completed", "failed", "expired", "cancelled")
ROOT = Path(__file__).resolve().parents[2]
#: Prompts with these texts meet a fault of the simulator's.
REFUSED, FILTERED, STALLED = "meet a 400", "meet a 421", "meet a stall"
TRIGGERS = {REFUSED: "400", FILTERED: "421", STALLED: "stall"}
#: Times of a batch, in the order in which they come, for each way it may go.
WAYS = {
    "completed": ("created_at", "in_progress_at", "finalizing_at", "completed_at"),
    "expired": ("created_at", "in_progress_at", "finalizing_at", "expired_at"),
    "cancelled": ("created_at", "in_progress_at", "cancelling_at", "finalizing_at", "cancelled_at"),
    "failed": ("created_at", "failed_at"),
}

Model = TypeVar("Model", bound=BaseModel)


class Checks:
    """What a client of the SDK gets is to the letter what the SDK's types say; `seen` counts what that was."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()

    def now(self, response: httpx2.Response) -> None:
        """A hook of a client."""
        if self._has_type(response):
            response.read()
            self._check(response)

    async def soon(self, response: httpx2.Response) -> None:
        """A hook of an asynchronous client."""
        if self._has_type(response):
            await response.aread()
            self._check(response)

    def _has_type(self, response: httpx2.Response) -> bool:
        path = response.url.path
        return path.startswith(("/v1/files", "/v1/batches")) and (
            response.status_code != 200 or not path.endswith("/content")
        )

    def _check(self, response: httpx2.Response) -> None:
        raw = response.json()
        if response.status_code >= 400:
            error = raw.pop("error")
            assert raw == {}
            assert set(error) == {"message", "type", "param", "code"}
            assert all(isinstance(error[name], str) and error[name] for name in ("message", "type", "code"))
            assert error["param"] is None or isinstance(error["param"], str)
            self.seen["error"] += 1
        elif isinstance(raw.get("data"), list):
            assert set(raw) == {"object", "data", "first_id", "last_id", "has_more"}
            assert raw["object"] == "list"
            ids = [item["id"] for item in raw["data"]]
            assert (raw["first_id"], raw["last_id"]) == ((ids[0], ids[-1]) if ids else (None, None))
            assert isinstance(raw["has_more"], bool)
            for item in raw["data"]:
                self._exact(item)
        else:
            self._exact(raw)

    def _exact(self, raw: dict[str, Any]) -> None:
        model: type[BaseModel] = Batch if raw["object"] == "batch" else FileDeleted if "deleted" in raw else FileObject
        exact(model, raw)
        self.seen[model.__name__] += 1


@dataclass
class Hooks:
    """A receiver of webhooks in a thread, on loopback."""

    url: str = ""
    received: list[tuple[dict[str, str], bytes]] = field(default_factory=list)

    def wait(self, batch: str, count: int = 1) -> list[tuple[dict[str, str], bytes]]:
        """What came about this batch, once that is so much."""

        def came() -> list[tuple[dict[str, str], bytes]]:
            found = [item for item in self.received if json.loads(item[1])["data"]["id"] == batch]
            return found if len(found) >= count else []

        return wait_for(came, what=f"{count} events of {batch}")


@contextmanager
def receiving() -> Iterator[Hooks]:
    """Answers everything with 200."""
    hooks = Hooks()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            hooks.received.append(({name.lower(): value for name, value in self.headers.items()}, body))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """It says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hooks.url = f"http://127.0.0.1:{server.server_address[1]}/hook"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield hooks
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiStand]:
    folder = tmp_path_factory.mktemp("api")
    allowed = {"webhook_allow_http": "true", "webhook_allow_private": "true"}
    with api_stand(folder, triggers=TRIGGERS, answer_bytes=300) as stand:
        stand.api(files_dir=str(folder / "files"), **allowed)
        stand.work("bulk", max_attempts="1")
        yield stand
        stand.simulator.configure(hold=False)
        stand.kept_secrets()


@pytest.fixture(scope="module")
def hooks() -> Iterator[Hooks]:
    with receiving() as found:
        yield found


@pytest.fixture
def held(stand: ApiStand) -> Iterator[ApiStand]:
    """Its upstream answers nobody until told."""
    stand.simulator.configure(hold=True)
    yield stand
    stand.simulator.configure(hold=False, triggers=TRIGGERS)


@pytest.fixture
def checks() -> Checks:
    return Checks()


@pytest.fixture
def token(stand: ApiStand) -> str:
    """Of a new tenant."""
    return stand.token()


@pytest.fixture
def client(stand: ApiStand, token: str, checks: Checks) -> Iterator[openai.OpenAI]:
    """The SDK, for a new tenant."""
    http = openai.DefaultHttpxClient(trust_env=False, event_hooks={"response": [checks.now]})
    with openai.OpenAI(base_url=f"{stand.apis[0].url}/v1", api_key=token, max_retries=0, http_client=http) as client:
        yield client


def saying(custom_id: str, text: str, **more: Any) -> dict[str, Any]:
    """A line whose prompt holds this text."""
    made = line(custom_id, **more)
    made["body"]["messages"][0]["content"] += f" {text}"
    return made


def upload(client: openai.OpenAI, *items: Any) -> FileObject:
    """An input file of these lines."""
    return client.files.create(file=("in.jsonl", lines(*items)), purpose="batch")


def submit(client: openai.OpenAI, *items: Any, **more: Any) -> Batch:
    """A batch of these lines."""
    told: dict[str, Any] = {"endpoint": CHAT, "completion_window": "24h", **more}
    return client.batches.create(input_file_id=upload(client, *items).id, **told)


def completed(batch: Batch, count: int) -> bool:
    """Whether so many of its requests have been answered."""
    assert batch.request_counts is not None
    return batch.request_counts.completed == count


def when(client: openai.OpenAI, batch: Batch, holds: Callable[[Batch], bool], what: str) -> Batch:
    """The batch once this holds; counts never say more than there is."""

    def look() -> Batch | None:
        found = client.batches.retrieve(batch.id)
        counts = found.request_counts
        assert counts is not None
        assert counts.completed + counts.failed <= counts.total
        return found if holds(found) else None

    found = wait_for(look, what=what)
    assert found is not None
    return found


def ended(client: openai.OpenAI, batch: Batch, status: str = "completed") -> Batch:
    """The batch once it is over, which it must be in this way; its times are in order, and no others are there."""
    found = when(client, batch, lambda now: now.status in ENDED, "the end of a batch")
    assert found.status == status, found
    counts = found.request_counts
    assert counts is not None
    assert counts.completed + counts.failed == counts.total
    times = {name: at for name, at in found.model_dump().items() if name.endswith("_at") and name != "expires_at"}
    assert {name for name, at in times.items() if at is not None} == set(WAYS[status])
    assert [times[name] for name in WAYS[status]] == sorted(times[name] for name in WAYS[status])
    assert abs(found.created_at - time.time()) < 600
    return found


def rows(client: openai.OpenAI, file_id: str | None) -> dict[str, dict[str, Any]]:
    """Lines of an output or error file by custom id, each to the letter of the protocol."""
    if file_id is None:
        return {}
    content = client.files.content(file_id)
    assert content.content == content.read()
    assert content.content.endswith(b"\n")
    assert b"\r" not in content.content
    found = [json.loads(text) for text in content.text.splitlines()]
    for row in found:
        assert set(row) == {"id", "custom_id", "response", "error"}
        assert re.fullmatch(r"batch_req_[0-9a-f]{24}-\d+", row["id"])
        if row["response"] is not None:
            assert set(row["response"]) == {"status_code", "request_id", "body"}
            assert isinstance(row["response"]["body"], dict)
        if row["error"] is not None:
            assert set(row["error"]) == {"code", "message"}
    by_id = {row["custom_id"]: row for row in found}
    assert len(by_id) == len({row["id"] for row in found}) == len(found)
    described = client.files.retrieve(file_id)
    assert (described.bytes, described.purpose) == (len(content.content), "batch_output")
    return by_id


def paid(stand: ApiStand, *items: dict[str, Any]) -> list[int]:
    """How often the upstream was paid for each of these lines."""
    ledger = stand.simulator.ledger()["paid"]
    return [ledger.get(digest(item["body"]), 0) for item in items]


# -- from an upload to results


def test_openai_as_it_is(stand: ApiStand, client: openai.OpenAI, tmp_path: Path, checks: Checks) -> None:
    items = [line(f"request-{n}") for n in range(60)]
    path = tmp_path / "input.jsonl"
    path.write_bytes(lines(*items))
    file = client.files.create(file=path, purpose="batch")
    assert client.files.wait_for_processing(file.id).status == "processed"
    assert (file.filename, file.bytes, file.purpose) == ("input.jsonl", path.stat().st_size, "batch")
    assert file.expires_at == pytest.approx(file.created_at + 30 * 86_400, abs=1)
    batch = client.batches.create(
        input_file_id=file.id, endpoint=CHAT, completion_window="24h", metadata={"description": "nightly eval job"}
    )
    assert (batch.object, batch.endpoint, batch.completion_window) == ("batch", CHAT, "24h")
    assert (batch.status, batch.errors, batch.output_file_id, batch.error_file_id) == ("validating", None, None, None)
    assert batch.input_file_id == file.id
    assert batch.expires_at == pytest.approx(batch.created_at + 86_400, abs=1)
    done = ended(client, batch)
    assert (done.error_file_id, done.errors, done.model) == (None, None, "m")
    assert done.metadata == {"description": "nightly eval job"}
    assert done.request_counts is not None
    assert done.request_counts.model_dump() == {"total": 60, "completed": 60, "failed": 0}
    found = rows(client, done.output_file_id)
    assert set(found) == {item["custom_id"] for item in items}
    tokens: Counter[str] = Counter()
    for row in found.values():
        assert (row["error"], row["response"]["status_code"]) == (None, 200)
        completion = ChatCompletion.model_validate(row["response"]["body"])
        assert completion.choices[0].message.content
        assert completion.usage is not None
        tokens["input_tokens"] += completion.usage.prompt_tokens
        tokens["output_tokens"] += completion.usage.completion_tokens
    assert done.usage is not None
    assert tokens["output_tokens"] > 0
    assert {name: getattr(done.usage, name) for name in tokens} == tokens
    assert done.usage.total_tokens == tokens.total()
    assert paid(stand, *items) == [1] * 60
    assert checks.seen["Batch"] > 2
    assert checks.seen["FileObject"] == 3


def test_asynchronous(stand: ApiStand, token: str, checks: Checks) -> None:
    async def one(client: openai.AsyncOpenAI, number: int) -> None:
        items = [line(f"a{number}-{n}") for n in range(3)]
        file = await client.files.create(file=("in.jsonl", lines(*items)), purpose="batch")
        assert (await client.files.wait_for_processing(file.id)).status == "processed"
        batch = await client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        async with asyncio.timeout(30):
            while batch.status not in ENDED:
                batch = await client.batches.retrieve(batch.id)
        assert (batch.status, batch.error_file_id) == ("completed", None)
        assert batch.output_file_id is not None
        content = await client.files.content(batch.output_file_id)
        assert {json.loads(text)["custom_id"] for text in content.text.splitlines()} == {
            item["custom_id"] for item in items
        }
        async with client.files.with_streaming_response.content(batch.output_file_id) as streamed:
            assert [text async for text in streamed.iter_lines()] == content.text.splitlines()
        assert (await client.files.delete(file.id)).deleted

    async def main() -> None:
        http = openai.DefaultAsyncHttpxClient(trust_env=False, event_hooks={"response": [checks.soon]})
        async with openai.AsyncOpenAI(
            base_url=f"{stand.apis[0].url}/v1", api_key=token, max_retries=0, http_client=http
        ) as client:
            await asyncio.gather(*(one(client, number) for number in range(4)))
            assert len([batch async for batch in client.batches.list(limit=3)]) == 4
            files = [file async for file in client.files.list(limit=3)]
            assert [file.purpose for file in files] == ["batch_output"] * 4
            with pytest.raises(openai.NotFoundError):
                await client.batches.retrieve("batch_unknown")

    asyncio.run(main())
    assert checks.seen["FileDeleted"] == 4


def test_messages_in_a_batch(client: openai.OpenAI) -> None:
    items = [{**line(f"m{n}"), "url": MESSAGES, "body": ask_message()} for n in range(3)]
    done = ended(client, submit(client, *items, endpoint=MESSAGES))
    assert done.endpoint == MESSAGES
    found = rows(client, done.output_file_id)
    for row in found.values():
        message = Message.model_validate(row["response"]["body"])
        assert message.usage.output_tokens > 0
    assert set(found) == {"m0", "m1", "m2"}


# -- files


def test_a_file_in_every_form_that_the_sdk_takes(client: openai.OpenAI, tmp_path: Path) -> None:
    content = lines(line("a"), line("b"))
    path = tmp_path / "päth.jsonl"
    path.write_bytes(content)
    named = io.BytesIO(content)
    named.name = "named.jsonl"
    with path.open("rb") as opened:
        forms: list[tuple[Any, str]] = [
            (path, "päth.jsonl"),
            (opened, "päth.jsonl"),
            (("x y.jsonl", content), "x y.jsonl"),
            (("typed.jsonl", content, "application/jsonl"), "typed.jsonl"),
            (io.BytesIO(content), "upload"),
            (named, "named.jsonl"),
            (content, "upload"),
        ]
        for form, name in forms:
            file = client.files.create(file=form, purpose="batch")
            assert (file.filename, file.bytes) == (name, len(content))
            assert client.files.content(file.id).content == content
            assert client.files.retrieve(file.id) == file
    assert len(list(client.files.list())) == len(forms)


def test_a_file_that_expires_and_one_that_does_not(client: openai.OpenAI) -> None:
    text = ("notes.txt", b"\x00\r\n\xff anything")
    kept = client.files.create(file=text, purpose="user_data")
    assert (kept.expires_at, kept.purpose) == (None, "user_data")
    assert client.files.content(kept.id).content == text[1]
    for seconds in (3_600, 2_592_000):
        expires: Any = {"anchor": "created_at", "seconds": seconds}
        file = client.files.create(file=text, purpose="user_data", expires_after=expires)
        assert file.expires_at == pytest.approx(file.created_at + seconds, abs=1)
    for bad in (3_599, 2_592_001, -1):
        expires = {"anchor": "created_at", "seconds": bad}
        with pytest.raises(openai.BadRequestError) as refused:
            client.files.create(file=text, purpose="user_data", expires_after=expires)
        assert refused.value.param == "expires_after"


def test_listing_files_page_by_page_and_deleting_on_the_way(client: openai.OpenAI) -> None:
    made = [client.files.create(file=("n.txt", b"%d" % n), purpose="user_data").id for n in range(7)]
    inputs = [upload(client, line()).id for _ in range(2)]
    newest = [*inputs[::-1], *made[::-1]]
    assert [file.id for file in client.files.list(limit=2)] == newest
    assert [file.id for file in client.files.list(limit=2, order="asc")] == newest[::-1]
    assert [file.id for file in client.files.list(limit=1, purpose="batch")] == inputs[::-1]
    page = client.files.list(limit=3, after=newest[1])
    assert ([file.id for file in page.data], page.has_more) == (newest[2:5], True)
    seen = []
    for file in client.files.list(limit=2):
        assert client.files.delete(file.id).model_dump() == {"id": file.id, "object": "file", "deleted": True}
        seen.append(file.id)
    assert seen == newest
    assert list(client.files.list()) == []
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(made[0])
    # What is gone is still a place in the list.
    assert client.files.list(after=made[3]).data == []


def test_the_output_is_a_file_as_any_other(stand: ApiStand, client: openai.OpenAI) -> None:
    items = [line("a"), saying("b", REFUSED)]
    done = ended(client, submit(client, *items))
    assert done.output_file_id is not None
    assert done.error_file_id is not None
    listed = {file.id: file for file in client.files.list(purpose="batch_output")}
    assert set(listed) == {done.output_file_id, done.error_file_id}
    file = client.files.retrieve(done.output_file_id)
    assert listed[file.id] == file
    assert file.expires_at == pytest.approx(file.created_at + 30 * 86_400, abs=3)
    assert client.files.wait_for_processing(file.id).status == "processed"
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.content(file.id)
    assert not stand.redis.exists(f"celery-task-meta-{done.id.removeprefix('batch_')}-0")
    assert set(rows(client, done.error_file_id)) == {"b"}
    assert client.batches.retrieve(done.id).status == "completed"


# -- batches


def test_listing_batches_page_by_page(client: openai.OpenAI) -> None:
    made = [submit(client, line()).id for _ in range(5)]
    assert [batch.id for batch in client.batches.list(limit=2)] == made[::-1]
    assert [batch.id for batch in client.batches.list()] == made[::-1]
    page = client.batches.list(limit=2, after=made[3])
    assert ([batch.id for batch in page.data], page.has_more) == ([made[2], made[1]], True)
    assert page.get_next_page().data[0].id == made[0]
    with pytest.raises(openai.BadRequestError) as refused:
        client.batches.list(after="batch_" + "0" * 24)
    assert refused.value.param == "after"


def test_what_the_upstream_refuses_is_in_the_error_file(client: openai.OpenAI) -> None:
    items = [line("good"), saying("bad", REFUSED), saying("filtered", FILTERED)]
    done = ended(client, submit(client, *items))
    assert done.request_counts is not None
    assert done.request_counts.model_dump() == {"total": 3, "completed": 1, "failed": 2}
    assert set(rows(client, done.output_file_id)) == {"good"}
    errors = rows(client, done.error_file_id)
    assert {name: row["response"]["status_code"] for name, row in errors.items()} == {"bad": 400, "filtered": 421}
    for row in errors.values():
        assert row["error"] is None
        assert {"message", "type"} <= set(row["response"]["body"]["error"])


def test_one_that_only_fails_is_completed_without_an_output(client: openai.OpenAI) -> None:
    done = ended(client, submit(client, *(saying(f"b{n}", REFUSED) for n in range(3))))
    assert done.output_file_id is None
    assert set(rows(client, done.error_file_id)) == {"b0", "b1", "b2"}
    assert done.usage is not None
    assert done.usage.total_tokens == 0


def test_an_input_that_is_not_valid(stand: ApiStand, client: openai.OpenAI, hooks: Hooks) -> None:
    good = line("a")
    bad = [{**line("b"), "url": "/v1/embeddings"}, line("a"), line("c", stream=True), {"custom_id": "d"}]
    batch = submit(client, good, *bad, extra_body={"callback_url": hooks.url})
    failed = ended(client, batch, "failed")
    assert (failed.output_file_id, failed.error_file_id) == (None, None)
    assert failed.request_counts is not None
    assert failed.request_counts.total == 0
    assert failed.errors is not None
    assert failed.errors.object == "list"
    assert failed.errors.data is not None
    assert [(error.line, error.code, error.param) for error in failed.errors.data] == [
        (2, "invalid_url", "url"),
        (3, "duplicate_custom_id", "custom_id"),
        (4, "streaming_unsupported", "body.stream"),
        (5, "missing_required_parameter", "method"),
    ]
    for error in failed.errors.data:
        assert isinstance(error, BatchError)
        assert error.message
        assert PROMPT not in error.message
    assert paid(stand, good) == [0]
    event = unwrapped(stand, client, hooks, batch.id)
    assert isinstance(event, BatchFailedWebhookEvent)


def test_cancelling_at_half_keeps_what_was_answered(stand: ApiStand, client: openai.OpenAI, hooks: Hooks) -> None:
    answered = [line(f"a{n}") for n in range(20)]
    stalled = [saying(f"s{n}", STALLED) for n in range(20)]
    batch = submit(client, *answered, *stalled, extra_body={"callback_url": hooks.url})
    when(client, batch, lambda now: completed(now, 20), "half of the answers")
    cancelling = client.batches.cancel(batch.id)
    assert cancelling.status in ("cancelling", "cancelled")
    assert cancelling.cancelling_at is not None
    again = client.batches.cancel(batch.id)
    assert again.cancelling_at == cancelling.cancelling_at
    done = ended(client, batch, "cancelled")
    assert done.request_counts is not None
    assert done.request_counts.model_dump() == {"total": 40, "completed": 20, "failed": 20}
    output, errors = rows(client, done.output_file_id), rows(client, done.error_file_id)
    assert set(output) == {item["custom_id"] for item in answered}
    assert set(errors) == {item["custom_id"] for item in stalled}
    for row in errors.values():
        assert (row["response"], row["error"]) == (
            None,
            {
                "code": "batch_cancelled",
                "message": "This request was not executed because the batch was cancelled.",
            },
        )
    assert paid(stand, *answered) == [1] * 20
    assert isinstance(unwrapped(stand, client, hooks, batch.id), BatchCancelledWebhookEvent)
    with pytest.raises(openai.BadRequestError):
        retry(client, batch)


def test_a_window_that_ends_keeps_what_was_answered(stand: ApiStand, client: openai.OpenAI, hooks: Hooks) -> None:
    answered = [line(f"a{n}") for n in range(3)]
    stalled = [saying(f"s{n}", STALLED) for n in range(3)]
    batch = submit(client, *answered, *stalled, completion_window="1s", extra_body={"callback_url": hooks.url})
    assert batch.completion_window == "1s"
    assert batch.expires_at == pytest.approx(batch.created_at + 1, abs=1)
    done = ended(client, batch, "expired")
    output, errors = rows(client, done.output_file_id), rows(client, done.error_file_id)
    assert (set(output), set(errors)) == ({"a0", "a1", "a2"}, {"s0", "s1", "s2"})
    assert {json.dumps(row["error"]) for row in errors.values()} == {
        json.dumps(
            {
                "code": "batch_expired",
                "message": "This request could not be executed before the completion window expired.",
            }
        )
    }
    assert isinstance(unwrapped(stand, client, hooks, batch.id), BatchExpiredWebhookEvent)


def test_metadata_and_its_limits(client: openai.OpenAI) -> None:
    most = {f"{n:02}" + "k" * 62: "é" * 512 for n in range(16)}
    batch = submit(client, line(), metadata=most)
    assert batch.metadata == most
    assert client.batches.retrieve(batch.id).metadata == most
    assert submit(client, line(), metadata={}).metadata is None
    file = upload(client, line())
    over: list[Any] = [{**most, "one": "more"}, {"k" * 65: "v"}, {"k": "v" * 513}, {"k": 1}, {"k": None}, "text"]
    for metadata in over:
        with pytest.raises(openai.BadRequestError) as refused:
            client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h", metadata=metadata)
        assert refused.value.param == "metadata", metadata
    assert len(list(client.batches.list())) == 2


@pytest.mark.parametrize(("window", "seconds"), [("1h", 3_600), ("30m", 1_800), ("7d", 604_800), ("90s", 90)])
def test_other_windows(client: openai.OpenAI, window: Any, seconds: int) -> None:
    file = upload(client, line())
    batch = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window=window)
    assert batch.completion_window == window
    assert batch.expires_at == pytest.approx(batch.created_at + seconds, abs=1)
    assert ended(client, batch).expires_at == pytest.approx(batch.created_at + seconds, abs=1)


# -- webhooks


def unwrapped(stand: ApiStand, client: openai.OpenAI, hooks: Hooks, batch: str, place: int = 0) -> Any:
    """An event of a batch as the SDK unwraps it, which checks how it is signed."""
    secret = client.get("/webhook-secret", cast_to=httpx2.Response).json()["secret"]
    headers, body = hooks.wait(batch, place + 1)[place]
    event: Any = client.webhooks.unwrap(body, headers, secret=secret)
    exact(type(event), json.loads(body))
    assert event.data.id == batch
    assert abs(event.created_at - time.time()) < 600
    before = str(int(headers["webhook-timestamp"]) - 1)
    for wrong in ({**headers, "webhook-id": "evt_other"}, {**headers, "webhook-timestamp": before}):
        with pytest.raises(openai.InvalidWebhookSignatureError):
            client.webhooks.unwrap(body, wrong, secret=secret)
    return event


def test_the_end_is_told_when_the_files_are_there(stand: ApiStand, client: openai.OpenAI, hooks: Hooks) -> None:
    batch = submit(client, line(), saying("b", REFUSED), extra_body={"callback_url": hooks.url})
    event = unwrapped(stand, client, hooks, batch.id)
    assert isinstance(event, BatchCompletedWebhookEvent)
    told = client.batches.retrieve(batch.id)
    assert told.status == "completed"
    assert len(rows(client, told.output_file_id)) == len(rows(client, told.error_file_id)) == 1


# -- beyond the original


def act(client: openai.OpenAI, batch: Batch, what: str) -> Batch:
    """What the SDK has no name for."""
    return client.post(f"/batches/{batch.id}/{what}", cast_to=Batch)


def retry(client: openai.OpenAI, batch: Batch) -> Batch:
    """Its failed requests are called again."""
    return act(client, batch, "retry")


def test_only_what_failed_is_called_again(stand: ApiStand, client: openai.OpenAI, hooks: Hooks) -> None:
    good, bad = [line(f"g{n}") for n in range(3)], [saying(f"b{n}", REFUSED) for n in range(2)]
    batch = submit(client, *good, *bad, extra_body={"callback_url": hooks.url})
    first = ended(client, batch)
    assert first.output_file_id is not None
    before = rows(client, first.output_file_id)
    unwrapped(stand, client, hooks, batch.id)
    stand.simulator.configure(triggers={}, hold=True)
    try:
        again = retry(client, batch)
        assert (again.id, again.status, again.completed_at) == (batch.id, "in_progress", None)
        assert again.request_counts is not None
        assert again.request_counts.model_dump() == {"total": 5, "completed": 3, "failed": 0}
        assert (again.output_file_id, again.error_file_id) == (first.output_file_id, None)
    finally:
        stand.simulator.configure(hold=False)
    done = ended(client, batch)
    stand.simulator.configure(triggers=TRIGGERS)
    assert (done.error_file_id, done.output_file_id) == (None, first.output_file_id)
    found = rows(client, done.output_file_id)
    assert set(found) == {"g0", "g1", "g2", "b0", "b1"}
    assert {name: found[name] for name in before} == before
    assert paid(stand, *good, *bad) == [1] * 5
    events = [unwrapped(stand, client, hooks, batch.id, place) for place in range(2)]
    assert [type(event) for event in events] == [BatchCompletedWebhookEvent] * 2
    assert events[0].id != events[1].id
    # There is nothing more to call.
    assert retry(client, batch).status == "completed"


def test_paused_and_resumed(held: ApiStand, client: openai.OpenAI) -> None:
    batch = submit(client, *(line() for _ in range(3)))
    paused = act(client, batch, "pause")
    assert paused.status in ("validating", "in_progress")
    resumed = act(client, batch, "resume")
    assert resumed.status in ("validating", "in_progress")
    held.simulator.configure(hold=False)
    done = ended(client, batch)
    for what in ("pause", "resume"):
        with pytest.raises(openai.BadRequestError) as refused:
            act(client, batch, what)
        assert "completed" in refused.value.message
    with pytest.raises(openai.BadRequestError):
        client.batches.cancel(done.id)


def test_results_while_it_runs(client: openai.OpenAI) -> None:
    answered = [line(f"a{n}") for n in range(4)]
    batch = submit(client, *answered, *(saying(f"s{n}", STALLED) for n in range(2)))
    running = when(client, batch, lambda now: completed(now, 4), "answers")
    assert running.status == "in_progress"
    assert running.output_file_id is not None
    assert running.error_file_id is None
    part = client.files.content(running.output_file_id)
    assert (part.response.headers["x-incomplete"], part.response.headers["x-last-line"]) == ("true", "4")
    texts = part.text.splitlines()
    assert {json.loads(text)["custom_id"] for text in texts} == {"a0", "a1", "a2", "a3"}
    rest = client.files.content(running.output_file_id, extra_query={"offset": 2})
    assert rest.text.splitlines() == texts[2:]
    none = client.files.content(running.output_file_id, extra_query={"offset": 4})
    assert (none.content, none.response.headers["x-last-line"]) == (b"", "4")
    some = client.files.content(running.output_file_id, extra_query={"offset": 1, "limit": 2})
    assert (some.text.splitlines(), some.response.headers["x-last-line"]) == (texts[1:3], "3")
    growing = client.files.retrieve(running.output_file_id)
    assert (growing.bytes, growing.status) == (len(part.content), "processed")
    with pytest.raises(openai.BadRequestError):
        client.files.delete(running.output_file_id)
    client.batches.cancel(batch.id)
    done = ended(client, batch, "cancelled")
    assert done.output_file_id == running.output_file_id
    whole = client.files.content(running.output_file_id)
    assert (whole.content, whole.response.headers["x-incomplete"]) == (part.content, "false")


def test_requests_inline(stand: ApiStand, client: openai.OpenAI) -> None:
    items = [{"custom_id": f"i{n}", "body": line()["body"]} for n in range(3)]
    nameless = {"custom_id": "i3", "body": {"messages": line()["body"]["messages"]}}
    inline: dict[str, Any] = {"endpoint": CHAT, "model": "m", "requests": [*items, nameless]}
    batch = client.post("/batches", body=inline, cast_to=Batch)
    assert (batch.completion_window, batch.status) == ("24h", "validating")
    done = ended(client, batch)
    assert done.model == "m"
    assert set(rows(client, done.output_file_id)) == {"i0", "i1", "i2", "i3"}
    # By the SDK's own call, which always names a file.
    unused: Any = None
    same = client.batches.create(
        input_file_id=unused, endpoint=CHAT, completion_window="24h", extra_body={"requests": items}
    )
    assert set(rows(client, ended(client, same).output_file_id)) == {"i0", "i1", "i2"}
    # What came inline is an input file, too.
    written = client.files.content(done.input_file_id).text.splitlines()
    assert [json.loads(text)["custom_id"] for text in written] == ["i0", "i1", "i2", "i3"]
    assert client.files.retrieve(done.input_file_id).purpose == "batch"


def test_a_key_makes_one_batch(stand: ApiStand, client: openai.OpenAI) -> None:
    item = line()
    file = upload(client, item)

    def create(**more: Any) -> Batch:
        told: dict[str, Any] = {"endpoint": CHAT, "completion_window": "24h", "input_file_id": file.id, **more}
        return client.batches.create(**told, extra_headers={"Idempotency-Key": "k"})

    first = create()
    assert create().id == first.id
    done = ended(client, first)
    assert create().model_dump() == done.model_dump()
    for other in ({"metadata": {"a": "b"}}, {"completion_window": "1h"}, {"input_file_id": upload(client, item).id}):
        with pytest.raises(openai.ConflictError) as refused:
            create(**other)
        assert refused.value.response.headers["x-should-retry"] == "false"
    assert len(list(client.batches.list())) == 1
    assert paid(stand, item) == [1]


# -- what can't be


def test_errors_are_the_classes_that_the_sdk_knows(stand: ApiStand, client: openai.OpenAI, checks: Checks) -> None:
    file = upload(client, line())
    text = client.files.create(file=("n.txt", b"x"), purpose="user_data")
    good: dict[str, Any] = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"}
    for change, param in (
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"input_file_id": text.id}, "input_file_id"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 3_599}}, "output_expires_after"),
        ({"extra_body": {"colour": "red"}}, "colour"),
        ({"extra_body": {"callback_url": "ftp://127.0.0.1/"}}, "callback_url"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            client.batches.create(**{**good, **change})
        assert refused.value.param == param, change
        assert refused.value.type == "invalid_request_error"
    with pytest.raises(openai.APIStatusError) as unknown:
        client.batches.create(**{**good, "input_file_id": "file-" + "0" * 24})
    assert (unknown.value.status_code in (400, 404), getattr(unknown.value, "param", "")) == (True, "input_file_id")
    for call in (client.batches.retrieve, client.batches.cancel):
        for name in ("batch_" + "0" * 24, "batch_x", "x"):
            with pytest.raises(openai.NotFoundError):
                call(name)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="mq_wrong").files.list()
    reads = client.with_options(api_key=stand.token(["read"]))
    with pytest.raises(openai.PermissionDeniedError):
        reads.batches.create(**good)
    with pytest.raises(openai.PermissionDeniedError):
        reads.files.create(file=b"x", purpose="batch")
    assert list(reads.batches.list()) == []
    assert checks.seen["error"] > 10


def test_another_tenant_sees_nothing(stand: ApiStand, client: openai.OpenAI) -> None:
    done = ended(client, submit(client, line()))
    assert done.output_file_id is not None
    other = client.with_options(api_key=stand.token())
    assert list(other.files.list()) == []
    assert list(other.batches.list()) == []
    for call, name in (
        (other.batches.retrieve, done.id),
        (other.batches.cancel, done.id),
        (other.files.retrieve, done.input_file_id),
        (other.files.content, done.input_file_id),
        (other.files.delete, done.input_file_id),
        (other.files.content, done.output_file_id),
        (other.files.delete, done.output_file_id),
    ):
        with pytest.raises(openai.NotFoundError):
            call(name)
    with pytest.raises(openai.APIStatusError):
        other.batches.create(input_file_id=done.input_file_id, endpoint=CHAT, completion_window="24h")
    assert client.files.content(done.input_file_id).content


# -- scripts as the providers' guides have them


def script(stand: ApiStand, name: str, **environment: str) -> list[list[str]]:
    """What an example prints, as words."""
    ran = subprocess.run(
        [sys.executable, ROOT / "examples" / name],
        env=os.environ | {"PYTHONIOENCODING": "utf-8", **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return [text.split() for text in ran.stdout.splitlines()]


def test_the_script_of_openais_guide(stand: ApiStand, token: str) -> None:
    url = stand.apis[0].url
    found = script(stand, "openai_batch.py", OPENAI_BASE_URL=f"{url}/v1", OPENAI_API_KEY=token)
    results = sorted(words for words in found if words[0] == "result")
    assert [words[1:3] for words in results] == [[f"request-{n}", "200"] for n in (1, 2, 3)]
    assert all(len(words) > 3 for words in results)
    metadata = ["{'description':", "'nightly", "eval", "job'}"]
    assert [words for words in found if words[0] != "result"] == [
        ["file", "batchinput.jsonl", "batch", "processed"],
        ["batch", "batch", CHAT, "24h", "validating", *metadata],
        ["status", "completed"],
        ["counts", "3", "3", "0"],
        ["known", "True", "completed"],
    ]


def test_the_script_of_anthropics_guide(stand: ApiStand, token: str) -> None:
    url = stand.apis[0].url
    found = script(stand, "anthropic_batch.py", ANTHROPIC_BASE_URL=url, ANTHROPIC_API_KEY=token)
    results = sorted(words for words in found if words[0] == "success")
    assert [words[1] for words in results] == ["my-first-request", "my-second-request"]
    assert all(words[2] in ("end_turn", "max_tokens") and len(words) > 3 for words in results)
    assert [words for words in found if words[0] != "success"] == [
        ["batch", "message_batch", "in_progress", "2"],
        ["results", "url", "None"],
        ["status", "ended"],
        ["counts", "2", "0", "0", "0", "0"],
        ["known", "True", "ended"],
    ]
