"""States, their letters, and the ids of jobs."""

from __future__ import annotations

import pytest

from jobs.states import LETTERS, TERMINAL, JobState, job_id, split_job_id


def test_every_terminal_state_has_a_letter_of_its_own() -> None:
    assert {state for state in JobState if state.terminal} == set(LETTERS) == set(TERMINAL.values())
    assert {state for state in JobState if not state.terminal} == {JobState.QUEUED, JobState.RUNNING}
    assert {LETTERS[state] for state in LETTERS} == {b"s", b"f", b"c", b"x"}
    assert all(TERMINAL[letter[0]] is state for state, letter in LETTERS.items())


@pytest.mark.parametrize(("batch", "index"), [("abc", 0), ("a-b-c", 12), ("0f", 999_999)])
def test_a_job_id_and_back(batch: str, index: int) -> None:
    assert split_job_id(job_id(batch, index)) == (batch, index)


@pytest.mark.parametrize("text", ["", "abc", "-1", "abc-", "abc-x", "abc-1x", "abc-\u0663", "abc- 1", "abc-+1"])
def test_what_is_no_job_id(text: str) -> None:
    with pytest.raises(ValueError, match="looks like"):
        split_job_id(text)
