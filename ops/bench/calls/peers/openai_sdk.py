"""OpenAI's SDK, as it comes, or with its aiohttp client."""

from __future__ import annotations

import asyncio
from typing import Any

from common import KEY, TIMEOUT_S, Load, call_all, load  # type: ignore[import-not-found]  # found as a script
from openai import AsyncOpenAI, DefaultAioHttpClient


async def main(load: Load) -> None:
    """Makes the calls."""
    http_client = DefaultAioHttpClient() if load.how == "aiohttp" else None
    async with AsyncOpenAI(
        base_url=f"{load.url}/v1", api_key=KEY, max_retries=0, timeout=TIMEOUT_S, http_client=http_client
    ) as client:

        async def call(body: dict[str, Any]) -> object:
            return await client.chat.completions.create(**body)

        await call_all(load, call)


if __name__ == "__main__":
    asyncio.run(main(load("plain", "aiohttp")))
