"""The short form of the chaos: everything is harmed at random for a while, and the ledger must agree with the store.

CHAOS_SEED and CHAOS_SECONDS choose another plan, and another length of it.
"""

from __future__ import annotations

import os

from tests.chaos import figures, report, trial
from tests.chaos.oracle import Findings
from tests.chaos.plan import Plan

SEED = int(os.environ.get("CHAOS_SEED", "11"))
SECONDS = float(os.environ.get("CHAOS_SECONDS", "35"))


def test_nothing_is_lost_and_nothing_paid_twice() -> None:
    report.printed(f"seed {SEED}, {SECONDS:g} s")
    result = trial.run(Plan.of(SEED, SECONDS), report.printed)
    _holds(result.findings, report.of_trial(result))


def test_full_speed_is_back_soon_after_a_kill() -> None:
    measured = figures.kills(2, report.printed)
    _holds(measured.findings, report.of_figures(measured))


def test_a_rolling_deploy_pays_nothing_twice() -> None:
    measured = figures.rolling(3_000, report.printed)
    _holds(measured.findings, report.of_figures(measured))


def _holds(findings: Findings, lines: list[str]) -> None:
    for line in lines:
        report.printed(line)
    assert not findings.wrong, "\n".join(lines)
