"""`python -m tests.chaos`: chaos of any length, and the figures of kills and of a rolling deploy."""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile

from tests.chaos import figures, report, trial
from tests.chaos.plan import Plan


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="Harm everything, and count the money.")
    parser.add_argument("--minutes", type=float, default=2.0, help="how long things are harmed (2)")
    parser.add_argument("--seed", type=int, help="seed of the plan (any)")
    parser.add_argument(
        "--kills", type=int, metavar="N", help="instead: kill one of two workers at full speed, N times"
    )
    parser.add_argument("--rolling", action="store_true", help="instead: end every worker in turn during one batch")
    parser.add_argument("--jobs", type=int, default=20_000, help="jobs of the rolling deploy (20000)")
    args = parser.parse_args(argv)
    for name in [name for name in os.environ if name.startswith("MIMOQ_")]:
        del os.environ[name]
    os.chdir(tempfile.gettempdir())  # where no .env of a developer is
    if args.kills:
        measured = figures.kills(args.kills, report.printed)
        lines, findings = report.of_figures(measured), measured.findings
    elif args.rolling:
        measured = figures.rolling(args.jobs, report.printed)
        lines, findings = report.of_figures(measured), measured.findings
    else:
        seed = random.randrange(1_000_000) if args.seed is None else args.seed
        report.printed(f"seed {seed}, {args.minutes:g} minutes")
        result = trial.run(Plan.of(seed, 60 * args.minutes), report.printed)
        lines, findings = [f"seed {seed}", *report.of_trial(result)], result.findings
    for line in lines:
        report.printed(line)
    return 1 if findings.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
