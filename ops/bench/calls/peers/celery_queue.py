"""Queues jobs for the Celery app, or is its worker; `BENCH_REDIS` is where, `BENCH_HOW` which app it is."""

from __future__ import annotations

import os
import sys

from common import Load, load  # type: ignore[import-not-found]  # found as a script

#: What the tuned worker leaves out of its talk with others.
ALONE = ("--without-gossip", "--without-mingle", "--without-heartbeat")


def submit(load: Load) -> None:
    """Queues the jobs."""
    from celery_app import complete  # type: ignore[import-not-found]  # found as a script

    for body in load.each():
        complete.delay(body)


def work(load: Load) -> None:
    """Is the worker, until it is ended."""
    from celery.__main__ import main  # not sooner: it is what makes gevent patch everything

    options = ALONE if os.environ["BENCH_HOW"] == "tuned" else ()
    sys.argv = ["celery", "-A", "celery_app", "worker", "-P", "gevent", "-l", "WARNING", *options]
    sys.argv += ["-c", str(load.concurrency)]
    main()


if __name__ == "__main__":
    asked = load("submit", "work")
    os.environ["BENCH_URL"] = asked.url
    (submit if asked.how == "submit" else work)(asked)
