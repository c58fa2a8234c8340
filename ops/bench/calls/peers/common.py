"""What the scripts of the peers share: arguments `URL BODIES NUMBER CONCURRENCY`, and calls made so many at once.

Everything in this folder runs in an environment of its own, so it imports nothing of the project.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

#: Seconds that one call may take: none should end because the machine is slow.
TIMEOUT_S = 120.0
KEY = "bench"


class Load(NamedTuple):
    """What to do: `number` calls of `url`, `concurrency` at once, their bodies a line each in a file."""

    url: str
    bodies: Path
    number: int
    concurrency: int
    how: str = ""

    def each(self) -> Iterator[dict[str, Any]]:
        """The bodies, read as they are needed."""
        with self.bodies.open("rb") as lines:
            for line in itertools.islice(lines, self.number):
                yield json.loads(line)


def load(*ways: str) -> Load:
    """From the arguments; the last of them is one of `ways`, if there are any."""
    end_with_stdin()
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("bodies", type=Path)
    parser.add_argument("number", type=int)
    parser.add_argument("concurrency", type=int)
    if ways:
        parser.add_argument("how", choices=ways)
    return Load(**vars(parser.parse_args()))


def end_with_stdin() -> None:
    """Ends this process when the harness is gone, however it went: it holds the other end."""

    def watch() -> None:
        while os.read(0, 65_536):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


async def call_all(load: Load, call: Callable[[dict[str, Any]], Awaitable[object]]) -> None:
    """Makes all calls."""
    bodies = load.each()

    async def work() -> None:
        for body in bodies:
            await call(body)

    await asyncio.gather(*(work() for _ in range(load.concurrency)))
