"""Calls that an SDK makes again by itself, because it did not hear what became of them.

Neither SDK names its calls; both count their retries. So a batch whose maker may not have heard of it is what the same call
made again finds, for a quarter of an hour; once the answer is sent to somebody who is there, calls alike are batches of
their own, retries too (their first try has made nothing: it was refused, or never arrived).
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Annotated, Any

from fastapi import Header, Response

from api.core import Core
from api.shapes import encode
from jobs.errors import MimoqError
from jobs.submission import heard

Retry = Annotated[
    str | None,
    Header(
        alias="x-stainless-retry-count",
        description="What SDKs count their retries in. Over 0: this call was made before, and finds what it made then.",
    ),
]


def is_retry(count: str | None) -> bool:
    """Whether an SDK says that it makes this call again."""
    return count is not None and count.isascii() and count.isdecimal() and count.strip("0") != ""


class Made(Response):
    """The answer that tells of a new batch, which is found by no call made again once it has been heard."""

    def __init__(self, core: Core, batch_id: str, shape: Any, status: int = 200) -> None:
        super().__init__(encode(shape), status, media_type="application/json")
        self._core = core
        self._batch_id = batch_id

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Sends it."""
        leaving = asyncio.create_task(gone(receive))
        try:
            for _ in range(3):  # rounds of the loop, in which one who has left is seen to have
                await asyncio.sleep(0)
            left = leaving.done()
            await super().__call__(scope, receive, send)
            if not left:
                with suppress(MimoqError):
                    await self._core.threads.call(lambda store: heard(store.client, self._batch_id))
        finally:
            leaving.cancel()


async def gone(receive: Any) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
