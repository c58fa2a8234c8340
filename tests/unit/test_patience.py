"""Patience with a store, on a clock of the test's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from jobs.errors import EmbeddedServerError, NotFound, StoreFull, StoreRefused, StoreUnavailable
from jobs.patience import LOOK_S, Patience, no_patience, patient

AWAY = StoreUnavailable("away")


class Stand:
    """A patience, what it said, and a clock that only its sleep moves."""

    def __init__(self, patience_s: float = 60.0, mend: Callable[[], object] = lambda: None) -> None:
        self.now = 1000.0
        self.said: list[str] = []
        self.patience = Patience(patience_s, self.said.append, mend, lambda: self.now, self._sleep)

    def _sleep(self, seconds: float) -> None:
        assert seconds == LOOK_S
        self.now += seconds

    def call(self, *answers: Any) -> Any:
        """What comes of a call that meets these one after the other, the last for ever."""
        left = list(answers)

        def work() -> Any:
            answer = left.pop(0) if len(left) > 1 else left[0]
            if isinstance(answer, BaseException):
                raise answer
            return answer

        return self.patience.call(work)


def test_one_line_when_it_begins_and_one_when_it_ends() -> None:
    stand = Stand()
    assert stand.call("at once") == "at once"
    assert stand.said == []
    assert stand.call(AWAY, AWAY, StoreFull("full"), "found") == "found"
    assert stand.said == ["waiting for the store: away", "the store answers again"]
    assert stand.now == 1000.0 + 3 * LOOK_S


def test_it_ends_with_the_last_error_after_its_time_and_the_next_wait_is_a_new_one() -> None:
    stand = Stand(60.0)
    for begun in (1000.0, 1060.0):
        assert stand.now == begun
        with pytest.raises(StoreUnavailable, match="still away"):
            stand.call(AWAY, StoreUnavailable("still away"))
    assert stand.said == ["waiting for the store: away"] * 2


def test_the_time_counts_from_when_it_was_asked() -> None:
    """A store that stands still says so only after a while."""
    stand = Stand(20.0)

    def silent() -> None:
        stand.now += 10
        raise AWAY

    with pytest.raises(StoreUnavailable):
        stand.patience.call(silent)
    assert stand.now == 1020 + LOOK_S


def test_one_who_was_away_long_ago_is_away_anew() -> None:
    stand = Stand(60.0)
    stand.patience.lost(AWAY)
    stand.now += 3600
    stand.patience.lost(AWAY)
    assert stand.said == ["waiting for the store: away"] * 2


def test_without_patience_nothing_is_said() -> None:
    stand = Stand(0.0)
    with pytest.raises(StoreUnavailable):
        stand.call(AWAY, "too late")
    with pytest.raises(StoreUnavailable):
        no_patience().call(stand.call, AWAY)
    assert stand.said == []


def test_what_waiting_does_not_mend_ends_it_at_once() -> None:
    stand = Stand()
    for first, last in (
        (StoreRefused("no"), "too late"),
        (AWAY, StoreRefused("no")),
        (AWAY, NotFound("no")),
        (AWAY, KeyboardInterrupt("no")),
    ):
        with pytest.raises(BaseException, match=r"^no$"):
            stand.call(first, last)
    assert stand.now == 1000.0 + 3 * LOOK_S


def test_what_is_away_is_mended_at_each_look() -> None:
    looks: list[int] = []

    def mend() -> None:
        looks.append(1)
        if len(looks) == 3:
            raise EmbeddedServerError("given up")

    with pytest.raises(EmbeddedServerError):
        Stand(mend=mend).call(AWAY)
    assert len(looks) == 3


def test_it_is_known_whether_the_last_question_was_answered() -> None:
    stand = Stand(0.1)
    for last, unanswered in (
        ("answer", False),
        (AWAY, True),
        (StoreFull("full"), False),
        (StoreRefused("no"), False),
        (NotFound("none"), False),
        (KeyboardInterrupt(), True),
    ):
        if isinstance(last, BaseException):
            with pytest.raises(type(last)):
                stand.call(last)
        else:
            stand.call(last)
        assert stand.patience.unanswered is unanswered


def test_a_wait_within_a_wait_is_one_wait() -> None:
    stand = Stand(60.0)

    class Owner:
        patience = stand.patience

        @patient
        def inner(self, error: Exception) -> int:
            raise error

        @patient
        def outer(self, error: Exception) -> int:
            """What it does."""
            return self.inner(error)

    with pytest.raises(StoreUnavailable):
        Owner().outer(AWAY)
    assert stand.now == 1060.0
    assert len(stand.said) == 1
    with pytest.raises(NotFound):
        Owner().outer(error=NotFound("none"))
    assert Owner.outer.__doc__ == "What it does."
