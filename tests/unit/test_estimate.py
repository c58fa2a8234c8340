"""Estimates of tokens: begun cautiously, learned from real usage, bounded in number."""

from __future__ import annotations

import pytest

import worker.estimate
from jobs.leases import Job
from jobs.requests import CHAT, Request
from jobs.results import Usage
from worker.estimate import FIRST_COMPLETION, Estimates
from worker.run import Run


def run_of(size: int = 400, batch: str = "b", fields: str = "") -> Run:
    """A run whose body has so many bytes."""
    body = f'{{"model":"m",{fields}"x":""}}'.encode()
    body = body[:-2] + b"." * (size - len(body)) + body[-2:]
    assert len(body) == size
    return Run.of(Job(batch, 0, "t", Request(CHAT, body, None), b"", 0, None, 60), "default")


def test_begins_with_four_bytes_a_token_and_a_usual_answer() -> None:
    assert Estimates().of(run_of(400)) == 100 + FIRST_COMPLETION


@pytest.mark.parametrize("field", ["max_completion_tokens", "max_tokens"])
def test_the_bodys_own_limit_bounds_the_answer_but_does_not_raise_it(field: str) -> None:
    assert Estimates().of(run_of(400, fields=f'"{field}":10,')) == 110
    assert Estimates().of(run_of(400, fields=f'"{field}":131072,')) == 100 + FIRST_COMPLETION


def test_learns_prompts_by_model_and_answers_by_batch() -> None:
    estimates = Estimates()
    estimates.learn(run_of(400), Usage(prompt_tokens=200, completion_tokens=50))
    assert estimates.of(run_of(400)) == 250
    assert estimates.of(run_of(400, batch="other")) == 200 + FIRST_COMPLETION
    for _ in range(200):
        estimates.learn(run_of(400), Usage(prompt_tokens=100, completion_tokens=1000))
    assert estimates.of(run_of(400)) == pytest.approx(1100, rel=0.01)


def test_nothing_is_learned_from_no_usage() -> None:
    estimates = Estimates()
    estimates.learn(run_of(400), Usage())
    assert estimates.of(run_of(400)) == 100 + FIRST_COMPLETION


def test_is_at_least_one() -> None:
    estimates = Estimates()
    estimates.learn(run_of(400), Usage(prompt_tokens=1, completion_tokens=1))
    estimates._completion["b"] = 0.0
    assert estimates.of(run_of(40)) == 1


def test_forgets_the_longest_unheard_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker.estimate, "KEPT", 2)
    estimates = Estimates()
    for batch in ("a", "b", "a", "c"):
        estimates.learn(run_of(batch=batch), Usage(completion_tokens=7))
    assert list(estimates._completion) == ["a", "c"]
