"""A loop over aiohttp that does nothing but call and parse."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
from common import KEY, TIMEOUT_S, Load, call_all, load  # type: ignore[import-not-found]  # found as a script


async def main(load: Load) -> None:
    """Makes the calls."""
    url = f"{load.url}/v1/chat/completions"
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=load.concurrency),
        timeout=aiohttp.ClientTimeout(TIMEOUT_S),
        headers={"Authorization": f"Bearer {KEY}"},
    ) as session:

        async def call(body: dict[str, Any]) -> object:
            async with session.post(url, json=body) as response:
                response.raise_for_status()
                return await response.json()

        await call_all(load, call)


if __name__ == "__main__":
    asyncio.run(main(load()))
