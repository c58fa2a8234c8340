"""One batch with faults on every pair of broker and result backend, and the ledger must agree with the store.

CHAOS_SEED chooses another order of harms.
"""

from __future__ import annotations

import os

import pytest

from tests.chaos import backends, report
from tests.chaos.backends import Backends

SEED = int(os.environ.get("CHAOS_SEED", "7"))


@pytest.mark.parametrize("results", ["redis", "postgresql"])
@pytest.mark.parametrize("broker", ["redis", "rabbitmq"])
def test_nothing_is_lost_whatever_the_back_ends(broker: str, results: str, request: pytest.FixtureRequest) -> None:
    pair = Backends(
        request.getfixturevalue("rabbitmq") if broker == "rabbitmq" else None,
        request.getfixturevalue("postgresql") if results == "postgresql" else None,
    )
    report.printed(f"{broker}, results in {results}, seed {SEED}")
    result = backends.run(pair, SEED, report.printed)
    lines = report.of_trial(result)
    for line in lines:
        report.printed(line)
    assert not result.findings.wrong, "\n".join(lines)
