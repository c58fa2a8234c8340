"""Every rule of the MiMo schema, with what keeps it and what breaks it; and the forms that a request may have."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.chat import ChatBody
from jobs.errors import InvalidRequest
from jobs.messages import MessagesBody
from jobs.requests import (
    CHAT,
    ENDPOINTS,
    MAX_DEPTH,
    MESSAGES,
    InvalidLine,
    Problem,
    Request,
    check,
    make_request,
    parse,
    unknown_fields,
)

USER = {"role": "user", "content": "hi"}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
FUNCTION = {"type": "function", "function": {"name": "f"}}
A64 = "a" * 64
EPHEMERAL = {"type": "ephemeral"}
BIG = 10**400

CHAT_GOOD: list[dict[str, Any]] = [
    *({"messages": [{"role": role, "content": "x"}]} for role in ("developer", "system", "user", "assistant", "tool")),
    {"messages": [USER, USER]},
    {"messages": [{**USER, "name": "Ann"}]},
    {"messages": [{**USER, "name": None}]},
    {"messages": [{"role": "user", "content": ""}]},
    {"messages": [{"role": "user", "content": []}]},
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {}}]}
        ]
    },
    {"messages": [{"role": "assistant", "content": None, "tool_calls": [CALL]}]},
    {"messages": [{"role": "assistant", "tool_calls": [CALL]}]},
    {"messages": [{"role": "assistant", "content": None, "reasoning_content": "hm"}]},
    {"messages": [{"role": "assistant", "content": "x", "tool_calls": None, "refusal": None, "audio": None}]},
    {"messages": [{"role": "tool", "content": "x", "tool_call_id": "c"}]},
    *({"frequency_penalty": value} for value in (-2, -2.0, 0, 2, None)),
    *({"presence_penalty": value} for value in (-2, 1.5, 2.0, None)),
    *({"max_completion_tokens": value} for value in (1, 8192, 131_072, None)),
    {"response_format": {"type": "text"}},
    *({"stop": value} for value in ("x", [], ["a", "b", "c", "d"], None)),
    *({"stream": value} for value in (True, False, None)),
    *({"thinking": {"type": value}} for value in ("enabled", "disabled")),
    *({"temperature": value} for value in (0, 0.0, 1, 1.5)),
    *({"top_p": value} for value in (1, 1.0, 0.0001)),
    *({"tool_choice": value} for value in ("auto", "none")),
    *({"tools": value} for value in ([], [FUNCTION])),
    {"tools": [{"type": "function", "function": {"name": A64, "description": "d", "parameters": {}, "strict": True}}]},
    {"tools": [{"type": "function", "function": {"name": "f", "description": None, "parameters": None}}]},
    {"model": "m"},
    {"n": 2, "seed": None},
]

CHAT_BAD: list[tuple[dict[str, Any], str]] = [
    ({"messages": ...}, "messages: is missing"),
    ({"messages": None}, "messages: must be a list"),
    ({"messages": "hi"}, "messages: must be a list"),
    ({"messages": []}, "messages: is empty"),
    ({"messages": ["hi"]}, "messages[0]: must be an object"),
    ({"messages": [USER, USER, USER, {"role": "boss", "content": "x"}]},
     "messages[3].role: must be one of developer, system, user, assistant, tool"),
    ({"messages": [{"content": "x"}]}, "messages[0].role: is missing"),
    ({"messages": [{"role": 1, "content": "x"}]},
     "messages[0].role: must be one of developer, system, user, assistant, tool"),
    ({"messages": [{"role": "user"}]}, "messages[0].content: is missing"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content: must be a string or a list"),
    ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content: must be a string or a list"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]: must be an object"),
    ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages[0].content[0].type: is missing"),
    ({"messages": [{"role": "user", "content": [{"type": 1}]}]}, "messages[0].content[0].type: must be a string"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text: is missing"),
    ({"messages": [{**USER, "name": 1}]}, "messages[0].name: must be a string"),
    ({"messages": [{"role": "assistant"}]}, "messages[0]: needs content, tool_calls or reasoning_content"),
    ({"messages": [{"role": "assistant", "content": None, "tool_calls": []}]},
     "messages[0]: needs content, tool_calls or reasoning_content"),
    ({"messages": [{"role": "assistant", "content": 1}]}, "messages[0].content: must be a string or a list"),
    ({"messages": [{"role": "assistant", "tool_calls": ["x"]}]}, "messages[0].tool_calls[0]: must be an object"),
    ({"messages": [{"role": "assistant", "content": "", "reasoning_content": 1}]},
     "messages[0].reasoning_content: must be a string"),
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": 1}]}, "messages[0].tool_call_id: must be a string"),
    ({"model": None}, "model: must be a string"),
    ({"model": ""}, "model: is empty"),
    ({"frequency_penalty": 2.1}, "frequency_penalty: 2.1 is over 2"),
    ({"frequency_penalty": -3}, "frequency_penalty: -3 is under -2"),
    ({"frequency_penalty": "0"}, "frequency_penalty: must be a number"),
    ({"presence_penalty": -2.5}, "presence_penalty: -2.5 is under -2"),
    ({"presence_penalty": False}, "presence_penalty: must be a number"),
    ({"max_completion_tokens": 0}, "max_completion_tokens: 0 is under 1"),
    ({"max_completion_tokens": 131_073}, "max_completion_tokens: 131073 is over 131072"),
    ({"max_completion_tokens": BIG}, "max_completion_tokens: the number is over 131072"),
    ({"max_completion_tokens": 1.0}, "max_completion_tokens: must be an integer"),
    ({"max_completion_tokens": True}, "max_completion_tokens: must be an integer"),
    ({"max_completion_tokens": "8"}, "max_completion_tokens: must be an integer"),
    ({"response_format": {"type": "json_object"}}, "response_format.type: must be text"),
    ({"response_format": {}}, "response_format.type: is missing"),
    ({"response_format": "text"}, "response_format: must be an object"),
    ({"response_format": None}, "response_format: must be an object"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop: has 5 sequences, at most 4 are allowed"),
    ({"stop": ["a", 1]}, "stop[1]: must be a string"),
    ({"stop": 1}, "stop: must be a string or a list"),
    ({"stream": 1}, "stream: must be true or false"),
    ({"stream": "true"}, "stream: must be true or false"),
    ({"thinking": {"type": "auto"}}, "thinking.type: must be one of enabled, disabled"),
    ({"thinking": {}}, "thinking.type: is missing"),
    ({"thinking": True}, "thinking: must be an object"),
    ({"temperature": 1.9}, "temperature: 1.9 is over 1.5"),
    ({"temperature": -1}, "temperature: -1 is under 0"),
    ({"temperature": True}, "temperature: must be a number"),
    ({"temperature": None}, "temperature: must be a number"),
    ({"temperature": float("nan")}, "temperature: must be a finite number"),
    ({"top_p": 0}, "top_p: 0 is not over 0"),
    ({"top_p": 1.01}, "top_p: 1.01 is over 1"),
    ({"tool_choice": {"type": "function"}}, "tool_choice: must be a string"),
    ({"tools": {}}, "tools: must be a list"),
    ({"tools": [{"type": "web", "function": {"name": "f"}}]}, "tools[0].type: must be function"),
    ({"tools": [{"function": {"name": "f"}}]}, "tools[0].type: is missing"),
    ({"tools": [{"type": "function"}]}, "tools[0].function: is missing"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name: is missing"),
    ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name: is empty"),
    ({"tools": [{"type": "function", "function": {"name": A64 + "a"}}]},
     "tools[0].function.name: has 65 characters, at most 64 are allowed"),
    ({"tools": [{"type": "function", "function": {"name": "f", "description": 1}}]},
     "tools[0].function.description: must be a string"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
     "tools[0].function.parameters: must be an object"),
    ({"tools": [{"type": "function", "function": {"name": "f", "strict": 1}}]},
     "tools[0].function.strict: must be true or false"),
]  # fmt: skip

MESSAGES_GOOD: list[dict[str, Any]] = [
    {"max_tokens": 1},
    {"max_tokens": 131_072},
    {"messages": [USER, USER]},
    {"messages": [USER, {"role": "assistant", "content": [{"type": "thinking", "thinking": "x", "signature": "s"}]}]},
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]}
        ]
    },
    {"messages": [{"role": "user", "content": [{"type": "image", "cache_control": None}]}]},
    {"system": "be good"},
    {"system": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral", "ttl": "1h"}}]},
    {"temperature": 1.5, "top_p": 1, "top_k": 0, "stream": True, "metadata": {"user_id": "u"}},
    {"stop_sequences": ["a"] * 9},
    {"thinking": {"type": "enabled", "budget_tokens": 1024}},
    {"thinking": {"type": "disabled"}},
    {"tools": [{"name": "f", "input_schema": {"type": "object"}}], "tool_choice": {"type": "tool", "name": "f"}},
    {"tools": [{"name": "web_search", "type": "web_search_20250305"}]},
]

MESSAGES_BAD: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": ...}, "max_tokens: is missing"),
    ({"max_tokens": None}, "max_tokens: must be an integer"),
    ({"max_tokens": 0}, "max_tokens: 0 is under 1"),
    ({"max_tokens": 131_073}, "max_tokens: 131073 is over 131072"),
    ({"messages": ...}, "messages: is missing"),
    ({"messages": []}, "messages: is empty"),
    ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role: must be one of user, assistant"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content: must be a string or a list"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text: is missing"),
    ({"messages": [{"role": "user", "content": [{"type": "x", "cache_control": {"type": "persistent"}}]}]},
     "messages[0].content[0].cache_control.type: must be ephemeral"),
    ({"system": 1}, "system: must be a string or a list"),
    ({"system": None}, "system: must be a string or a list"),
    ({"system": [{"type": "image", "text": "x"}]}, "system[0].type: must be text"),
    ({"system": [{"type": "text", "text": "x", "cache_control": {}}]}, "system[0].cache_control.type: is missing"),
    ({"temperature": 1.6}, "temperature: 1.6 is over 1.5"),
    ({"top_p": 0.0}, "top_p: 0.0 is not over 0"),
    ({"top_k": -1}, "top_k: -1 is under 0"),
    ({"stop_sequences": "x"}, "stop_sequences: must be a list"),
    ({"stop_sequences": [1]}, "stop_sequences[0]: must be a string"),
    ({"thinking": {"type": "on"}}, "thinking.type: must be one of enabled, disabled"),
    ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens: 0 is under 1"),
    ({"tools": [{"input_schema": {}}]}, "tools[0].name: is missing"),
    ({"tools": [{"name": "f"}]}, "tools[0]: needs an input_schema"),
    ({"tools": [{"name": "f", "type": "custom"}]}, "tools[0]: needs an input_schema"),
    ({"tool_choice": "auto"}, "tool_choice: must be an object"),
    ({"tool_choice": {"type": "some"}}, "tool_choice.type: must be one of auto, any, tool, none"),
    ({"metadata": "u"}, "metadata: must be an object"),
]  # fmt: skip


def body(endpoint: str = CHAT, **changes: Any) -> dict[str, Any]:
    """A good body with changes; `...` leaves a field out."""
    whole = {"messages": [USER], **({"max_tokens": 9} if endpoint == MESSAGES else {}), **changes}
    return {name: value for name, value in whole.items() if value is not ...}


def line(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def refused(raw: bytes, **defaults: Any) -> str:
    with pytest.raises(InvalidLine) as caught:
        parse(raw, **defaults)
    return str(caught.value)


@pytest.mark.parametrize("changes", CHAT_GOOD, ids=str)
def test_chat_accepts(changes: dict[str, Any]) -> None:
    assert check(CHAT, body(**changes)) == []


@pytest.mark.parametrize(("changes", "problem"), CHAT_BAD, ids=[text for _, text in CHAT_BAD])
def test_chat_refuses(changes: dict[str, Any], problem: str) -> None:
    assert [str(item) for item in check(CHAT, body(**changes))] == [problem]


@pytest.mark.parametrize("changes", MESSAGES_GOOD, ids=str)
def test_messages_accepts(changes: dict[str, Any]) -> None:
    assert check(MESSAGES, body(MESSAGES, **changes)) == []


@pytest.mark.parametrize(("changes", "problem"), MESSAGES_BAD, ids=[text for _, text in MESSAGES_BAD])
def test_messages_refuses(changes: dict[str, Any], problem: str) -> None:
    assert [str(item) for item in check(MESSAGES, body(MESSAGES, **changes))] == [problem]


def test_all_broken_rules_are_named() -> None:
    problems = check(CHAT, body(temperature=2, top_p=0, tools=[{}]))
    assert {problem.field for problem in problems} == {"temperature", "top_p", "tools[0].type", "tools[0].function"}


def test_every_field_states_its_rule() -> None:
    for model in (ChatBody, MessagesBody):
        assert all(field.description for field in model.model_fields.values())


def test_an_unknown_endpoint_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="endpoint: /v1/embeddings is not supported"):
        check("/v1/embeddings", body())


def test_unknown_fields_are_those_the_page_does_not_name() -> None:
    assert unknown_fields(CHAT, body(n=1, temperature=1, seed=2)) == ["n", "seed"]
    assert unknown_fields(MESSAGES, body(MESSAGES, system="s", n=1)) == ["n"]
    everything = dict.fromkeys(ChatBody.model_fields)
    assert unknown_fields(CHAT, everything) == []


def test_batch_form_sends_the_body_as_it_is() -> None:
    text = b'{ "messages" :[{"role":"user","content":"\\u00e9\xc3\xa9"}],"model":"m","x":[12345678901234567890,1.50]}'
    for endpoint in ENDPOINTS:
        sent = text if endpoint == CHAT else text[:-1] + b',"max_tokens":5}'
        raw = b'{"url":"' + endpoint.encode() + b'","body":' + sent + b',"method":"POST","custom_id":"a"}'
        assert parse(raw).request == Request(endpoint, sent, "a")


def test_batch_form_without_url_and_method_takes_the_defaults() -> None:
    found = parse(line(body=body(MESSAGES)), endpoint=MESSAGES).request
    assert (found.endpoint, found.custom_id) == (MESSAGES, None)


def test_a_missing_model_is_put_in_and_nothing_else_changes() -> None:
    text = b'{"messages": [{"role":"user","content":"x"}], "n": 1e2}'
    sent = parse(b'{"body":' + text + b"}", model='m"1').request.body
    assert sent == b'{"model":"m\\"1",' + text[1:]
    assert json.loads(parse(line(body=body(model="own")), model="m").request.body)["model"] == "own"
    assert "model" not in json.loads(parse(line(body=body())).request.body)


def test_bare_body() -> None:
    text = b' {"messages": [{"role":"user","content":"x"}], "seed": 10000000000000000000001} '
    assert parse(text).request == Request(CHAT, text.strip(), None)
    found = parse(b'{"custom_id": "a", ' + text.strip()[1:]).request
    assert found.custom_id == "a"
    assert found.body == b'{"messages":[{"role":"user","content":"x"}],"seed":10000000000000000000001}'
    assert parse(line(**body(), custom_id=None)).request.custom_id is None
    assert "custom_id" not in json.loads(parse(line(**body(), custom_id=None)).request.body)
    assert parse(line(**body(MESSAGES)), endpoint=MESSAGES).request.endpoint == MESSAGES


def test_prompt_form() -> None:
    found = parse(b'{"temperature":0.10,"prompt":"a\\u00e9\\n","custom_id":"7"}', model="m").request
    assert found.custom_id == "7"
    assert json.loads(found.body) == {
        "model": "m", "temperature": 0.1, "messages": [{"role": "user", "content": "aé\n"}]
    }  # fmt: skip
    assert b"0.10" in found.body


def test_prompt_on_messages_gets_max_tokens() -> None:
    sent = json.loads(parse(line(prompt="x"), endpoint=MESSAGES).request.body)
    assert sent == {"messages": [{"role": "user", "content": "x"}], "max_tokens": 32_768}
    assert json.loads(parse(line(prompt="x", max_tokens=5), endpoint=MESSAGES).request.body)["max_tokens"] == 5


def test_names_worth_a_warning() -> None:
    found = parse(line(body=body(n=1), temperature=3, custom_id="a"))
    assert (found.unknown, found.ignored) == (["n"], ["temperature"])
    assert parse(line(prompt="x", seed=1)).unknown == ["seed"]
    assert parse(line(prompt="x", stream=True)) == parse(line(prompt="x", stream=True))._replace(unknown=[], ignored=[])


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"hello", "is not JSON (character 1)"),
        (b'{"prompt":"x"', "is not JSON, it ends too early"),
        (b'{"prompt":"x"} {"prompt":"y"}', "is not JSON (character 16)"),
        (b"", "is not JSON, it ends too early"),
        (b'{"prompt":"x\x01"}', "is not JSON (character 13)"),
        (b'{"prompt":"x","seed":NaN}', "holds NaN or Infinity, which JSON has not"),
        (b'{"body":{"seed":[-Infinity]}}', "holds NaN or Infinity, which JSON has not"),
        (b'{"prompt":"x","seed":1e999}', "holds a number out of range"),
        (b'{"prompt":"x","seed":' + b"1" * 5000 + b"}", "holds a number out of range"),
        (b'{"prompt":"x","seed":' + b"1" * 5000, "is not JSON"),
        (b"[1]", "is not a JSON object"),
        (b'"x"', "is not a JSON object"),
        (b"null", "is not a JSON object"),
        (b'{"prompt":"\xff"}', "is not UTF-8"),
        (b'{"\xff":"x"}', "is not UTF-8"),
        (b'{"body":{"messages":[{"role":"user","content":"\xed\xa0\x80"}]}}', "is not UTF-8"),
        (b'{"prompt":"x"}\0', "holds NUL bytes; write the file in UTF-8"),
        ('{"prompt":"x"}'.encode("utf-16-le"), "holds NUL bytes; write the file in UTF-8"),
        (b'{"prompt":"\\ud800"}', "holds half of a surrogate pair (\\ud800 to \\udfff), which no UTF-8 can hold"),
        (b'{"prompt":"\\uDC00 x"}', "holds half of a surrogate pair (\\ud800 to \\udfff), which no UTF-8 can hold"),
        (b'{"prompt":"x","a":' + b"[" * 101 + b"]" * 101 + b"}", "is nested too deeply, 100 levels are allowed"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "is nested too deeply, 100 levels are allowed"),
        (b'{"a":' + b"[" * 100_000, "is nested too deeply, 100 levels are allowed"),
        (b"{}", "messages: is missing"),
        (line(temperature=1), "messages: is missing"),
        (line(prompt=1), "prompt: must be a string"),
        (line(prompt="x", messages=[USER]), "prompt: stands beside messages; give one of them"),
        (line(method="POST"), "body: is missing"),
        (line(body=[]), "body: must be an object"),
        (line(body="{}"), "body: must be an object"),
        (line(body=body(), method="GET"), "method: GET is not supported; use POST"),
        (line(body=body(), method=None), "method: must be a string"),
        (line(body=body(), url="/v1/embeddings"),
         "url: /v1/embeddings is not supported; use /v1/chat/completions or /v1/messages"),
        (line(body=body(), url=""),
         "url: an empty string is not supported; use /v1/chat/completions or /v1/messages"),
        (line(body=body(), url="\x1b[31m" + "x" * 100),
         f"url: ?[31m{'x' * 55} is not supported; use /v1/chat/completions or /v1/messages"),
        (line(body=body(), url=[CHAT]), "url: must be a string"),
        (line(prompt="x", custom_id=7), "custom_id: must be a string"),
        (line(prompt="x", custom_id=""), "custom_id: has 0 characters, 1 to 512 are allowed"),
        (line(prompt="x", custom_id="x" * 513), "custom_id: has 513 characters, 1 to 512 are allowed"),
        (line(prompt="x", custom_id="a\nb"), "custom_id: must not hold control characters or line breaks"),
        (line(prompt="x", custom_id="\u0000"), "custom_id: must not hold control characters or line breaks"),
        (line(body=body(temperature=1.9), custom_id=7), "custom_id: must be a string; temperature: 1.9 is over 1.5"),
    ],
)  # fmt: skip
def test_refused_lines(raw: bytes, problem: str) -> None:
    assert refused(raw) == problem


def test_depth_is_allowed_to_its_limit() -> None:
    inner = MAX_DEPTH - 1
    assert parse(b'{"prompt":"x","a":' + b"[" * inner + b"]" * inner + b"}")
    assert parse(line(prompt="[" * 500 + "{" * 500))
    assert refused(b'{"prompt":"x","a":[' + b'{"b":' * inner + b"1" + b"}" * inner + b"]}").startswith("is nested")


def test_a_refusal_keeps_the_id_and_not_the_text() -> None:
    secret = "my prompt"
    with pytest.raises(InvalidLine) as caught:
        parse(line(custom_id="a", body={"messages": [{"role": secret, "content": [secret]}], "temperature": secret}))
    assert caught.value.custom_id == "a"
    assert secret not in str(caught.value)
    assert Problem("temperature", "must be a number") in caught.value.problems


def test_only_the_first_ten_problems_of_a_line_are_told() -> None:
    error = InvalidLine([Problem(f"f{number}", "is missing") for number in range(13)])
    assert str(error).endswith("f9: is missing; and 3 more")
    assert len(error.problems) == 13


def test_a_list_is_judged_to_its_first_bad_element() -> None:
    assert len(check(CHAT, {"messages": [0] * 100_000})) == 1


def test_repr_shows_no_text() -> None:
    assert "secret" not in repr(make_request("secret", model=None))


@pytest.mark.parametrize(
    "request_",
    ["hi", {"prompt": "hi"}, body(), {"method": "POST", "url": CHAT, "body": body()}, {"custom_id": "b", **body()}],
    ids=["text", "prompt", "bare", "batch", "own id"],
)
def test_make_request_takes_every_form(request_: Any) -> None:
    made = make_request(request_, model="m", custom_id="a")
    assert (made.endpoint, made.custom_id) == (CHAT, "a")
    assert json.loads(made.body) == {"model": "m", "messages": [USER]}


def test_make_request_takes_the_endpoint() -> None:
    made = make_request("hi", endpoint=MESSAGES, model=None)
    assert (made.endpoint, made.custom_id) == (MESSAGES, None)
    assert make_request({"url": CHAT, "body": body()}, endpoint=MESSAGES, model=None).endpoint == CHAT


def looped() -> dict[str, Any]:
    loop: dict[str, Any] = body()
    loop["x"] = loop
    return loop


def deep() -> dict[str, Any]:
    inner: list[Any] = []
    for _ in range(100_000):
        inner = [inner]
    return body(x=inner)


@pytest.mark.parametrize(
    ("request_", "problem"),
    [
        (body(temperature=1.9, top_p=0), "temperature: 1.9 is over 1.5; top_p: 0 is not over 0"),
        (body(seed=float("nan")), "holds a value that JSON has not"),
        (body(seed={1, 2}), "holds a value that JSON has not"),
        (looped(), "holds a value that JSON has not"),
        (deep(), "is nested too deeply, 100 levels are allowed"),
        ("\ud800", "holds half of a surrogate pair (\\ud800 to \\udfff), which no UTF-8 can hold"),
        ({}, "messages: is missing"),
    ],
    ids=["rules", "nan", "set", "loop", "deep", "surrogate", "empty"],
)
def test_make_request_refuses_in_one_line(request_: Any, problem: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        make_request(request_, model="m")
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_make_request_refuses_an_unknown_endpoint_and_a_bad_id() -> None:
    with pytest.raises(InvalidRequest, match="endpoint: /x is not supported"):
        make_request("hi", endpoint="/x", model=None)
    with pytest.raises(InvalidRequest, match="custom_id: must not hold control"):
        make_request("hi", model=None, custom_id="a\n")


TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
NUMBERS = st.integers(-(10**40), 10**40) | st.floats(allow_nan=False, allow_infinity=False)
SCALARS = st.none() | st.booleans() | NUMBERS | TEXT
OBJECTS = st.dictionaries(st.sampled_from(["type", "role", "ключ"]), SCALARS)
JSON = SCALARS | OBJECTS | st.lists(SCALARS | OBJECTS, max_size=3)


@settings(deadline=None)
@given(value=JSON, text=TEXT, ascii_only=st.booleans(), bare=st.booleans())
def test_values_are_sent_as_they_were_given(value: object, text: str, ascii_only: bool, bare: bool) -> None:
    fields = {"prompt": text, "seed": value}
    if not bare:
        fields = {"body": {"messages": [{"role": "user", "content": text}], "seed": value}}
    raw = json.dumps({"custom_id": "a", **fields}, ensure_ascii=ascii_only).encode()
    sent = parse(raw, model="m").request.body
    assert json.loads(sent) == {"model": "m", "messages": [{"role": "user", "content": text}], "seed": value}
    assert json.dumps(value, ensure_ascii=ascii_only).encode() in sent


FIELDS = st.sampled_from([*ChatBody.model_fields, *MessagesBody.model_fields])


@settings(deadline=None)
@given(st.sampled_from(ENDPOINTS), st.dictionaries(FIELDS, JSON), st.lists(JSON, max_size=2))
def test_any_value_of_any_field_is_judged_without_a_crash(
    endpoint: str, fields: dict[str, Any], messages: list[Any]
) -> None:
    for problem in check(endpoint, {**fields, "messages": messages}):
        assert problem.field
        assert "not valid" not in problem.message
