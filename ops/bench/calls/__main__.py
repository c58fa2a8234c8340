"""`python -m ops.bench.calls`: mimoq beside bare loops, SDKs and plain Celery, against one upstream, in one table.

The upstream is the project's simulator, a process of its own. What a row brings is told by it, what it costs by the row's
processes, alike for all. Exits 1 when a row could not be run; a target that is missed is only shown.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from ops.bench.calls import chart, report, table
from ops.bench.calls.bench import Bench
from ops.bench.calls.rows import NAMES, ROWS, TAIL
from ops.bench.options import options
from ops.bench.page import PAGE, write


def main() -> int:
    """Runs the rows and prints the table."""
    args = options("ops.bench.calls", __doc__, NAMES)
    for variable in [name for name in os.environ if name.startswith("MIMOQ_")]:
        del os.environ[variable]  # the settings are the benchmark's own
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    began = time.monotonic()
    bench = Bench([row for row in ROWS if row.name in args.rows], TAIL in args.rows, args.scale)
    found, whole = bench.found, True
    try:
        bench.run()
    except KeyboardInterrupt:
        whole = False
    told = report.told(found, time.monotonic() - began)
    print(told)
    if not whole:
        print("broken off: these are the rounds up to then", file=sys.stderr)
        return 130
    if args.write:
        write("bench", told)
        PAGE.with_suffix(".svg").write_text(chart.bars(found))
    if broken := [*table.failed(found.results), *([TAIL] if found.tail_failed else [])]:
        print(f"not run to its end: {', '.join(broken)}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
