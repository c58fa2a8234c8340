"""The Lua scripts: found by name, put together, sent by their digest and whole where that is unknown."""

from __future__ import annotations

import asyncio
import hashlib
from importlib import resources
from typing import Any

import pytest
from redis.exceptions import NoScriptError

from jobs.scripts import INCLUDE, Script, source

#: No scripts of their own.
INCLUDED = {"common.lua", "creating.lua", "joining.lua", "handing.lua", "limits.lua", "adapt.lua"}
NAMES = [
    (package, path.name.removesuffix(".lua"))
    for package in ("jobs", "worker")
    for path in resources.files(package).joinpath("lua").iterdir()
    if path.name.endswith(".lua") and path.name not in INCLUDED
]
#: They store what was paid for, or free room; all others are refused when Redis is out of memory.
ALWAYS = {
    "finish",
    "store",
    "give_back",
    "beat",
    "lock",
    "reap",
    "sweep",
    "retention",
    "audit",
    "cancel",
    "pause",
    "join",
    "openai_take",
    "openai_mark",
    "openai_made",
    "openai_renew",
    "heard",
    "openai_fail",
    "openai_finalize",
    "delete",
    "outbox_take",
    "outbox_settle",
    "outbox_list",
    "followups_take",
    "followups_settle",
    "settle",
    "take_message",
}


class FakeClient:
    """Knows no script until it was sent whole."""

    def __init__(self) -> None:
        self.known: set[str] = set()
        self.sent: list[tuple[Any, ...]] = []

    def evalsha(self, sha: str, *rest: Any) -> str:
        if sha not in self.known:
            raise NoScriptError("NOSCRIPT")
        self.sent.append(("sha", *rest))
        return "by digest"

    def eval(self, text: str, *rest: Any) -> str:
        self.known.add(hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())
        self.sent.append(("text", *rest))
        return "whole"


class FakeAsyncClient:
    def __init__(self) -> None:
        self.inner = FakeClient()

    async def __aenter__(self) -> FakeAsyncClient:
        return self

    async def evalsha(self, *args: Any) -> str:
        return self.inner.evalsha(*args)

    async def eval(self, *args: Any) -> str:
        return self.inner.eval(*args)


@pytest.mark.parametrize(("package", "name"), NAMES)
def test_every_script_is_whole_and_tells_its_keys(package: str, name: str) -> None:
    text = source(package, name)
    assert INCLUDE not in text
    assert "-- KEYS[1]" in text
    assert "-- Returns" in text
    assert text.startswith("#!lua flags=allow-oom\n") == (name in ALWAYS)
    assert text.count("local function now()") <= 1


def test_a_script_is_sent_by_its_digest_and_whole_when_that_is_unknown() -> None:
    client, script = FakeClient(), Script("claim")
    assert script(client, ["k1", "k2"], [1, "a"]) == "whole"
    assert script(client, ["k1", "k2"], [1, "a"]) == "by digest"
    assert client.sent == [("text", 2, "k1", "k2", 1, "a"), ("sha", 2, "k1", "k2", 1, "a")]
    assert repr(script) == "Script('claim')"


def test_the_same_on_an_async_client() -> None:
    async def main() -> None:
        client, script = FakeAsyncClient(), Script("reserve", "worker")
        assert [await script(client, ["k"], []), await script(client, ["k"], [])] == ["whole", "by digest"]

    asyncio.run(main())
