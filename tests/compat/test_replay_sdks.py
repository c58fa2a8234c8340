"""Streams made from finished responses, read by the official SDKs, as they come and by their accumulating helpers."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import openai
import pytest
from aiohttp import web

from api.replay import KEEP_ALIVE, chat_error_event, chat_events, messages_error_event, messages_events
from tests.compat.conftest import Make

TEXT = "Zwölf Grüße, 世界 🎉\n\u2028\x85data: [DONE]\n\nevent: x\r\n" * 60
ASK: Any = {"model": "m", "messages": [{"role": "user", "content": "?"}]}
ASK_MESSAGES: Any = {**ASK, "max_tokens": 9}
USAGE = {"prompt_tokens": 7, "completion_tokens": 9, "total_tokens": 16}

CHAT: dict[str, Any] = {
    "id": "c1",
    "object": "chat.completion",
    "created": 1700000000,
    "model": "m",
    "system_fingerprint": "fp",
    "vendor": {"region": "eu"},
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "reasoning_content": TEXT[::-1], "content": TEXT, "mood": "happy"},
            "logprobs": {"content": [{"token": "a", "logprob": -1.5, "top_logprobs": []}]},
            "finish_reason": "stop",
            "matched": 5,
        },
        {
            "index": 1,
            "message": {
                "role": "assistant",
                "content": None,
                "refusal": "No.",
                "tool_calls": [
                    {"id": "a", "type": "function", "function": {"name": "f", "arguments": json.dumps({"q": TEXT})}},
                    {"id": "b", "type": "function", "function": {"name": "g", "arguments": "{}"}},
                ],
            },
            "logprobs": {"content": [{"token": "b", "logprob": -2.5, "top_logprobs": []}]},
            "finish_reason": "tool_calls",
        },
    ],
    "usage": USAGE,
}

MESSAGE: dict[str, Any] = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "m",
    "vendor": {"region": "eu"},
    "content": [
        {"type": "thinking", "thinking": TEXT[::-1], "signature": "c2ln" * 200},
        {"type": "redacted_thinking", "data": "opaque" * 100},
        {
            "type": "text",
            "text": TEXT,
            "citations": [
                {
                    "type": "char_location",
                    "cited_text": "a",
                    "document_index": 0,
                    "document_title": "t",
                    "start_char_index": 0,
                    "end_char_index": 1,
                }
            ],
        },
        {"type": "tool_use", "id": "t", "name": "f", "input": {"q": [TEXT, None, {"n": 1.5}]}},
        {"type": "tool_use", "id": "u", "name": "g", "input": {}},
        {"type": "tool_use", "id": "v", "name": "g", "input": '{"cut by the token lim'},
        {"type": "server_tool_use", "id": "w", "name": "web_search", "input": {"query": "x"}},
        {"type": "hologram", "text": "whole"},
    ],
    "stop_reason": "stop_sequence",
    "stop_sequence": "\n",
    "usage": {"input_tokens": 5, "output_tokens": 9, "cache_read_input_tokens": 2, "service_tier": "standard"},
}


class Replayer:
    """A server on this machine that answers whatever is asked with `stream`, keep-alives before and between."""

    def __init__(self) -> None:
        self.url = ""
        self.stream: list[bytes] = []

    async def answer(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(KEEP_ALIVE)
        for event in self.stream:
            await response.write(KEEP_ALIVE + event)
        await response.write_eof()
        return response


@pytest.fixture(scope="module")
def replayer() -> Iterator[Replayer]:
    server = Replayer()
    loop = asyncio.new_event_loop()
    ready = threading.Event()
    ended = asyncio.Event()

    async def live() -> None:
        app = web.Application()
        app.router.add_post("/{path:.*}", server.answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()
        await ended.wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: loop.run_until_complete(live()), daemon=True)
    thread.start()
    assert ready.wait(10)
    yield server
    loop.call_soon_threadsafe(ended.set)
    thread.join()
    loop.close()


def replay_chat(replayer: Replayer, body: object = CHAT, include_usage: bool = True) -> None:
    replayer.stream = list(chat_events(json.dumps(body).encode(), include_usage))


def replay_message(replayer: Replayer, body: object = MESSAGE) -> None:
    replayer.stream = list(messages_events(json.dumps(body).encode()))


def as_told(value: Any) -> Any:
    """Without what the SDKs' parsing helpers add."""
    if isinstance(value, dict):
        return {name: as_told(item) for name, item in value.items() if not name.startswith("parsed")}
    return [as_told(item) for item in value] if isinstance(value, list) else value


def assert_chat(completion: openai.BaseModel) -> None:
    told = as_told(completion.to_dict(exclude_unset=False, warnings=False))
    for choice in told["choices"]:
        for at, call in enumerate(choice["message"]["tool_calls"] or ()):
            assert call.pop("index") == at  # the helper leaves it in
    assert_covers(told, CHAT)


