"""A producer process whose lot it is to be killed while it submits: `python -P victim.py`, settings in its environment.

It says `ready` when all it needs is imported, reads one line `{"key", "options", "requests"}`, submits, and says the
batch's id.
"""

from __future__ import annotations

import json
import sys

# What a first ring would import, so that a kill meets the submit and not the imports.
import celery
import kombu.transport.redis  # noqa: F401 - only to have it imported

from producers import Producer


def main() -> None:
    assert celery.__version__
    with Producer() as producer:
        print("ready", flush=True)
        told = json.loads(sys.stdin.readline())
        print(producer.submit_many(told["requests"], idempotency_key=told["key"], **told["options"]), flush=True)


if __name__ == "__main__":
    main()
