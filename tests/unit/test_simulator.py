"""The simulated provider over HTTP: shapes, streams, rules, faults, limits, ledger."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from ops.simulator import FAULTS, ConfigError, RunningSimulator, digest, running_simulator

MODEL = "MaaS_Mimo_V2.5_20260423"
CHAT = "/v1/chat/completions"
MESSAGES = "/v1/messages"
HEADERS = {"Authorization": "Bearer any", "Content-Type": "application/json"}
TOOL_SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "unit": {"enum": ["C", "F"]},
        "exact": {"type": "boolean"},
        "tags": {"type": "array", "items": {"type": "number"}},
        "none": {"type": "null"},
        "odd": True,
    },
}


class Reply:
    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = response.headers
        self.raw = response.read()

    @property
    def json(self) -> Any:
        return json.loads(self.raw)


def ask(
    sim: RunningSimulator, path: str, body: Any = None, *, method: str = "POST", headers: dict[str, str] = HEADERS
) -> Reply:
    data = body if isinstance(body, bytes) or body is None else json.dumps(body)
    connection = http.client.HTTPConnection(urlsplit(sim.url).netloc, timeout=20)
    try:
        connection.request(method, path, data, headers)
        return Reply(connection.getresponse())
    finally:
        connection.close()


def chat(text: str = "please introduce yourself", **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], **more}


def message(text: str = "What did I say?", **more: Any) -> dict[str, Any]:
    return {"max_tokens": 4096, **chat(text), **more}


def data_of(raw: bytes) -> list[str]:
    return [line[5:].strip() for line in raw.decode().splitlines() if line.startswith("data:")]


def join_chat(raw: bytes) -> dict[str, Any]:
    *chunks, done = data_of(raw)
    assert done == "[DONE]"
    out: dict[str, Any] = {}
    parts: dict[str, Any] = {}
    choice: dict[str, Any] = {"index": 0, "message": parts}
    for chunk in map(json.loads, chunks):
        assert chunk.pop("object") == "chat.completion.chunk"
        for piece in chunk.pop("choices"):
            delta = piece["delta"]
            for field in ("role", "content", "reasoning_content"):
                if field in delta:
                    parts[field] = parts.get(field, "") + delta[field]
            for call in delta.get("tool_calls", ()):
                assert call.pop("index") == 0
                calls = parts.setdefault("tool_calls", [call])
                if calls[0] is not call:
                    calls[0]["function"]["arguments"] += call["function"]["arguments"]
            choice |= {k: v for k, v in piece.items() if k.endswith("finish_reason")}
        out |= chunk
    return {**out, "object": "chat.completion", "choices": [choice]}


def join_message(raw: bytes) -> dict[str, Any]:
    out: dict[str, Any] = {}
    block: dict[str, Any] = {}
    partial = ""
    event: dict[str, Any] = {}
    for event in map(json.loads, data_of(raw)):
        kind = event["type"]
        if kind == "message_start":
            out = event["message"]
        elif kind == "content_block_start":
            block, partial = event["content_block"], ""
            out["content"].append(block)
        elif kind == "content_block_delta":
            assert out["content"][event["index"]] is block
            delta: dict[str, str] = event["delta"]
            match delta.pop("type"):
                case "input_json_delta":
                    partial += delta["partial_json"]
                case what:
                    ((field, piece),) = delta.items()
                    assert what == f"{field}_delta"
                    block[field] += piece
        elif kind == "content_block_stop" and block["type"] == "tool_use":
            block["input"] = json.loads(partial)
        elif kind == "message_delta":
            out |= event["delta"]
            out["usage"] |= event["usage"]
    assert event == {"type": "message_stop"}
    return out


@pytest.fixture(scope="module")
def shared() -> Iterator[RunningSimulator]:
    """For tests that only look at answers."""
    with running_simulator() as sim:
        yield sim


def test_a_chat_completion_has_exactly_the_providers_shape(shared: RunningSimulator) -> None:
    reply = ask(shared, CHAT, chat())
    body = reply.json
    assert reply.status == 200
    assert reply.headers["Content-Type"] == "application/json"
    assert set(body) == {"id", "object", "created", "model", "choices", "usage"}
    assert body["object"] == "chat.completion"
    assert body["model"] == MODEL
    assert body["id"] == f"chatcmpl-{digest(chat())}"
    (choice,) = body["choices"]
    assert set(choice) == {"index", "message", "finish_reason", "native_finish_reason"}
    assert set(choice["message"]) == {"role", "content", "reasoning_content"}
    assert choice["finish_reason"] == choice["native_finish_reason"] == "stop"
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert 0 < usage["completion_tokens_details"]["reasoning_tokens"] < usage["completion_tokens"]
    assert set(usage["completion_tokens_details"]) == {
        "accepted_prediction_tokens",
        "audio_tokens",
        "image_tokens",
        "reasoning_tokens",
        "rejected_prediction_tokens",
    }
    assert usage["prompt_tokens_details"] == {"audio_tokens": 0, "cached_tokens": 0, "image_tokens": 0}


def test_a_message_has_exactly_the_providers_shape(shared: RunningSimulator) -> None:
    body = ask(shared, MESSAGES, message(system=[{"type": "text", "text": "You remember."}])).json
    assert set(body) == {"id", "type", "role", "content", "model", "usage", "stop_reason"}
    text, thinking = body["content"]
    assert set(text) == {"type", "text"}
    assert thinking["type"] == "thinking"
    assert thinking["signature"] == ""
    assert thinking["thinking"]
    assert set(body["usage"]) == {"input_tokens", "output_tokens"}
    assert (body["type"], body["role"], body["stop_reason"]) == ("message", "assistant", "end_turn")


VARIANTS: list[dict[str, Any]] = [
    {},
    {"thinking": {"type": "disabled"}},
    {"max_tokens": 7},
    {"max_tokens": 1},
]


@pytest.mark.parametrize("more", [*VARIANTS, {"tools": [{"name": "w", "input_schema": TOOL_SCHEMA}]}])
@pytest.mark.parametrize("pieces", [1, 7, 5000])
def test_a_streamed_message_joins_to_the_whole_one(more: dict[str, Any], pieces: int) -> None:
    if "tools" in more:
        more = {**more, "tool_choice": {"type": "any"}}
    with running_simulator(stream_events=pieces) as sim:
        reply = ask(sim, MESSAGES, message(**more, stream=True))
        assert reply.headers["Content-Type"] == "text/event-stream"
        assert b'event: ping\ndata: {"type":"ping"}\n\n' in reply.raw
        assert join_message(reply.raw) == ask(sim, MESSAGES, message(**more)).json


@pytest.mark.parametrize(
    "more", [*VARIANTS, {"tools": [{"type": "function", "function": {"name": "w", "parameters": TOOL_SCHEMA}}]}]
)
@pytest.mark.parametrize("pieces", [1, 7, 5000])
def test_a_streamed_chat_joins_to_the_whole_one(more: dict[str, Any], pieces: int) -> None:
    if "tools" in more:
        more = {**more, "tool_choice": "required"}
    with running_simulator(stream_events=pieces) as sim:
        reply = ask(sim, CHAT, chat(**more, stream=True, stream_options={"include_usage": True}))
        assert join_chat(reply.raw) == ask(sim, CHAT, chat(**more)).json


def test_usage_is_streamed_only_when_asked_for(shared: RunningSimulator) -> None:
    assert b"usage" not in ask(shared, CHAT, chat(stream=True)).raw


def test_a_paced_stream_is_the_same(shared: RunningSimulator) -> None:
    with running_simulator(latency=0.1) as sim:
        assert (
            ask(sim, CHAT, chat(stream=True)).raw.splitlines() == ask(shared, CHAT, chat(stream=True)).raw.splitlines()
        )


def test_thinking_can_be_disabled(shared: RunningSimulator) -> None:
    body = ask(shared, CHAT, chat(thinking={"type": "disabled"})).json
    assert set(body["choices"][0]["message"]) == {"role", "content"}
    assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0
    content = ask(shared, MESSAGES, message(thinking={"type": "disabled"})).json["content"]
    assert [block["type"] for block in content] == ["text"]


@pytest.mark.parametrize("limit", [1, 2, 10, 120])
def test_an_answer_is_cut_at_the_token_limit(shared: RunningSimulator, limit: int) -> None:
    body = ask(shared, CHAT, chat(max_completion_tokens=limit)).json
    assert body["usage"]["completion_tokens"] == limit
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["choices"][0]["message"]["content"]
    answer = ask(shared, MESSAGES, message(max_tokens=limit)).json
    assert (answer["stop_reason"], answer["usage"]["output_tokens"]) == ("max_tokens", limit)


def test_an_answer_ends_before_a_stop_text(shared: RunningSimulator) -> None:
    text = ask(shared, CHAT, chat(stop=["q", "e"])).json["choices"][0]["message"]["content"]
    assert "e" not in text
    assert "e" not in ask(shared, CHAT, chat(stop="e")).json["choices"][0]["message"]["content"]


def test_tools_are_called_when_the_request_says_so(shared: RunningSimulator) -> None:
    tools = [{"type": "function", "function": {"name": n, "parameters": TOOL_SCHEMA}} for n in ("first", "second")]

    def called(choice: Any) -> str | None:
        (made,) = ask(shared, CHAT, chat(tools=tools, tool_choice=choice)).json["choices"]
        if made["finish_reason"] == "stop":
            return None
        assert made["finish_reason"] == "tool_calls"
        (call,) = made["message"]["tool_calls"]
        arguments = json.loads(call["function"]["arguments"])
        assert set(arguments) == set(TOOL_SCHEMA["properties"])
        assert isinstance(arguments["days"], int)
        assert arguments["unit"] in ("C", "F")
        name = call["function"]["name"]
        assert isinstance(name, str)
        return name

    assert [called(c) for c in ("required", "second", {"type": "function", "function": {"name": "second"}})] == [
        "first",
        "second",
        "second",
    ]
    assert [called(c) for c in ("auto", "none", None)] == [None, None, None]
    plain = ask(shared, MESSAGES, message(tools=[{"name": "t"}], tool_choice={"type": "tool", "name": "t"})).json
    assert plain["stop_reason"] == "tool_use"
    assert [b["input"] for b in plain["content"] if b["type"] == "tool_use"] == [{}]


def test_an_endpoint_path_needs_no_model(shared: RunningSimulator) -> None:
    for path, make in ((f"/v1/ai/my-endpoint{CHAT[3:]}", chat), (f"/my-endpoint{MESSAGES}", message)):
        body = make()
        del body["model"]
        assert ask(shared, path, body).json["model"] == MODEL
        unified = ask(shared, CHAT if make is chat else MESSAGES, body)
        assert unified.status == 400
        assert "model" in unified.json["error"]["message"]
    pro = "MaaS_Mimo_V2.5_pro_20260423"
    assert ask(shared, f"/v1/ai/{pro}{CHAT[3:]}", {"messages": chat()["messages"]}).json["model"] == pro


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "JSON"),
        (b'{"a": NaN}', "JSON"),
        (b"\xff\xfe", "JSON"),
        (b"[" * 100_000, "JSON"),
        (b"[]", "Expected object"),
        ({"model": MODEL}, "messages"),
        (chat(messages=[]), "messages: "),
        (chat(messages=[{"role": "user"}]), "content"),
        (chat(messages=[{"role": "pirate secret", "content": "x"}]), "messages[0].role: Invalid value"),
        (chat(temperature=1.6), "temperature: Expected float <= 1.5"),
        (chat(top_p=0), "top_p"),
        (chat(presence_penalty=-2.1), "presence_penalty"),
        (chat(frequency_penalty=2.1), "frequency_penalty"),
        (chat(max_completion_tokens=0), "max_completion_tokens"),
        (chat(max_completion_tokens=131_073), "max_completion_tokens"),
        (chat(response_format={"type": "json_object"}), "response_format"),
        (chat(stop=["1", "2", "3", "4", "5"]), "stop"),
        (chat(thinking={"type": "maybe"}), "thinking"),
        (chat(stream="yes"), "stream"),
        (chat(tools=[{"type": "function", "function": {"name": "x" * 65}}]), "name"),
        (chat(tools=[{"type": "function", "function": {"name": "x"}}], tool_choice="y"), "tool_choice"),
    ],
)
def test_a_body_that_breaks_a_rule_is_refused(shared: RunningSimulator, body: Any, says: str) -> None:
    reply = ask(shared, CHAT, body)
    error = reply.json["error"]
    assert reply.status == 400
    assert set(error) == {"code", "message", "type"}
    assert error["code"] == "400"
    assert says in error["message"]
    assert "secret" not in error["message"]


def test_messages_have_their_own_rules(shared: RunningSimulator) -> None:
    assert ask(shared, MESSAGES, chat()).json["error"]["message"].endswith("max_tokens")
    assert ask(shared, MESSAGES, message(system=[{"type": "image"}])).status == 400


def test_unknown_fields_and_allowed_nulls_pass(shared: RunningSimulator) -> None:
    nulls: dict[str, Any] = dict.fromkeys(
        ("stop", "stream", "max_completion_tokens", "frequency_penalty", "presence_penalty")
    )
    assert ask(shared, CHAT, chat(some_new_field=[1], **nulls)).status == 200
    turns = [{"role": "assistant", "content": None, "reasoning_content": "hm"}, {"role": "user", "content": []}]
    assert ask(shared, CHAT, chat(messages=turns)).status == 200


def test_other_paths_and_methods_are_refused(shared: RunningSimulator) -> None:
    for path in ("/", "/v1/models", "/v1/ai//chat/completions", "/_sim/nothing"):
        assert ask(shared, path, chat()).status == 404
    reply = ask(shared, CHAT, method="GET")
    assert (reply.status, reply.headers["Allow"]) == (405, "POST")


def test_a_set_key_is_the_only_one_accepted() -> None:
    with running_simulator(key="right-key") as sim:

        def status(headers: dict[str, str]) -> int:
            return ask(sim, CHAT, chat(), headers=headers).status

        assert status({"Authorization": "Bearer right-key"}) == 200
        assert status({"x-api-key": "right-key"}) == 200
        assert status({"Authorization": "Bearer wrong"}) == 401
        assert status({"Authorization": "Bearer right-kéy"}) == 401
        assert status({"Authorization": "Basic right-key"}) == 401
        assert status({}) == 401
        assert sim.totals()["paid"] == 2
        assert b"right-key" not in ask(sim, "/_sim/config", method="GET").raw + json.dumps(sim.ledger()).encode()


def test_without_a_key_any_key_is_accepted_but_none_is_not(shared: RunningSimulator) -> None:
    assert ask(shared, CHAT, chat(), headers={"x-api-key": "anything"}).status == 200
    for headers in ({}, {"Authorization": "Bearer "}):
        reply = ask(shared, CHAT, chat(), headers=headers)
        assert reply.status == 401
        assert reply.json["error"]["code"] == "401"


def test_answers_depend_on_seed_and_request_alone(shared: RunningSimulator) -> None:
    first = ask(shared, CHAT, chat("a")).json
    reordered = dict(reversed(chat("a").items()))
    with running_simulator() as again, running_simulator(seed=1) as other:
        ask(again, CHAT, chat("b"))
        assert ask(again, CHAT, reordered).json == first
        assert ask(other, CHAT, chat("a")).json["choices"] != first["choices"]
    assert ask(shared, CHAT, chat("b")).json["choices"] != first["choices"]


@pytest.mark.parametrize("size", [1000, 1700, 20_000])
def test_answers_are_about_as_long_as_told(size: int) -> None:
    with running_simulator(answer_bytes=size) as sim:
        for make, path in ((chat, CHAT), (message, MESSAGES)):
            sizes = [len(ask(sim, path, make(str(i), max_tokens=100_000)).raw) for i in range(10)]
            assert 0.8 * size < sum(sizes) / 10 < 1.2 * size


STATUS_FAULTS = [kind for kind, fault in FAULTS.items() if fault.status not in (0, 200)]


@pytest.mark.parametrize("stream", [False, True])
def test_status_faults_come_in_the_providers_error_shape_and_cost_nothing(stream: bool) -> None:
    with running_simulator(script=STATUS_FAULTS, retry_after=2) as sim:
        for kind in STATUS_FAULTS:
            reply = ask(sim, CHAT, chat(stream=stream))
            assert reply.status == FAULTS[kind].status
            error = {"code": str(reply.status), "message": FAULTS[kind].message, "type": FAULTS[kind].type}
            assert reply.json == {"error": error}
            assert reply.headers["Retry-After"] == ("2" if reply.status in (429, 503, 529) else None)
        assert ask(sim, CHAT, chat(stream=stream)).status == 200
        told = {call["fault"] for call in sim.ledger()["calls"] if call["retry_after"] == 2.0}
        assert told == {"429", "503", "529"}
        totals = sim.totals()
        assert totals["by_fault"] == dict.fromkeys(STATUS_FAULTS, 1)
        assert (totals["paid"], totals["calls"], totals["answered"]) == (1, len(STATUS_FAULTS) + 1, 1)


def test_the_known_refusals_have_their_known_texts() -> None:
    with running_simulator(script=["429", "400_backend", "402"]) as sim:
        assert ask(sim, CHAT, chat()).json == {
            "error": {"code": "429", "message": "Too many requests", "type": "limitation"}
        }
        assert "finishConnect(..) failed: Connection refused" in ask(sim, CHAT, chat()).json["error"]["message"]
        assert ask(sim, CHAT, chat()).json["error"]["message"] == "Insufficient account funds"


def test_a_reset_cuts_the_connection_before_the_answer() -> None:
    with running_simulator(script=["reset"]) as sim:
        with pytest.raises(ConnectionError):
            ask(sim, CHAT, chat())
        sim.wait_until(lambda t: t.calls == 1)
        (call,) = sim.ledger()["calls"]
        assert (call["status"], call["fault"], call["paid"], call["delivered"]) == (0, "reset", False, False)


def test_a_truncated_answer_is_paid() -> None:
    with running_simulator(faults={"truncated": 1.0}) as sim:
        reply = ask(sim, CHAT, chat())
        assert reply.status == 200
        with pytest.raises(json.JSONDecodeError):
            _ = reply.json
        streamed = data_of(ask(sim, CHAT, chat(stream=True)).raw)
        with pytest.raises(json.JSONDecodeError):
            json.loads(streamed[-1])
        assert sim.totals()["paid"] == 2
        assert sim.totals()["answered"] == 0


def test_not_json_is_a_page() -> None:
    with running_simulator(faults={"not_json": 1.0}) as sim:
        for stream in (False, True):
            reply = ask(sim, CHAT, chat(stream=stream))
            assert (reply.status, reply.headers["Content-Type"]) == (200, "text/html")
        assert sim.totals()["paid"] == 0


@pytest.mark.parametrize("stream", [False, True])
def test_degenerate_answers(stream: bool) -> None:
    with running_simulator(script=["thinking_only", "repetition"] * 2) as sim:
        reply = ask(sim, CHAT, chat(stream=stream))
        (choice,) = (join_chat(reply.raw) if stream else reply.json)["choices"]
        assert choice["message"]["content"] == ""
        assert choice["message"]["reasoning_content"]
        reply = ask(sim, CHAT, chat(stream=stream))
        (choice,) = (join_chat(reply.raw) if stream else reply.json)["choices"]
        assert choice["finish_reason"] == "repetition_truncation"
        assert choice["message"]["content"][:40] == choice["message"]["content"][40:80]
        reply = ask(sim, MESSAGES, message(stream=stream))
        body = join_message(reply.raw) if stream else reply.json
        assert [block["type"] for block in body["content"]] == ["thinking"]
        reply = ask(sim, MESSAGES, message(stream=stream))
        assert (join_message(reply.raw) if stream else reply.json)["stop_reason"] == "repetition_truncation"
        assert sim.totals()["paid"] == 4


def test_a_stall_lasts_until_the_client_goes() -> None:
    with running_simulator(script=["stall"]) as sim:
        connection = http.client.HTTPConnection(urlsplit(sim.url).netloc, timeout=20)
        connection.request("POST", CHAT, json.dumps(chat()), HEADERS)
        sim.wait_until(lambda t: t.in_flight == 1)
        connection.close()
        sim.wait_until(lambda t: t.calls == 1)
        assert sim.totals()["in_flight"] == 0
        assert sim.ledger()["paid"] == {}


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
def test_stream_faults_harm_streams_only(path: str) -> None:
    make = chat if path == CHAT else message
    with running_simulator(script=["sse_error", "stream_cut", "sse_error", "stream_cut"]) as sim:
        broken = data_of(ask(sim, path, make(stream=True)).raw)
        error = {"code": "500", "message": "Internal server error", "type": "server_error"}
        assert json.loads(broken[-1]) == {"error": error}
        assert len(broken) > 10
        cut = ask(sim, path, make(stream=True)).raw
        assert b"DONE" not in cut
        assert b'"finish_reason":"stop"' not in cut
        assert b"message_stop" not in cut
        json.loads(data_of(cut)[-1])
        assert [ask(sim, path, make()).status for _ in range(2)] == [200, 200]
        totals = sim.totals()
        assert totals["by_fault"] == {"sse_error": 1, "stream_cut": 1}
        assert (totals["paid"], totals["answered"]) == (3, 2)


def test_fault_rates_are_seeded_per_request_and_try() -> None:
    def statuses(seed: int, order: int) -> dict[int, list[int]]:
        with running_simulator(seed=seed, faults={"500": 0.3, "429": 0.2}) as sim:
            return {i: [ask(sim, CHAT, chat(str(i))).status for _ in range(4)] for i in range(25)[::order]}

    first = statuses(0, 1)
    assert statuses(0, -1) == first
    assert statuses(1, 1) != first
    seen = [status for each in first.values() for status in each]
    assert 15 <= seen.count(500) <= 45
    assert 8 <= seen.count(429) <= 35
    assert any(len(set(each)) > 1 for each in first.values())


def test_a_trigger_always_harms_its_request() -> None:
    with running_simulator(triggers={"poison": "421"}) as sim:
        assert [ask(sim, CHAT, chat(text)).status for text in ("poison", "fine", "poison")] == [421, 200, 421]


def test_rpm_and_tpm_refuse_what_is_over_them() -> None:
    with running_simulator(rpm=2, limit_headers=True) as sim:
        first, second, third = (ask(sim, CHAT, chat(str(i))) for i in range(3))
        assert [r.status for r in (first, second, third)] == [200, 200, 429]
        assert first.headers["x-ratelimit-limit-requests"] == "2"
        assert second.headers["x-ratelimit-remaining-requests"] == "0"
        assert 50 < float(third.headers["x-ratelimit-reset-requests"].rstrip("s")) <= 60
        assert "x-ratelimit-limit-tokens" not in third.headers
        assert ask(sim, CHAT, {**chat(), "model": "another"}).status == 200
        assert ask(sim, CHAT, chat(), headers={"x-api-key": "another"}).status == 200
        sim.configure(rpm=None, tpm=1000)
        while (reply := ask(sim, CHAT, chat())).status == 200:
            pass
        assert reply.json["error"]["type"] == "limitation"
        totals = sim.totals()
        assert totals["by_fault"] == {"rpm": 1, "tpm": 1}
        assert totals["refused"] == 2
        assert 500 < totals["max_minute_tokens"] <= 1000
        sim.reset()
        assert ask(sim, CHAT, chat()).status == 200
        totals = sim.totals()
        assert (totals["calls"], totals["max_minute_asked"], totals["max_minute_admitted"]) == (1, 1, 1)


def test_concurrency_counts_what_is_in_flight() -> None:
    with running_simulator(concurrency=2, hold=True) as sim, ThreadPoolExecutor(2) as pool:
        held = [pool.submit(ask, sim, CHAT, chat(str(i))) for i in range(2)]
        sim.wait_until(lambda t: t.in_flight == 2)
        assert ask(sim, CHAT, chat()).status == 429
        sim.configure(hold=False)
        assert [f.result().status for f in held] == [200, 200]
        assert ask(sim, CHAT, chat()).status == 200
        totals = sim.totals()
        assert (totals["max_in_flight"], totals["by_fault"]) == (2, {"concurrency": 1})
        assert sorted(call["in_flight"] for call in sim.ledger()["calls"]) == [0, 1, 1, 2]


def test_the_ledger_books_every_call(tmp_path: Path) -> None:
    file = tmp_path / "ledger.jsonl"
    bodies = [chat("a", metadata={"row": "1"}), chat("b", user="me"), chat("a", metadata={"row": "1"}, stream=True)]
    with running_simulator(ledger=str(file), keep_calls=2) as sim:
        usages = [ask(sim, CHAT, body) for body in bodies][:2]
        ask(sim, CHAT, b"nonsense")
        ledger = ask(sim, "/_sim/ledger", method="GET").json
        assert ask(sim, "/_sim/ledger?only=totals", method="GET").json == {"totals": ledger["totals"]}
        assert sim.ledger() == ledger
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["number"] for line in lines] == [1, 2, 3, 4]
    assert ledger["calls"] == lines[2:]
    assert [line["tag"] for line in lines] == [{"row": "1"}, "me", {"row": "1"}, None]
    a, b = digest(bodies[0]), digest(json.dumps(bodies[1]).encode())
    assert [line["digest"] for line in lines] == [a, b, a, ""]
    assert [line["status"] for line in lines] == [200, 200, 200, 400]
    assert ledger["paid"] == {a: 2, b: 1}
    totals = ledger["totals"]
    tokens = [u.json["usage"]["total_tokens"] for u in usages]
    assert totals["total_tokens"] == 2 * tokens[0] + tokens[1] == totals["prompt_tokens"] + totals["completion_tokens"]
    assert (totals["calls"], totals["paid"], totals["paid_again"], totals["answered"]) == (4, 3, 1, 3)
    assert totals["by_status"] == {"200": 3, "400": 1}
    assert totals["max_minute_asked"] == 3


def test_a_client_that_leaves_is_billed() -> None:
    with running_simulator(hold=True) as sim:
        connection = http.client.HTTPConnection(urlsplit(sim.url).netloc, timeout=20)
        connection.request("POST", CHAT, json.dumps(chat()), HEADERS)
        sim.wait_until(lambda t: t.in_flight == 1)
        connection.close()
        sim.wait_until(lambda t: t.calls == 1)
        (call,) = sim.ledger()["calls"]
        assert (call["paid"], call["delivered"], call["status"]) == (True, False, 0)
        assert call["end"] >= call["at"] > 0
        assert sim.totals()["answered"] == 0


def test_a_client_that_leaves_in_mid_answer_has_nothing_delivered() -> None:
    with running_simulator(answer_bytes=400_000, stream_events=60_000) as sim:  # far more than socket buffers take
        connection = http.client.HTTPConnection(urlsplit(sim.url).netloc, timeout=20)
        connection.request("POST", CHAT, json.dumps(chat(max_tokens=131_072, stream=True)), HEADERS)
        connection.getresponse().close()
        connection.close()
        sim.wait_until(lambda t: t.calls == 1)
        (call,) = sim.ledger()["calls"]
        assert (call["paid"], call["status"], call["delivered"]) == (True, 200, False)


def test_an_outage_of_503_can_be_switched_over_http() -> None:
    with running_simulator() as sim:
        assert ask(sim, "/_sim/config", {"down": "503"}).json["down"] == "503"
        assert ask(sim, CHAT, chat()).status == 503
        assert ask(sim, "/_sim/config", {"down": None}).status == 200
        assert ask(sim, CHAT, chat()).status == 200
        assert sim.totals()["by_fault"] == {"down": 1}


def test_an_outage_of_refusals_closes_the_port_and_ends() -> None:
    with running_simulator(hold=True) as sim, ThreadPoolExecutor(1) as pool:
        url = sim.url
        held = pool.submit(ask, sim, CHAT, chat())
        sim.wait_until(lambda t: t.in_flight == 1)
        sim.configure(down="refuse", hold=False)
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            held.result()
        with pytest.raises(ConnectionRefusedError):
            ask(sim, CHAT, chat())
        sim.configure(down=None)
        assert sim.url == url
        assert ask(sim, CHAT, chat()).status == 200

        # The connection that switches it off can switch it on again.
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
        for down in ("refuse", None):
            connection.request("POST", "/_sim/config", json.dumps({"down": down}))
            assert Reply(connection.getresponse()).json["down"] == down
        connection.close()
        assert ask(sim, CHAT, chat()).status == 200


def test_an_outage_with_a_length_ends_by_itself() -> None:
    with running_simulator() as sim:
        sim.configure(down="503", down_s=3600)
        sim.configure(down="503", down_s=0.01)
        while ask(sim, CHAT, chat()).status == 503:
            pass
        assert ask(sim, "/_sim/config", method="GET").json["down_s"] is None
    with running_simulator(down="refuse", down_s=3600) as sim, pytest.raises(ConnectionRefusedError):
        ask(sim, CHAT, chat())


def test_a_bad_change_changes_nothing() -> None:
    with running_simulator(script=["500"]) as sim:
        for change in ({"rpm": 0}, {"no": 1}, {"port": 1}, {"faults": {"odd": 1}}, {"rpm": 5, "latency": -1}):
            reply = ask(sim, "/_sim/config", change)
            assert reply.status == 400
            assert reply.json["error"]["code"] == "400"
        assert ask(sim, "/_sim/config", b"[]").status == 400
        with pytest.raises(ConfigError, match="at the start only"):
            sim.configure(key="other")
        assert ask(sim, "/_sim/config", method="GET").json["rpm"] is None
        sim.configure(script=["502", None])
        assert [ask(sim, CHAT, chat()).status for _ in range(3)] == [502, 200, 200]
        assert ask(sim, "/_sim/reset").status == 200
        assert sim.totals()["calls"] == 0


def test_waiting_in_vain_ends() -> None:
    with running_simulator() as sim, pytest.raises(TimeoutError):
        sim.wait_until(lambda t: t.calls == 1, timeout=0.0)


def test_a_taken_port_is_said_to_the_caller(shared: RunningSimulator) -> None:
    with pytest.raises(OSError, match="address"), running_simulator(port=shared.port):
        raise AssertionError("two simulators on one port")


def test_a_failing_test_body_ends_the_simulator() -> None:
    with pytest.raises(ZeroDivisionError), running_simulator() as sim:
        _ = 1 / 0
    with pytest.raises(ConnectionRefusedError):
        ask(sim, CHAT, chat())