def assert_covers(told: Any, stored: Any, at: str = "") -> None:
    """All that is stored is told, and beside it nothing but nulls."""
    if isinstance(told, dict) and isinstance(stored, dict):
        for name in told.keys() | stored.keys():
            assert name in told, f"{at}.{name}"
            assert_covers(told[name], stored.get(name), f"{at}.{name}")
    elif isinstance(told, list) and isinstance(stored, list):
        assert len(told) == len(stored), at
        for index, (one, other) in enumerate(zip(told, stored, strict=True)):
            assert_covers(one, other, f"{at}[{index}]")
    else:
        assert told == stored, at


def test_the_openai_helper_has_the_response(replayer: Replayer, openai_client: Make[openai.OpenAI]) -> None:
    replay_chat(replayer)
    with openai_client(replayer.url).chat.completions.stream(**ASK) as stream:
        kinds = [event.type for event in stream]
        assert_chat(stream.get_final_completion())
    for kind in ("content.done", "refusal.done", "logprobs.content.done", "tool_calls.function.arguments.done"):
        assert kind in kinds


def test_the_asynchronous_openai_helper_has_the_response(
    replayer: Replayer, async_openai_client: Make[openai.AsyncOpenAI]
) -> None:
    replay_chat(replayer)

    async def main() -> None:
        async with (
            async_openai_client(replayer.url) as client,
            client.chat.completions.stream(**ASK) as stream,
        ):
            assert_chat(await stream.get_final_completion())

    asyncio.run(main())


@pytest.mark.parametrize("include_usage", [True, False])
def test_openai_chunks(replayer: Replayer, openai_client: Make[openai.OpenAI], include_usage: bool) -> None:
    replay_chat(replayer, include_usage=include_usage)
    stream: openai.Stream[Any] = openai_client(replayer.url).chat.completions.create(**ASK, stream=True)
    assert_chunks(list(stream), include_usage)


@pytest.mark.parametrize("include_usage", [True, False])
def test_openai_chunks_asynchronously(
    replayer: Replayer, async_openai_client: Make[openai.AsyncOpenAI], include_usage: bool
) -> None:
    replay_chat(replayer, include_usage=include_usage)

    async def main() -> list[Any]:
        async with async_openai_client(replayer.url) as client:
            stream: openai.AsyncStream[Any] = await client.chat.completions.create(**ASK, stream=True)
            return [chunk async for chunk in stream]

    assert_chunks(asyncio.run(main()), include_usage)


def assert_chunks(chunks: list[Any], include_usage: bool) -> None:
    assert {(chunk.id, chunk.object, chunk.created, chunk.model) for chunk in chunks} == {
        ("c1", "chat.completion.chunk", 1700000000, "m")
    }
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices if choice.index == 0]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == TEXT
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == TEXT[::-1]
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices]
    assert [reason for reason in reasons if reason is not None] == ["stop", "tool_calls"]
    if include_usage:
        assert chunks[-1].choices == []
        assert chunks[-1].usage.to_dict() == USAGE
        assert all(chunk.usage is None and "usage" in chunk.model_fields_set for chunk in chunks[:-1])
    else:
        assert all("usage" not in chunk.model_fields_set for chunk in chunks)


def assert_message(message: anthropic.BaseModel) -> None:
    assert_covers(as_told(message.to_dict(exclude_unset=False, warnings=False)), MESSAGE)


def test_the_anthropic_helper_has_the_response(replayer: Replayer, anthropic_client: Make[anthropic.Anthropic]) -> None:
    replay_message(replayer)
    with anthropic_client(replayer.url).messages.stream(**ASK_MESSAGES) as stream:
        assert "".join(stream.text_stream) == TEXT
        assert_message(stream.get_final_message())


def test_the_asynchronous_anthropic_helper_has_the_response(
    replayer: Replayer, async_anthropic_client: Make[anthropic.AsyncAnthropic]
) -> None:
    replay_message(replayer)

    async def main() -> None:
        async with (
            async_anthropic_client(replayer.url) as client,
            client.messages.stream(**ASK_MESSAGES) as stream,
        ):
            assert_message(await stream.get_final_message())

    asyncio.run(main())


def test_anthropic_events(replayer: Replayer, anthropic_client: Make[anthropic.Anthropic]) -> None:
    replay_message(replayer)
    stream: anthropic.Stream[Any] = anthropic_client(replayer.url).messages.create(**ASK_MESSAGES, stream=True)
    assert_events(list(stream))


def test_anthropic_events_asynchronously(
    replayer: Replayer, async_anthropic_client: Make[anthropic.AsyncAnthropic]
) -> None:
    replay_message(replayer)

    async def main() -> list[Any]:
        async with async_anthropic_client(replayer.url) as client:
            stream: anthropic.AsyncStream[Any] = await client.messages.create(**ASK_MESSAGES, stream=True)
            return [event async for event in stream]

    assert_events(asyncio.run(main()))


