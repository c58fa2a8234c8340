"""`python -m ops.bench.store.producing COUNT`: a program that submits, and prints the seconds that it took.

The store is that of its settings. With `--singles` each request is a submit of its own, for someone who waits.
"""

from __future__ import annotations

import sys
import time

from ops.bench.store import feed
from producers.producer import Producer


def main() -> None:
    """Submits; stdout gets the seconds and nothing else."""
    count, singles = int(sys.argv[1]), "--singles" in sys.argv
    with Producer() as producer:
        if singles:
            producer.submit("The first has Celery imported.", lane="interactive")
        began = time.monotonic()
        if singles:
            for body in feed.bodies(count):
                producer.submit(body, lane="interactive")
        else:
            producer.submit_many(feed.bodies(count))
        print(time.monotonic() - began)


if __name__ == "__main__":
    main()
