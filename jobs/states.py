"""The states of jobs and batches, and the letters the store keeps for a job's end."""

from __future__ import annotations

from enum import StrEnum


class JobState(StrEnum):
    """`queued → running → succeeded | failed | cancelled | expired`; back to `queued` when given back."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def terminal(self) -> bool:
        return self in LETTERS


class BatchState(StrEnum):
    """`submitting → running ⇄ paused → finished`, `cancelling` on the way."""

    SUBMITTING = "submitting"
    RUNNING = "running"
    PAUSED = "paused"
    CANCELLING = "cancelling"
    FINISHED = "finished"


#: The byte a terminal state has in a batch's `states` string.
LETTERS = {
    JobState.SUCCEEDED: b"s",
    JobState.FAILED: b"f",
    JobState.CANCELLED: b"c",
    JobState.EXPIRED: b"x",
}
TERMINAL = {letter[0]: state for state, letter in LETTERS.items()}


def job_id(batch_id: str, index: int) -> str:
    """A job's id: its batch's id, a hyphen, its index."""
    return f"{batch_id}-{index}"


def split_job_id(job_id: str) -> tuple[str, int]:
    """`(batch id, index)`; raises `ValueError` when it is not a job's id."""
    batch_id, _, index = job_id.rpartition("-")
    if not batch_id or not index.isascii() or not index.isdigit() or (index[0] == "0" and index != "0"):
        raise ValueError("a job id looks like <batch id>-<index>")
    return batch_id, int(index)
