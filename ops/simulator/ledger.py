"""What the simulator was asked and what it was paid.

Totals and one counter per distinct request are kept for ever, single calls up to a cap (a file can have them all), so
a million calls stay near 120 MB. Bodies and keys are never kept.
"""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import msgspec


class Call(msgspec.Struct, kw_only=True):
    """One call, from its arrival on."""

    number: int  # from 1, in order of arrival
    at: float  # Unix seconds of its arrival
    path: str
    digest: str = ""  # of its body without the stream switches, see `asks.digest`; empty when it had no valid body
    tag: Any = None  # the body's `metadata`, else its `user`
    stream: bool = False
    in_flight: int = 0  # calls in flight when it was admitted, itself among them
    status: int = 0  # 0: none was sent
    fault: str | None = None  # kind of fault, or `rpm`, `tpm`, `concurrency`, `down`
    paid: bool = False  # an answer was made and billed, delivered or not
    prompt_tokens: int = 0  # billed ones
    completion_tokens: int = 0
    delivered: bool = False  # the response went out whole to a client that was still there
    retry_after: float | None = None  # seconds that its Retry-After told
    end: float = 0.0  # Unix seconds of its end


class Totals(msgspec.Struct, kw_only=True):
    """Sums over all calls."""

    calls: int = 0  # that ended
    arrived: int = 0
    in_flight: int = 0  # now; refused calls never are
    max_in_flight: int = 0
    answered: int = 0  # good answers, delivered whole
    refused: int = 0  # by rpm, tpm or concurrency
    by_status: Counter[str] = msgspec.field(default_factory=Counter)
    by_fault: Counter[str] = msgspec.field(default_factory=Counter)
    paid: int = 0  # answers
    paid_again: int = 0  # answers to a request that was paid before
    prompt_tokens: int = 0  # billed
    completion_tokens: int = 0
    total_tokens: int = 0
    # The most in any sliding minute of one account and model.
    max_minute_asked: int = 0
    max_minute_admitted: int = 0
    max_minute_tokens: int = 0


class Ledger:
    """`on_change` is called whenever a call arrives, is admitted or ends."""

    def __init__(self, file: str | None = None, keep_calls: int = 10_000) -> None:
        # A descriptor, for a line must not wait in a buffer when the process is killed.
        self._file = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600) if file else None
        self._encoder = msgspec.json.Encoder()
        self._number = 0
        self.on_change: Callable[[], None] = lambda: None
        self.totals = Totals()
        self.paid: Counter[str] = Counter()  # answers by digest
        self._unpaid: Counter[str] = Counter()
        self.calls: deque[Call] = deque(maxlen=keep_calls)

    def reset(self) -> None:
        """Forgets everything but the numbering, the file and what is in flight."""
        in_flight = self.totals.in_flight
        self.totals = Totals(in_flight=in_flight, max_in_flight=in_flight)
        self.paid.clear()
        self._unpaid.clear()
        self.calls.clear()

    def arrive(self, path: str) -> Call:
        self._number += 1
        self.totals.arrived += 1
        self.on_change()
        return Call(number=self._number, at=time.time(), path=path)

    def asked_before(self, digest: str) -> int:
        """Calls with this digest that have ended."""
        # `get`, because a Counter's own lookup of a missing key is a slow Python call.
        return self.paid.get(digest, 0) + self._unpaid.get(digest, 0)

    def admit(self, call: Call) -> None:
        totals = self.totals
        totals.in_flight += 1
        totals.max_in_flight = max(totals.max_in_flight, totals.in_flight)
        call.in_flight = totals.in_flight
        self.on_change()

    def end(self, call: Call) -> None:
        """Books a call that is over."""
        call.end = time.time()
        totals = self.totals
        totals.calls += 1
        totals.in_flight -= call.in_flight > 0
        status = str(call.status)
        totals.by_status[status] = totals.by_status.get(status, 0) + 1
        if call.fault is not None:
            totals.by_fault[call.fault] = totals.by_fault.get(call.fault, 0) + 1
            totals.refused += call.fault in ("rpm", "tpm", "concurrency")
        elif call.status == 200 and call.delivered:
            totals.answered += 1
        if call.paid:
            before = self.paid.get(call.digest, 0)
            self.paid[call.digest] = before + 1
            totals.paid += 1
            totals.paid_again += before > 0
            totals.prompt_tokens += call.prompt_tokens
            totals.completion_tokens += call.completion_tokens
            totals.total_tokens += call.prompt_tokens + call.completion_tokens
        elif call.digest:
            self._unpaid[call.digest] = self._unpaid.get(call.digest, 0) + 1
        self.calls.append(call)
        if self._file is not None:
            os.write(self._file, self._encoder.encode(call) + b"\n")
        self.on_change()

    def view(self, *, whole: bool = True) -> dict[str, Any]:
        """`{"totals": {...}}`, and if `whole` also `"paid": {digest: answers}` and `"calls": [newest ...]`."""
        view: dict[str, Any] = {"totals": msgspec.to_builtins(self.totals)}
        if whole:
            view |= {"paid": dict(self.paid), "calls": msgspec.to_builtins(list(self.calls))}
        return view

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
