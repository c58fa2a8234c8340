"""The provider's limits, counted exactly: an account may start so many calls in any minute, and hold so many open."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ops.simulator.config import Config

MINUTE_S = 60.0


class Minute:
    """The calls of the last 60 seconds, `now - 60 < at <= now`, and the most that any such minute ever held."""

    def __init__(self) -> None:
        self._calls: deque[tuple[float, bool, int]] = deque()  # at, admitted, tokens
        self.admitted = 0
        self.tokens = 0
        self.most_asked = 0
        self.most_admitted = 0
        self.most_tokens = 0

    def forget(self, now: float) -> None:
        """Drops what is a minute old."""
        calls = self._calls
        while calls and calls[0][0] <= now - MINUTE_S:
            _, admitted, tokens = calls.popleft()
            self.admitted -= admitted
            self.tokens -= tokens

    def add(self, now: float, admitted: bool, tokens: int) -> None:
        self._calls.append((now, admitted, tokens))
        self.admitted += admitted
        self.tokens += tokens
        self.most_asked = max(self.most_asked, len(self._calls))
        self.most_admitted = max(self.most_admitted, self.admitted)
        self.most_tokens = max(self.most_tokens, self.tokens)

    def next_leaves_s(self, now: float) -> float:
        """Seconds until the oldest call leaves the minute; 0 for an empty one."""
        return max(0.0, self._calls[0][0] + MINUTE_S - now) if self._calls else 0.0


class Account:
    """What one key does on one model."""

    def __init__(self) -> None:
        self.minute = Minute()
        self.in_flight = 0

    def ask(self, now: float, tokens: int, config: Config) -> str | None:
        """Admits a call that bills `tokens` and takes its place in flight, or names the limit that refuses it."""
        minute = self.minute
        minute.forget(now)
        refused = None
        if config.rpm is not None and minute.admitted >= config.rpm:
            refused = "rpm"
        elif config.tpm is not None and minute.tokens + tokens > config.tpm:
            refused = "tpm"
        elif config.concurrency is not None and self.in_flight >= config.concurrency:
            refused = "concurrency"
        admitted = refused is None
        minute.add(now, admitted, tokens if admitted else 0)
        self.in_flight += admitted
        return refused

    def leave(self) -> None:
        """Ends an admitted call."""
        self.in_flight -= 1

    def headers(self, now: float, config: Config) -> dict[str, str]:
        """The x-ratelimit-* headers of the limits that are set."""
        minute = self.minute
        minute.forget(now)
        reset = f"{minute.next_leaves_s(now):.3f}s"
        headers = {}
        for name, limit, used in (("requests", config.rpm, minute.admitted), ("tokens", config.tpm, minute.tokens)):
            if limit is not None:
                headers[f"x-ratelimit-limit-{name}"] = str(limit)
                headers[f"x-ratelimit-remaining-{name}"] = str(max(0, limit - used))
                headers[f"x-ratelimit-reset-{name}"] = reset
        return headers