def assert_events(events: list[Any]) -> None:
    deltas = [event.delta for event in events if event.type == "content_block_delta"]
    assert "".join(delta.text for delta in deltas if delta.type == "text_delta") == TEXT
    assert "".join(delta.thinking for delta in deltas if delta.type == "thinking_delta") == TEXT[::-1]
    inputs = [
        "".join(
            event.delta.partial_json for event in events if event.type == "content_block_delta" and event.index == at
        )
        for at in (3, 4, 5, 6)
    ]
    assert [json.loads(text) for text in inputs] == [MESSAGE["content"][at]["input"] for at in (3, 4, 5, 6)]
    assert events[-2].delta.stop_reason == "stop_sequence"
    assert events[-2].usage.output_tokens == 9
    assert events[-1].type == "message_stop"


@pytest.mark.parametrize("began", [False, True])
def test_an_error_raises_in_openai(replayer: Replayer, openai_client: Make[openai.OpenAI], began: bool) -> None:
    error = {"message": "the job has failed", "type": "server_error", "code": "job_failed", "param": None}
    begin = list(chat_events(json.dumps(CHAT).encode(), include_usage=False))[:3] if began else []
    replayer.stream = [*begin, chat_error_event(error)]
    stream: openai.Stream[Any] = openai_client(replayer.url).chat.completions.create(**ASK, stream=True)
    with pytest.raises(openai.APIError, match="the job has failed") as raised:
        list(stream)
    assert (raised.value.code, raised.value.type, raised.value.body) == ("job_failed", "server_error", error)
    with (
        pytest.raises(openai.APIError, match="the job has failed"),
        openai_client(replayer.url).chat.completions.stream(**ASK) as helper,
    ):
        helper.get_final_completion()


@pytest.mark.parametrize("began", [False, True])
def test_an_error_raises_in_anthropic(
    replayer: Replayer, anthropic_client: Make[anthropic.Anthropic], began: bool
) -> None:
    error = {"type": "overloaded_error", "message": "the job has failed"}
    begin = list(messages_events(json.dumps(MESSAGE).encode()))[:3] if began else []
    replayer.stream = [*begin, messages_error_event(error)]
    stream: anthropic.Stream[Any] = anthropic_client(replayer.url).messages.create(**ASK_MESSAGES, stream=True)
    with pytest.raises(anthropic.APIStatusError, match="the job has failed") as raised:
        list(stream)
    assert raised.value.body == {"type": "error", "error": error}
    with (
        pytest.raises(anthropic.APIStatusError, match="the job has failed"),
        anthropic_client(replayer.url).messages.stream(**ASK_MESSAGES) as helper,
    ):
        helper.get_final_message()


@pytest.mark.parametrize("protocol", ["chat", "messages"])
def test_a_body_that_is_no_object_raises(
    replayer: Replayer,
    openai_client: Make[openai.OpenAI],
    anthropic_client: Make[anthropic.Anthropic],
    protocol: Literal["chat", "messages"],
) -> None:
    if protocol == "chat":
        replay_chat(replayer, [1])
        with pytest.raises(openai.APIError, match="JSON"):
            list(openai_client(replayer.url).chat.completions.create(**ASK, stream=True))
    else:
        replay_message(replayer, [1])
        with pytest.raises(anthropic.APIStatusError, match="JSON"):
            list(anthropic_client(replayer.url).messages.create(**ASK_MESSAGES, stream=True))


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"choices": [{}]},
        {"choices": [{"message": {"content": None, "tool_calls": None}}, {"message": None}]},
        pytest.param(
            {"choices": [{"message": {"content": [{"type": "text", "text": "a list"}]}, "finish_reason": "stop"}]},
            marks=pytest.mark.filterwarnings("ignore:Pydantic serializer warnings"),  # the SDK's own, on its snapshot
        ),
    ],
)
def test_odd_chats_do_not_upset_the_helper(
    replayer: Replayer, openai_client: Make[openai.OpenAI], body: dict[str, Any]
) -> None:
    replay_chat(replayer, body)
    with openai_client(replayer.url).chat.completions.stream(**ASK) as stream:
        final = stream.get_final_completion().to_dict(warnings=False)
    assert_covers(
        as_told(final["choices"]),
        [
            {"index": at, **choice, "message": {"role": "assistant", **(choice.get("message") or {})}}
            for at, choice in enumerate(body.get("choices", ()))
        ],
    )


@pytest.mark.parametrize("content", [None, "plain", [], [{"type": "text", "text": None}], [{"text": "no type"}]])
def test_odd_messages_do_not_upset_the_helper(
    replayer: Replayer, anthropic_client: Make[anthropic.Anthropic], content: object
) -> None:
    replay_message(replayer, {"content": content})
    with anthropic_client(replayer.url).messages.stream(**ASK_MESSAGES) as stream:
        message = stream.get_final_message()
    assert message.stop_reason is None
    assert len(message.content) == (1 if content else 0)
