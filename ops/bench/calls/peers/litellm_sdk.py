"""LiteLLM's `acompletion`; its list of prices is the one it carries, so it fetches none."""

from __future__ import annotations

import asyncio
import os
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm  # type: ignore[import-not-found]  # is in the peer's environment alone
from common import KEY, TIMEOUT_S, Load, call_all, load  # type: ignore[import-not-found]  # found as a script


async def main(load: Load) -> None:
    """Makes the calls."""
    litellm.telemetry = False

    async def call(body: dict[str, Any]) -> object:
        more = {"api_base": f"{load.url}/v1", "api_key": KEY, "num_retries": 0, "max_retries": 0, "timeout": TIMEOUT_S}
        return await litellm.acompletion(**(body | {"model": f"openai/{body['model']}"}), **more)

    await call_all(load, call)


if __name__ == "__main__":
    asyncio.run(main(load()))
