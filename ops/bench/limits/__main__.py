"""`python -m ops.bench.limits`: every scenario, or with `--only NAME` some; prints a Markdown table for each.

Each runs in a process of its own. Those that leave the machine nearly idle run side by side, the others alone. Exits 1
when a scenario could not be run to its end; a target that is missed is only shown.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from threading import Thread

from ops.bench.limits.report import MISSED, Row, table

#: Chains of scenarios that run side by side, then those that run alone.
TOGETHER = (("account",), ("rpm", "tpm"), ("faults",))
ALONE = ("concurrency", "outage", "cost")
NAMES = ("rpm", "tpm", "concurrency", "outage", "faults", "account", "cost")
END_S = 30.0


def main() -> int:
    """Runs the scenarios and prints their tables."""
    parser = argparse.ArgumentParser(prog="python -m ops.bench.limits", description=__doc__)
    parser.add_argument("--only", action="append", choices=NAMES, metavar="NAME", help="run this one, repeatable")
    parser.add_argument("--list", action="store_true", help="list the scenarios")
    # For trying the benchmark itself: observes a part of the time, and its figures stand for nothing.
    parser.add_argument("--scale", type=float, default=1.0, help=argparse.SUPPRESS)
    parser.add_argument("--here", choices=NAMES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.list:
        for name in NAMES:
            print(f"{name:<12} {_scenario(name).__doc__}")
        return 0
    if args.here:
        return _here(args.here, args.scale)
    return Bench(args.only or NAMES, args.scale).run()


def _scenario(name: str) -> Callable[[float], list[Row]]:
    from ops.bench.limits.account import account
    from ops.bench.limits.cost import cost
    from ops.bench.limits.faults import faults
    from ops.bench.limits.outage import outage
    from ops.bench.limits.rates import concurrency, rpm, tpm

    known = {"account": account, "concurrency": concurrency, "cost": cost, "faults": faults}
    return (known | {"outage": outage, "rpm": rpm, "tpm": tpm})[name]


def _here(name: str, scale: float) -> int:
    """Runs one scenario in this process; its table is all that goes to stdout."""
    from jobs.errors import MimoqError
    from jobs.processes import end_when_stdin_closes
    from ops.bench.limits.stand import Broken

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    end_when_stdin_closes(lambda: os.kill(os.getpid(), signal.SIGTERM))
    for variable in [name for name in os.environ if name.startswith("MIMOQ_")]:
        del os.environ[variable]  # the settings are the scenario's own
    began = time.monotonic()
    try:
        rows = _scenario(name)(scale)
    except (Broken, MimoqError, OSError) as error:
        print(f"{name}: could not be run to its end: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    rows.append(Row("seconds in all", "", f"{time.monotonic() - began:.0f}"))
    print(table(name, rows))
    return 0


class Bench:
    """The scenarios of one command, each a process that ends with it."""

    def __init__(self, names: Sequence[str], scale: float) -> None:
        self._names = names
        self._scale = scale
        self._processes: list[subprocess.Popen[str]] = []
        self._stopping = False
        self._broken: list[str] = []
        self._missed = 0

    def run(self) -> int:
        """Runs all; returns the exit status."""
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        threads = [Thread(target=self._chain, args=(chain,)) for chain in TOGETHER]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            self._chain(ALONE)
        except KeyboardInterrupt:
            return 130
        finally:
            self._stop()
        print(f"{self._missed} targets were missed" if self._missed else "every target was met")
        if self._broken:
            print(f"not run to its end: {', '.join(self._broken)}", file=sys.stderr)
        return 1 if self._broken else 0

    def _chain(self, names: Sequence[str]) -> None:
        """Runs some scenarios one after another."""
        for name in names:
            if name not in self._names or self._stopping:
                continue
            print(f"{name} ...", file=sys.stderr, flush=True)
            process = subprocess.Popen(
                [sys.executable, "-m", "ops.bench.limits", "--here", name, "--scale", str(self._scale)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
                text=True,
            )
            self._processes.append(process)
            assert process.stdout is not None
            found = process.stdout.read()
            if process.wait() != 0:
                self._broken.append(name)
            self._missed += found.count(MISSED)
            print(found, flush=True)

    def _stop(self) -> None:
        """Ends what still runs: each scenario ends its own processes."""
        self._stopping = True
        for process in self._processes:
            if process.poll() is None:
                process.terminate()
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_S)


if __name__ == "__main__":
    sys.exit(main())
