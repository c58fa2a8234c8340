"""What a simulator is told: at its start, and later through `/_sim/config`."""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from ops.simulator.faults import FAULTS

Count = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(ge=0)]

# Fixed when the simulator starts: the rest can change while it runs.
AT_START_ONLY = frozenset({"host", "port", "key", "seed", "ledger", "keep_calls", "text"})


class ConfigError(ValueError):
    """A value that the simulator refuses; the message is one line."""


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every knob of the simulator; make one with `configure`, which checks it."""

    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 0
    key: str | None = None  # None: any key will do, but there must be one
    seed: int = 0
    ledger: str | None = None  # file that gets one JSON line a call
    keep_calls: Annotated[int, Meta(ge=0)] = 10_000  # newest calls listed by /_sim/ledger; the file has all

    latency: Seconds = 0.2  # of a call; the median when latency_p99 is set
    latency_p99: Seconds | None = None  # makes latencies log-normal with this 99th percentile
    answer_bytes: Count = 1700  # of a response that is not streamed, roughly
    text: str | None = None  # file in UTF-8 that answers are cut from, instead of being made of a few phrases
    stream_events: Count = 40  # pieces of text in a streamed answer

    rpm: Count | None = None  # all three per account and model
    tpm: Count | None = None
    concurrency: Count | None = None
    retry_after: Seconds | None = None  # Retry-After of every 429, 503 and 529
    limit_headers: bool = False  # x-ratelimit-* on answers and refusals

    faults: dict[str, float] = {}  # kind to its share of calls
    triggers: dict[str, str] = {}  # a text in the body to the kind that such a call always meets
    script: list[str | None] = []  # of the next calls with a valid body, in turn; None is a good answer
    down: Literal["503", "refuse"] | None = None  # an outage: 503 to all, or no listening socket
    down_s: Seconds | None = None  # ends the outage by itself
    hold: bool = False  # answers wait until this is false again

    def __post_init__(self) -> None:
        if not is_loopback(self.host):
            raise ValueError("host must be a loopback address: the simulator is for this machine alone")
        times = (self.latency, self.latency_p99, self.retry_after, self.down_s)
        if not all(math.isfinite(seconds) for seconds in times if seconds is not None):
            raise ValueError("times must be finite")
        if self.latency_p99 is not None and not 0 < self.latency <= self.latency_p99:
            raise ValueError("latency_p99 needs a latency over 0 and must not be under it")
        for kind in {*self.faults, *self.triggers.values(), *(k for k in self.script if k is not None)}:
            if kind not in FAULTS:
                raise ValueError(f"no fault is called {kind[:40]!r}; there are {', '.join(FAULTS)}")
        if not all(0 <= rate <= 1 for rate in self.faults.values()) or sum(self.faults.values()) > 1 + 1e-9:
            raise ValueError("fault rates are shares from 0 to 1, and 1 at most together")
        if "" in self.triggers:
            raise ValueError("a trigger needs a text")
        if self.text is not None and not _readable(self.text):
            raise ValueError("text must be a file in UTF-8 that is not empty")

    def __repr__(self) -> str:
        return f"<Config of the simulator on {self.host}:{self.port}>"  # the key stays out of logs and tracebacks

    def public(self) -> dict[str, Any]:
        """Everything but the key."""
        return {name: value for name, value in msgspec.structs.asdict(self).items() if name != "key"}


def configure(values: Mapping[str, Any], base: Config | None = None) -> Config:
    """A checked `Config` of `values`; with `base`, that one changed while it runs. Raises `ConfigError`."""
    known: dict[str, Any] = {}
    if base is not None:
        known = msgspec.structs.asdict(base)
        fixed = AT_START_ONLY.intersection(values)
        if fixed:
            raise ConfigError(f"{', '.join(sorted(fixed))} can be set at the start only")
    try:
        return msgspec.convert({**known, **values}, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(_said(str(error))) from None


def _said(message: str) -> str:
    """`Expected `int` >= 1 - at `$.rpm`` as `rpm: expected int >= 1`."""
    rule, _, where = message.replace("`", "").partition(" - at $")
    name = where.lstrip(".")
    return f"{name}: {rule[:1].lower()}{rule[1:]}" if name else rule


@cache
def read_text(path: str) -> str:
    """What answers are cut from, read once. Raises OSError, and ValueError for what is not UTF-8."""
    return Path(path).read_text("utf-8")


def _readable(path: str) -> bool:
    try:
        return bool(read_text(path).strip())
    except (OSError, ValueError):
        return False


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
