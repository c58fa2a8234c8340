"""The ways in which a call can go wrong, and which of them a call meets.

A kind is drawn from (seed, request, how often that request was asked before): it does not depend on the order in
which calls arrive, and a retry draws anew.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from random import Random
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from ops.simulator.config import Config


class Fault(msgspec.Struct, frozen=True):
    """A kind of fault: what the client sees, and whether the answer was made and billed all the same."""

    status: int  # 0: the client gets none
    message: str = ""  # of the error body, for those that have one
    type: str = ""
    paid: bool = False
    stream_only: bool = False  # other requests go unharmed

    @property
    def late(self) -> bool:
        """Whether it shows only when the answer was due; a gateway refuses at once."""
        return self.status in (0, 200, 408) or self.status >= 500


TOO_MANY = Fault(429, "Too many requests", "limitation")

FAULTS: dict[str, Fault] = {
    "400": Fault(400, "Param Incorrect", "invalid_request_error"),
    "400_backend": Fault(400, "finishConnect(..) failed: Connection refused", "upstream_error"),
    "401": Fault(401, "Invalid API Key", "authentication_error"),
    "402": Fault(402, "Insufficient account funds", "billing_error"),
    "403": Fault(403, "Access denied by risk control", "permission_error"),
    "404": Fault(404, "The model does not exist", "not_found_error"),
    "408": Fault(408, "Request timeout", "timeout_error"),
    "409": Fault(409, "Conflict", "conflict_error"),
    "421": Fault(421, "The request was rejected because it was considered high risk", "content_filter"),
    "425": Fault(425, "Too early", "invalid_request_error"),
    "429": TOO_MANY,
    "500": Fault(500, "Internal server error", "server_error"),
    "502": Fault(502, "Bad gateway", "server_error"),
    "503": Fault(503, "Service unavailable", "server_error"),
    "504": Fault(504, "Gateway timeout", "server_error"),
    "529": Fault(529, "Overloaded", "overloaded_error"),
    "reset": Fault(0),  # the connection is cut before the answer
    "stall": Fault(0),  # nothing comes until the client goes
    "not_json": Fault(200),  # a proxy's page in place of the answer
    "truncated": Fault(200, paid=True),  # JSON cut short in an otherwise whole response
    "thinking_only": Fault(200, paid=True),  # reasoning, no content
    "repetition": Fault(200, paid=True),  # finish_reason repetition_truncation
    "sse_error": Fault(200, "Internal server error", "server_error", stream_only=True),  # an error among the events
    "stream_cut": Fault(200, paid=True, stream_only=True),  # neither finish_reason nor [DONE]
}


class Dice:
    """Picks the fault of a call: by trigger, else by script, else by the rates."""

    def __init__(self, script: Iterable[str | None] = ()) -> None:
        self._script = deque(script)

    def load(self, script: Iterable[str | None]) -> None:
        """Replaces what is left of the script."""
        self._script = deque(script)

    def pick(self, config: Config, raw: bytes, digest: str, asked_before: int, *, stream: bool) -> str | None:
        """The kind of fault, or None for a good answer."""
        kind = self._pick(config, raw, digest, asked_before)
        return None if kind is None or (FAULTS[kind].stream_only and not stream) else kind

    def _pick(self, config: Config, raw: bytes, digest: str, asked_before: int) -> str | None:
        for text, kind in config.triggers.items():
            if text.encode() in raw:
                return kind
        if self._script:
            return self._script.popleft()
        if config.faults:
            left = Random(f"fault {config.seed} {digest} {asked_before}").random()
            for kind, rate in config.faults.items():
                left -= rate
                if left < 0:
                    return kind
        return None
