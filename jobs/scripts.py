"""Loads the Lua scripts by name and runs them on a sync or an async Redis client.

`--!include name.lua` in a script stands for that file's text. A script that Redis has forgotten (it was restarted) is
sent again by redis-py itself.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from importlib import resources
from typing import Any, NamedTuple

INCLUDE = "--!include "


@functools.cache
def source(package: str, name: str) -> str:
    """The whole text of a script, its includes put in; `package` is `jobs` or `worker`."""
    text = resources.files(package).joinpath("lua", f"{name}.lua").read_text(encoding="utf-8")
    lines = []
    for line in text.splitlines():
        if line.startswith(INCLUDE):
            lines.append(source(package, line.removeprefix(INCLUDE).strip().removesuffix(".lua")))
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


class Script:
    """One script; call it with a client (redis-py, sync or async), keys and arguments."""

    __slots__ = ("name", "sha", "text")

    def __init__(self, name: str, package: str = "jobs") -> None:
        self.name = name
        self.text = source(package, name)
        self.sha = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()

    def __repr__(self) -> str:
        return f"Script({self.name!r})"

    def __call__(self, client: Any, keys: list[str], args: list[Any]) -> Any:
        """The script's reply; on an async client, an awaitable of it."""
        from redis.exceptions import NoScriptError

        if hasattr(client, "__aenter__"):
            return self._call_async(client, keys, args)
        try:
            return client.evalsha(self.sha, len(keys), *keys, *args)
        except NoScriptError:
            return client.eval(self.text, len(keys), *keys, *args)

    async def _call_async(self, client: Any, keys: list[str], args: list[Any]) -> Any:
        from redis.exceptions import NoScriptError

        try:
            return await client.evalsha(self.sha, len(keys), *keys, *args)
        except NoScriptError:
            return await client.eval(self.text, len(keys), *keys, *args)


class Call(NamedTuple):
    """A script with what it is called with."""

    script: Script
    keys: list[str]
    args: list[Any]


async def call_all(client: Any, calls: Sequence[Call]) -> list[Any]:
    """The replies of these scripts, called in this order in one round trip of an async client; not one transaction.

    Those that the server does not know, as after its restart, are called again, and no other: where results live elsewhere
    the end of a job would count twice.
    """
    from redis.exceptions import NoScriptError

    pipe = client.pipeline(transaction=False)
    for script, names, args in calls:
        pipe.evalsha(script.sha, len(names), *names, *args)
    replies: list[Any] = await pipe.execute(raise_on_error=False)
    for place, reply in enumerate(replies):
        if isinstance(reply, NoScriptError):
            script, names, args = calls[place]
            replies[place] = await script(client, names, args)
        elif isinstance(reply, Exception):
            raise reply
    return replies
