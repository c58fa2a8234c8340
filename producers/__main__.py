"""The entry point of `mimoq`: what must come before the command line itself is imported."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import NoReturn


def main() -> NoReturn:
    """Runs the command line and ends the process with its status."""
    from producers.workers import Workers

    if sys.stderr is None:  # closed by whoever started us: nothing may fail, or land elsewhere, for that
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - for as long as the process lives
    prepared = Workers()
    try:
        if _is_run(sys.argv[1:]):
            # A worker takes a second to import what it needs; it does so while this process does the same.
            prepared.prepare()
        from producers import cli

        status = cli.main(prepared)
    except KeyboardInterrupt:  # while all this is being imported
        status = 130
    finally:
        prepared.end()
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    # All is written, and stdout is flushed. The interpreter's own end would take another 0.1 s.
    os._exit(status)


def _is_run(args: list[str]) -> bool:
    """Whether this is a run that will most likely have a worker of its own. A mistake only costs a process."""
    if args[:1] != ["run"] or "--help" in args:
        return False
    asked = any(arg.startswith(("--workers", "--simulate")) for arg in args)
    return asked or not os.environ.get("MIMOQ_REDIS_URL")


if __name__ == "__main__":
    main()
