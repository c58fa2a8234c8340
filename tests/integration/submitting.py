"""Forks one producer after another, each of which submits and is perhaps killed meanwhile: `python -P submitting.py`.

Reads lines `{"settings", "key", "requests", "pipeline_bytes"}`; says the pid of each producer, then how it ended. Forking is
what makes a hundred real processes cheap.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

# What a first ring would import.
import celery
import kombu.transport.redis  # noqa: F401 - only to have it imported

from jobs import submission
from jobs.requests import make_request
from producers import Producer


def submit(told: dict[str, Any]) -> int:
    """The exit status of one producer."""
    submission.PIPELINE_BYTES = told["pipeline_bytes"]
    with Producer(**told["settings"]) as producer:
        producer.submit_many(told["requests"], idempotency_key=told["key"])
    return 0


def main() -> None:
    assert celery.__version__
    make_request("so that what judges requests is made", model="m")
    print("ready", flush=True)
    for line in sys.stdin:
        if (pid := os.fork()) == 0:
            status = 1
            try:
                status = submit(json.loads(line))
            finally:
                os._exit(status)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
