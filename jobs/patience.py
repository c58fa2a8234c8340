"""Waiting for a store that is away: with a line for people at once, for a set time, then with its error.

Whatever is tried again here must be idempotent: an answer that was lost does not say whether the work was done.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from jobs.errors import StoreFull, StoreRefused, StoreUnavailable

P = ParamSpec("P")
T = TypeVar("T")

#: Seconds between two looks at a store that is away.
LOOK_S = 0.25
#: Seconds between two failures that are not of one absence; a call of a silent store takes 10.
STALE_S = 15.0


def _nothing() -> None:
    """Nothing to mend."""


class Patience:
    """How long one user of a store waits while it is away, and what is said meanwhile. For one thread.

    `say` gets one line when a wait begins and one when it ends well; `mend` is called at each look and may raise what
    ends the wait. `clock` and `sleep` are seconds, as of `time`.
    """

    def __init__(
        self,
        patience_s: float,
        say: Callable[[str], object],
        mend: Callable[[], object] = _nothing,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._patience_s = patience_s
        self._say = say
        self._mend = mend
        self._clock = clock
        self._sleep = sleep
        self._since: float | None = None
        self._lost_at = 0.0
        self._calling = False
        self.unanswered = False
        """Whether what was last asked of the store by `call` got no answer, be it that somebody broke off the wait."""

    def found(self) -> None:
        """The store answers."""
        if self._since is not None:
            self._since = None
            self._say("the store answers again")

    def lost(self, error: StoreUnavailable, asked_at: float | None = None) -> None:
        """It does not, asked then or now. Raises the error once the time is over; at once where waiting would not help."""
        now = self._clock()
        # One who was away long ago, and was not asked since, is away anew.
        begins = self._since is None or now - self._lost_at > STALE_S
        if self._since is None or begins:
            self._since = now if asked_at is None else asked_at
        self._lost_at = now
        if isinstance(error, StoreRefused) or now - self._since >= self._patience_s:
            self._since = None
            raise error
        if begins:
            self._say(f"waiting for the store: {error}")
        self._mend()

    def call(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `work` returns, tried again while it raises `StoreUnavailable`, which comes through in the end."""
        if self._calling:  # one wait at a time, however the work is made up
            return work(*args, **kwargs)
        self._calling = True
        try:
            while True:
                self.unanswered = True
                asked_at = self._clock()
                try:
                    answer = work(*args, **kwargs)
                except StoreUnavailable as error:
                    self.unanswered = not isinstance(error, StoreFull | StoreRefused)
                    self.lost(error, asked_at)
                    self._sleep(LOOK_S)
                except Exception:
                    self._answered()
                    raise
                else:
                    self._answered()
                    return answer
        finally:
            self._calling = False

    def _answered(self) -> None:
        self.found()
        self.unanswered = False


def no_patience() -> Patience:
    """Of who does not wait."""
    return Patience(0.0, lambda line: None)


class Patient(Protocol):
    """What has a patience."""

    patience: Patience


Owner = TypeVar("Owner", bound=Patient)


def patient(method: Callable[Concatenate[Owner, P], T]) -> Callable[Concatenate[Owner, P], T]:
    """Makes a method wait for the store as its object's `patience` says."""

    @functools.wraps(method)
    def call(owner: Owner, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return owner.patience.call(method, owner, *args, **kwargs)

    return call
