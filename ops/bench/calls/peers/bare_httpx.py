"""A loop over httpx with aiohttp as its transport that does nothing but call and parse; `streamed` joins the pieces."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
from common import KEY, TIMEOUT_S, Load, call_all, load  # type: ignore[import-not-found]  # found as a script
from httpx_aiohttp import AiohttpTransport

DATA = b"data: "
END = b"data: [DONE]"


async def main(load: Load) -> None:
    """Makes the calls."""
    # Without a number there, None, it would silently be 100.
    limits = httpx.Limits(max_connections=load.concurrency, max_keepalive_connections=load.concurrency)
    url, headers = f"{load.url}/v1/chat/completions", {"Authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(transport=AiohttpTransport(limits=limits), timeout=TIMEOUT_S) as client:

        async def call(body: dict[str, Any]) -> object:
            response = await client.post(url, json=body, headers=headers)
            response.raise_for_status()
            return response.json()

        async def call_streamed(body: dict[str, Any]) -> object:
            response = await client.post(url, json=body | {"stream": True}, headers=headers)
            response.raise_for_status()
            return joined(response.content)

        await call_all(load, call_streamed if load.how == "streamed" else call)


def joined(stream: bytes) -> str:
    """The text of a stream."""
    texts = []
    for line in stream.split(b"\n"):
        if line.startswith(DATA) and line != END:
            texts += [choice["delta"].get("content") or "" for choice in json.loads(line[len(DATA) :])["choices"]]
    return "".join(texts)


if __name__ == "__main__":
    asyncio.run(main(load("whole", "streamed")))
