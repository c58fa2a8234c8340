"""`python -m ops.bench.store`: bulk submits, a million queued jobs, exports and start-up, in one table.

Everything runs on this machine: an embedded Valkey (append-only), the project's simulator (200 ms a call, 1.7 KB
answers of natural text), workers and producers, each a process of its own. Exits 1 when a part could not be run to its
end; a target that is missed is only shown.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from jobs.errors import MimoqError
from ops.bench.limits.report import Row, table
from ops.bench.limits.stand import Broken
from ops.bench.options import options
from ops.bench.page import write
from ops.bench.store import feed, report
from ops.bench.store.ceiling import ceiling
from ops.bench.store.million import million
from ops.bench.store.startup import start
from ops.bench.store.submitting import submit

Part = Callable[[Path, Path, float], list[Row]]
PARTS: dict[str, Part] = {"submit": submit, "million": million, "start": start, "ceiling": ceiling}


def main() -> int:
    """Runs the parts and prints their table."""
    args = options("ops.bench.store", __doc__, list(PARTS))
    for variable in [name for name in os.environ if name.startswith("MIMOQ_")]:
        del os.environ[variable]  # the settings are the benchmark's own
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    found: dict[str, list[Row]] = {}
    began = time.monotonic()
    try:
        for name in args.rows:
            print(f"{name} ...", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(prefix="mimoq-bench-", ignore_cleanup_errors=True) as folder:
                answers = feed.answers_text(Path(folder) / "answers.txt")
                found[name] = PARTS[name](Path(folder), answers, args.scale)
            print(table(name, found[name]), file=sys.stderr, flush=True)
    except (Broken, MimoqError, OSError) as error:
        print(f"could not be run to its end: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    told = report.whole(found, time.monotonic() - began)
    print(told)
    if args.write:
        write("bench-store", told)
    return 0


if __name__ == "__main__":
    sys.exit(main())
