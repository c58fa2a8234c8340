"""Answers that are streams: a tenant has so many open at once, and nobody on the way keeps or holds them back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi.responses import StreamingResponse

from api.auth import Caller
from api.core import Core

#: Streams that one tenant may follow at once.
TENANT_STREAMS = 100
#: What proxies are told of a stream: neither to keep it nor to hold it back.
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class Stream(StreamingResponse):
    """One of the streams that a tenant may have open at once."""

    def __init__(
        self,
        core: Core,
        caller: Caller,
        stream: AsyncIterator[bytes],
        media_type: str,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(stream, media_type=media_type, headers=HEADERS | (headers or {}))
        self._turn = core.turns.now(caller.tenant, "streams", TENANT_STREAMS)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Sends it. Raises a `Problem` (429) before anything is sent."""
        with self._turn:
            await super().__call__(scope, receive, send)
