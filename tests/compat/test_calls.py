"""Waiting calls by the official SDKs: an API process, a real worker, and the simulator whose ledger counts what was paid."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anthropic
import httpx
import openai
import pytest

from jobs import joins, keys, tokens
from ops.simulator import digest
from tests.compat.conftest import Make
from tests.integration.api_stand import Api, ApiStand, api_stand, ask, ask_message
from tests.waiting import wait_for

CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
#: Seconds that the impatient process lets a call wait.
SOON_S = 0.5
#: What both SDKs would do by themselves.
RETRIES = 2
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}

OpenAI = Make[openai.OpenAI]
Anthropic = Make[anthropic.Anthropic]


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiStand]:
    triggers = {"meet a 400": "400", "meet a 421": "421", "meet a 503": "503", "meet a page": "not_json"}
    with api_stand(tmp_path_factory.mktemp("api"), triggers=triggers) as stand:
        stand.api()
        stand.api(sync_timeout_s=str(SOON_S))
        stand.work("interactive", max_attempts="2")
        yield stand
        stand.simulator.configure(hold=False)
        stand.kept_secrets()


@pytest.fixture
def held(stand: ApiStand) -> Iterator[ApiStand]:
    """Its upstream answers nobody until told."""
    stand.simulator.configure(hold=True)
    yield stand
    stand.simulator.configure(hold=False)


@pytest.fixture
def url(stand: ApiStand) -> str:
    return stand.apis[0].url


@pytest.fixture
def token(stand: ApiStand) -> str:
    return stand.token()


def saying(prompt: str, **more: Any) -> dict[str, Any]:
    """A body with this prompt."""
    return ask(messages=[{"role": "user", "content": prompt}], **more)


def calls(stand: ApiStand, body: dict[str, Any]) -> int:
    """How often the upstream was asked for this."""
    return sum(call["digest"] == digest(body) for call in stand.simulator.ledger()["calls"])


def paid(stand: ApiStand, body: dict[str, Any]) -> int:
    """And how often it was paid."""
    count: int = stand.simulator.ledger()["paid"].get(digest(body), 0)
    return count


# -- answers


def test_openai_as_it_is(stand: ApiStand, url: str, token: str, openai_client: OpenAI) -> None:
    body = ask()
    completion = openai_client(url, token).chat.completions.create(**body)
    assert completion.choices[0].finish_reason == "stop"
    assert completion.choices[0].message.content
    assert completion.usage is not None
    assert completion.usage.total_tokens > 0
    assert (calls(stand, body), paid(stand, body)) == (1, 1)


def test_anthropic_as_it_is(stand: ApiStand, url: str, token: str, anthropic_client: Anthropic) -> None:
    body = ask_message(thinking={"type": "disabled"})
    message = anthropic_client(url, token).messages.create(**body)
    assert message.stop_reason in ("end_turn", "max_tokens")
    assert [block.type for block in message.content][-1] == "text"
    assert message.usage.output_tokens > 0
    assert paid(stand, body) == 1


def test_both_asynchronous(
    url: str,
    token: str,
    async_openai_client: Make[openai.AsyncOpenAI],
    async_anthropic_client: Make[anthropic.AsyncAnthropic],
) -> None:
    async def main() -> None:
        async with async_openai_client(url, token) as one, async_anthropic_client(url, token) as two:
            answers: list[Any] = await asyncio.gather(
                *(one.chat.completions.create(**ask()) for _ in range(10)),
                *(two.messages.create(**ask_message()) for _ in range(10)),
            )
            assert all(answer.choices[0].message.content for answer in answers[:10])
            assert all(answer.content for answer in answers[10:])
            async with one.chat.completions.stream(**ask()) as stream:
                assert (await stream.get_final_completion()).choices[0].message.content
            async with two.messages.stream(**ask_message()) as events:
                assert (await events.get_final_message()).content

    asyncio.run(main())


def test_openai_streamed_is_what_it_is_whole(url: str, token: str, openai_client: OpenAI) -> None:
    client = openai_client(url, token)
    body = ask()
    whole = client.chat.completions.create(**body)
    chunks = list(client.chat.completions.create(**body, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert len(chunks) > 3
    assert text
    assert all(chunk.usage is None for chunk in chunks)
    with_usage = list(client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}))
    assert with_usage[-1].choices == []
    assert with_usage[-1].usage is not None
    assert whole.usage is not None
    with client.chat.completions.stream(**body) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content
    assert final.choices[0].finish_reason == whole.choices[0].finish_reason


def test_anthropic_streamed(url: str, token: str, anthropic_client: Anthropic) -> None:
    client = anthropic_client(url, token)
    events = list(client.messages.create(**ask_message(), stream=True))
    assert (events[0].type, events[-1].type) == ("message_start", "message_stop")
    with client.messages.stream(**ask_message()) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text
    assert text == "".join(block.text for block in final.content if block.type == "text")
    assert final.usage.output_tokens > 0


def test_tools(url: str, token: str, openai_client: OpenAI, anthropic_client: Anthropic) -> None:
    chat = openai_client(url, token)
    tools: Any = [{"type": "function", "function": {"name": "weather", "parameters": WEATHER}}]
    asked: Any = ask(tools=tools, tool_choice="required")
    call = chat.chat.completions.create(**asked).choices[0].message.tool_calls
    assert call is not None
    assert call[0].type == "function"
    with chat.chat.completions.stream(**asked) as stream:
        streamed = stream.get_final_completion().choices[0].message.tool_calls
    assert streamed is not None
    assert (streamed[0].function.name, call[0].function.name) == ("weather", "weather")
    messages = anthropic_client(url, token)
    tool: Any = [{"name": "weather", "input_schema": WEATHER}]
    told: Any = ask_message(tools=tool, tool_choice={"type": "any"})
    used = messages.messages.create(**told)
    assert used.stop_reason == "tool_use"
    with messages.messages.stream(**told) as events:
        final = events.get_final_message()
    assert [block.name for block in final.content if block.type == "tool_use"] == ["weather"]


def test_the_answer_is_byte_for_byte_what_the_job_holds(stand: ApiStand, token: str) -> None:
    http = stand.http(token)
    for path, body in ((CHAT, ask()), (MESSAGES, ask_message())):
        answer = http.post(path, json=body)
        assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
        job = http.get(f"/v1/jobs/{answer.headers['x-mimoq-job-id']}")
        assert b'"response":' + answer.content + b"," in job.content
        assert job.json()["lane"] == "interactive"


# -- errors


def test_what_our_check_refuses(stand: ApiStand, url: str, token: str, openai_client: OpenAI) -> None:
    client = openai_client(url, token, RETRIES)
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**ask(temperature=99))
    assert "temperature" in refused.value.message
    body: Any = refused.value.body
    assert body["type"] == "invalid_request_error"
    assert stand.simulator.ledger(whole=False)["totals"]["by_status"].get("422") is None


def test_what_our_check_refuses_of_a_message(url: str, token: str, anthropic_client: Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        anthropic_client(url, token, RETRIES).messages.create(**ask_message(max_tokens=0))


@pytest.mark.parametrize("stream", [False, True])
def test_an_upstream_refusal_is_passed_through(
    stand: ApiStand, url: str, token: str, openai_client: OpenAI, anthropic_client: Anthropic, stream: bool
) -> None:
    chat: Any = saying("meet a 400", stream=stream)
    with pytest.raises(openai.BadRequestError) as refused:
        openai_client(url, token, RETRIES).chat.completions.create(**chat)
    assert refused.value.body == {**refused.value.body, "message": "Param Incorrect"}  # type: ignore[dict-item]
    assert refused.value.response.headers["x-mimoq-job-id"]
    message: Any = saying("meet a 400", stream=stream, max_tokens=9)
    with pytest.raises(anthropic.BadRequestError, match="Param Incorrect"):
        anthropic_client(url, token, RETRIES).messages.create(**message)
    with pytest.raises(openai.APIStatusError) as filtered:
        openai_client(url, token, RETRIES).chat.completions.create(**saying("meet a 421", stream=stream))
    assert filtered.value.status_code == 421


def test_what_mimoq_has_given_up_no_sdk_tries_again(
    stand: ApiStand, url: str, token: str, openai_client: OpenAI, anthropic_client: Anthropic
) -> None:
    chat, message = saying("meet a 503"), saying("meet a 503", max_tokens=9)
    with pytest.raises(openai.InternalServerError) as failed:
        openai_client(url, token, RETRIES).chat.completions.create(**chat)
    assert (failed.value.status_code, failed.value.response.headers["x-should-retry"]) == (503, "false")
    with pytest.raises(anthropic.APIStatusError) as given_up:
        anthropic_client(url, token, RETRIES).messages.create(**message)
    assert given_up.value.status_code == 503
    # Two attempts of ours each, none of the SDK's.
    assert (calls(stand, chat), calls(stand, message)) == (2, 2)


def test_an_answer_that_is_none_is_a_bad_gateway(url: str, token: str, openai_client: OpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as failed:
        openai_client(url, token, RETRIES).chat.completions.create(**saying("meet a page"))
    assert failed.value.status_code == 502
    body: Any = failed.value.body
    assert body["job_id"] == failed.value.response.headers["x-mimoq-job-id"]


def test_a_wrong_token_is_an_authentication_error(url: str, openai_client: OpenAI, anthropic_client: Anthropic) -> None:
    with pytest.raises(openai.AuthenticationError):
        openai_client(url, "mq_wrong").chat.completions.create(**ask())
    with pytest.raises(anthropic.AuthenticationError):
        anthropic_client(url, "mq_wrong").messages.create(**ask_message())


# -- a call that takes too long


def impatient(stand: ApiStand) -> Api:
    """The process that lets nobody wait for long."""
    return stand.apis[1]


def test_too_long_for_openai(held: ApiStand, token: str, openai_client: OpenAI) -> None:
    body = ask()
    with pytest.raises(openai.APIStatusError) as late:
        openai_client(impatient(held).url, token, RETRIES).chat.completions.create(**body)
    response, told = late.value.response, late.value.body
    assert isinstance(told, dict)
    assert (response.status_code, response.headers["x-should-retry"], told["code"]) == (504, "false", "timeout")
    job = response.headers["x-mimoq-job-id"]
    assert told["job_id"] == job
    assert f"/v1/jobs/{job}" in told["message"]
    finishes(held, token, job)
    assert (calls(held, body), paid(held, body)) == (1, 1)


def test_too_long_for_anthropic(held: ApiStand, token: str, anthropic_client: Anthropic) -> None:
    body = ask_message()
    with pytest.raises(anthropic.APIStatusError) as late:
        anthropic_client(impatient(held).url, token, RETRIES).messages.create(**body)
    told: Any = late.value.body
    assert (late.value.status_code, told["error"]["type"]) == (504, "timeout_error")
    finishes(held, token, told["error"]["job_id"])
    assert (calls(held, body), paid(held, body)) == (1, 1)


def test_too_long_for_a_stream(held: ApiStand, token: str, openai_client: OpenAI, anthropic_client: Anthropic) -> None:
    # Its time is over before it has begun, so the status can still say so.
    with pytest.raises(openai.APIStatusError) as late:
        list(openai_client(impatient(held).url, token, RETRIES).chat.completions.create(**ask(stream=True)))
    assert late.value.status_code == 504
    with pytest.raises(anthropic.APIStatusError) as other:
        list(anthropic_client(impatient(held).url, token, RETRIES).messages.create(**ask_message(stream=True)))
    assert other.value.status_code == 504


def finishes(stand: ApiStand, token: str, job: str) -> None:
    """The job of a call that nobody waited for any longer goes on to its end."""
    http = stand.http(token)
    assert http.get(f"/v1/jobs/{job}").json()["state"] in ("queued", "running")
    stand.simulator.configure(hold=False)
    ended = http.get(f"/v1/jobs/{job}", params={"wait": 60}).json()
    assert ended["state"] == "succeeded"
    assert ended["response"]


# -- calls that are made again


def waited_for(stand: ApiStand, token: str, path: str, body: dict[str, Any]) -> dict[str, float]:
    """The jobs that such calls have made, and when somebody came to wait for each last: 0 where nobody does."""
    parts = tokens.split(token)
    assert parts is not None
    name = keys.joins(joins.digest_of(parts[0], path, json.dumps(body).encode()))
    found: Any = stand.redis.zrange(name, 0, -1, withscores=True)
    return {batch.decode(): at for batch, at in found}


def post(http: httpx.Client, path: str, body: dict[str, Any], retry: int = 0) -> httpx.Response:
    """A call as an SDK makes it, the first time or again."""
    return http.post(path, content=json.dumps(body), headers={"x-stainless-retry-count": str(retry)})


def gives_up(held: ApiStand, url: str, token: str, path: str, body: dict[str, Any]) -> None:
    """A client that leaves once the upstream is being asked."""
    before = held.simulator.totals()["arrived"]
    count = len(waited_for(held, token, path, body))
    content = json.dumps(body).encode()
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nX-Api-Key: {token}\r\nContent-Length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content)
        held.simulator.wait_until(lambda totals: totals.arrived > before)
    wait_for(
        lambda: list(waited_for(held, token, path, body).values()) == [0.0] * (count + 1), what="a client that has left"
    )


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
def test_a_retry_joins_the_job_that_runs(held: ApiStand, url: str, token: str, path: str) -> None:
    body = ask() if path == CHAT else ask_message()
    http = held.http(token)
    seen: dict[str, float] = {}

    def comes() -> dict[str, float]:
        found = waited_for(held, token, path, body)
        return found if found != seen else {}

    with ThreadPoolExecutor() as pool:
        waiting = []
        for retry in range(3):
            waiting.append(pool.submit(post, http, path, body, retry))
            seen = wait_for(comes, what="one more who waits")
        held.simulator.configure(hold=False)
        answers = [future.result() for future in waiting]
    assert [answer.status_code for answer in answers] == [200] * 3
    assert len({answer.headers["x-mimoq-job-id"] for answer in answers}) == 1
    assert (calls(held, body), paid(held, body)) == (1, 1)


def test_a_retry_finds_the_job_that_has_ended_meanwhile(held: ApiStand, url: str, token: str) -> None:
    body = ask()
    gives_up(held, url, token, CHAT, body)
    held.simulator.configure(hold=False)
    http = held.http(token)
    (job,) = http.get("/v1/jobs").json()["data"]
    assert http.get(f"/v1/jobs/{job['id']}", params={"wait": 60}).json()["state"] == "succeeded"
    again = post(http, CHAT, body, 1)
    assert (again.status_code, again.headers["x-mimoq-job-id"]) == (200, job["id"])
    assert (calls(held, body), paid(held, body)) == (1, 1)
    # It has been answered now: the next call of the same body is another.
    anew = post(http, CHAT, body, 1)
    assert anew.headers["x-mimoq-job-id"] != job["id"]


def test_an_sdk_whose_own_time_is_over_pays_once(held: ApiStand, url: str, token: str, openai_client: OpenAI) -> None:
    body = ask()
    client = openai_client(url, token, RETRIES).with_options(timeout=1.0)
    sent: list[str] = []
    client._client.event_hooks["request"].append(
        lambda request: sent.append(request.headers["x-stainless-retry-count"])
    )
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(lambda: client.chat.completions.create(**body))
        wait_for(lambda: sent == ["0", "1"], what="its retry")
        held.simulator.configure(hold=False)
        assert answer.result().choices[0].message.content
    assert (calls(held, body), paid(held, body)) == (1, 1)
    assert len(held.http(token).get("/v1/jobs").json()["data"]) == 1


def test_two_calls_that_are_meant_are_two_jobs(held: ApiStand, url: str, token: str, openai_client: OpenAI) -> None:
    body = ask()
    client = openai_client(url, token)
    before = held.simulator.totals()["arrived"]
    with ThreadPoolExecutor() as pool:
        answers = [pool.submit(lambda: client.chat.completions.create(**body)) for _ in range(2)]
        held.simulator.wait_until(lambda totals: totals.arrived == before + 2)
        held.simulator.configure(hold=False)
        assert all(answer.result().choices for answer in answers)
    assert paid(held, body) == 2


def test_two_calls_that_are_both_made_again_keep_a_job_each(held: ApiStand, url: str, token: str) -> None:
    body = ask()
    for _ in range(2):
        gives_up(held, url, token, CHAT, body)
    http = held.http(token)
    with ThreadPoolExecutor() as pool:
        again = [pool.submit(post, http, CHAT, body, 1) for _ in range(2)]
        wait_for(lambda: all(waited_for(held, token, CHAT, body).values()), what="two who wait")
        held.simulator.configure(hold=False)
        jobs = {answer.result().headers["x-mimoq-job-id"] for answer in again}
    assert len(jobs) == 2
    assert paid(held, body) == 2


def test_an_idempotency_key_waits_for_one_job(stand: ApiStand, token: str) -> None:
    http = stand.http(token)
    body = ask()
    first, again = (http.post(CHAT, json=body, headers={"Idempotency-Key": "k"}) for _ in range(2))
    assert first.content == again.content
    assert first.headers["x-mimoq-job-id"] == again.headers["x-mimoq-job-id"]
    other = http.post(CHAT, json=ask(), headers={"Idempotency-Key": "k"})
    assert (other.status_code, other.json()["error"]["code"]) == (409, "conflict")
    assert paid(stand, body) == 1


# -- streams


def test_comments_keep_a_stream_alive_until_the_answer_is_there(held: ApiStand, token: str) -> None:
    http = held.http(token)
    with http.stream("POST", CHAT, json=ask(stream=True)) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-mimoq-job-id"]
        came = response.iter_lines()
        assert next(came) == ": keep-alive"
        held.simulator.configure(hold=False)
        rest = [line for line in came if line]
    assert rest[-1] == "data: [DONE]"
    assert all(line.startswith(("data: ", ":")) for line in rest)


def test_the_sdks_read_past_the_comments(
    held: ApiStand, url: str, token: str, openai_client: OpenAI, anthropic_client: Anthropic
) -> None:
    chat, messages = openai_client(url, token), anthropic_client(url, token)
    # They return once there is a status, which comes with the first comment.
    one = chat.chat.completions.create(**ask(stream=True))
    two = messages.messages.create(**ask_message(stream=True))
    held.simulator.configure(hold=False)
    assert len(list(one)) > 3
    assert [event.type for event in two][-1] == "message_stop"


def test_an_error_in_a_stream_that_has_begun(
    held: ApiStand, url: str, token: str, openai_client: OpenAI, anthropic_client: Anthropic
) -> None:
    http = held.http(token)
    chat = openai_client(url, token, RETRIES).chat.completions.create(**ask(stream=True))
    message = anthropic_client(url, token, RETRIES).messages.create(**ask_message(stream=True))
    for job in http.get("/v1/jobs").json()["data"]:
        http.post(f"/v1/jobs/{job['id']}/cancel")
    with pytest.raises(openai.APIError, match="cancelled"):
        list(chat)
    with pytest.raises(anthropic.APIError, match="cancelled"):
        list(message)
    assert len(http.get("/v1/jobs").json()["data"]) == 2


def test_a_cancelled_job_is_told_to_who_waits(held: ApiStand, token: str) -> None:
    http = held.http(token)
    before = held.simulator.totals()["arrived"]
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(http.post, CHAT, json=ask())
        held.simulator.wait_until(lambda totals: totals.arrived > before)
        (job,) = http.get("/v1/jobs").json()["data"]
        http.post(f"/v1/jobs/{job['id']}/cancel")
        told = waiting.result()
    assert (told.status_code, told.headers["x-should-retry"]) == (409, "false")
    assert told.json()["error"]["code"] == "cancelled"
