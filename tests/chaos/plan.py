"""The plan: everything that will happen, and when, from a seed alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from random import Random
from typing import Any, NamedTuple

from jobs.requests import CHAT, MESSAGES
from ops.simulator.asks import DEFAULT_MODEL

#: The lane of each worker's place.
LANES = ("bulk", "bulk", "interactive", "interactive")

#: Jobs of a batch, at most.
MOST_JOBS = 400
#: A request with this text is refused for good (421).
REFUSED = "[refuse]"


class Batch(NamedTuple):
    """A batch to be submitted."""

    number: int
    jobs: int
    lane: str
    endpoint: str
    stream: bool
    deadline_s: float | None

    @property
    def key(self) -> str:
        """Its idempotency key."""
        return f"chaos-{self.number}"

    def requests(self) -> Iterator[dict[str, Any]]:
        """Its requests; the custom id of each is also what the ledger knows its calls by."""
        for index in range(self.jobs):
            tag = f"b{self.number}-{index}"
            text = f"Say {tag}. " + "word " * (index % 40)
            if self.number % 3 == 0 and index % 40 == 7:
                text += REFUSED
            body: dict[str, Any] = {
                "model": DEFAULT_MODEL,
                "messages": [{"role": "user", "content": text}],
                "metadata": {"job": tag},
            }
            if self.endpoint == MESSAGES:
                body["max_tokens"] = 2048
            if self.stream:
                body["stream"] = True
            yield {"custom_id": tag, "method": "POST", "url": self.endpoint, "body": body}


class Event(NamedTuple):
    """What happens so many seconds after the start: to which worker or batch, and for how long."""

    at_s: float
    kind: str
    target: int = 0
    seconds: float = 0.0
    twice: bool = False
    """Of a submit that is killed: it is made again."""


class _Kind(NamedTuple):
    every_s: float  # on average
    seconds: Callable[[Random], float]


def _between(least: float, most: float) -> Callable[[Random], float]:
    return lambda random: random.uniform(least, most)


def _pause_s(random: Random) -> float:
    """Most pauses are short, some far longer than a lease."""
    return random.uniform(12, 30) if random.random() < 0.1 else random.uniform(0.5, 8)


#: `seconds` is how long it lasts, of a kill how long until another worker starts, of `submit_killed` when the kill comes.
KINDS = {
    "kill": _Kind(9, _between(0, 3)),
    "suspend": _Kind(14, _between(0.5, 6)),
    "suspend_long": _Kind(35, _between(12, 16)),
    "drain": _Kind(14, _between(0, 0)),
    "redis_kill": _Kind(25, _between(0.1, 4)),
    "redis_pause": _Kind(25, _pause_s),
    "wipe": _Kind(12, _between(0, 0)),
    "outage_503": _Kind(25, _between(0.5, 5)),
    "outage_refuse": _Kind(25, _between(0.5, 5)),
    "cut": _Kind(10, _between(0, 0)),
    "submit": _Kind(0.8, _between(0, 0)),
    "submit_killed": _Kind(6, _between(0, 0.15)),
}
CANCELLED = 0.12  # of batches


class Plan(NamedTuple):
    """`events` in the order of their times, `batches` by number."""

    seed: int
    seconds: float
    events: list[Event]
    batches: list[Batch]

    @classmethod
    def of(cls, seed: int, seconds: float) -> Plan:
        """The plan of a seed."""
        random = Random(f"chaos {seed}")
        events: list[Event] = []
        batches: list[Batch] = []
        for kind, (every_s, lasts) in KINDS.items():
            # The first one comes early, so that a short plan has some of everything.
            at = random.uniform(0, min(every_s, 0.6 * seconds))
            while at < seconds:
                target = random.randrange(len(LANES))
                twice = random.random() < 0.75
                if kind in ("submit", "submit_killed"):
                    target = len(batches)
                    batches.append(_batch(random, target))
                    if random.random() < CANCELLED:
                        events.append(Event(at + random.uniform(0.1, 6), "cancel", target))
                events.append(Event(at, kind, target, lasts(random), twice))
                at += random.expovariate(1 / every_s)
        return cls(seed, seconds, sorted(events), batches)


def _batch(random: Random, number: int) -> Batch:
    jobs = max(1, round(math.exp(random.uniform(0, math.log(MOST_JOBS)))))
    interactive = random.random() < 0.3
    if interactive:
        jobs = min(jobs, 20)
    endpoint = MESSAGES if random.random() < 0.2 else CHAT
    stream = endpoint == CHAT and random.random() < 0.3
    deadline_s = random.uniform(2, 20) if random.random() < 0.1 else None
    return Batch(number, jobs, "interactive" if interactive else "bulk", endpoint, stream, deadline_s)
