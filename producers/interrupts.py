"""Ctrl-C and SIGTERM as a run understands them: once to end well, again to leave now."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any


class Interrupts:
    """Counts the signals; while `following` is off there is nothing to end well, and the first raises."""

    def __init__(self) -> None:
        self.count = 0
        self.following = False
        self._terminated = False

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Takes the signals over for the length of a block."""
        before = {number: signal.signal(number, self._hear) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, _: Any) -> None:
        self.count += 1
        self._terminated = number == signal.SIGTERM
        if not self.following or self.count > 2:
            raise KeyboardInterrupt

    @property
    def status(self) -> int:
        """The exit status that says so."""
        return 143 if self._terminated else 130
