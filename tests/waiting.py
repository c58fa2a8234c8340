"""Waiting for what a test expects to come about, instead of for time to pass."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

POLL_S = 0.01


def wait_for(look: Callable[[], T], timeout_s: float = 20.0, what: str = "") -> T:
    """The first true value of `look`; raises AssertionError, with `what` was expected, when none came in time."""
    deadline = time.monotonic() + timeout_s
    while not (value := look()):
        if time.monotonic() > deadline:
            raise AssertionError(f"did not come about within {timeout_s:g} s: {what or look!r}; last seen: {value!r}")
        time.sleep(POLL_S)
    return value
