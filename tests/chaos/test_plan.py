"""The plan follows from its seed alone."""

from __future__ import annotations

import pytest

from tests.chaos.plan import KINDS, LANES, Plan


def test_a_seed_makes_the_same_plan_again() -> None:
    assert Plan.of(7, 120) == Plan.of(7, 120)
    assert Plan.of(7, 120) != Plan.of(8, 120)


@pytest.mark.parametrize("seed", range(5))
def test_a_minute_has_some_of_everything(seed: int) -> None:
    plan = Plan.of(seed, 60)
    assert {event.kind for event in plan.events} >= set(KINDS)
    assert [batch.number for batch in plan.batches] == list(range(len(plan.batches)))
    for event in plan.events:
        most = len(plan.batches) if event.kind in ("submit", "submit_killed", "cancel") else len(LANES)
        assert 0 <= event.target < most


def test_the_ledger_knows_every_job_by_its_custom_id() -> None:
    tags = set()
    for batch in Plan.of(1, 60).batches:
        for request in batch.requests():
            assert request["body"]["metadata"] == {"job": request["custom_id"]}
            tags.add(request["custom_id"])
    assert len(tags) == sum(batch.jobs for batch in Plan.of(1, 60).batches)
