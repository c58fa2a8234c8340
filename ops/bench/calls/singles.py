"""`python -m ops.bench.calls.singles BODIES NUMBER`: submits so many jobs one by one, then waits for each.

Its one line on stdout is the seconds of CPU that this took it, without its start.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import islice
from pathlib import Path

from jobs.states import JobState
from producers.producer import Producer


def main(bodies: Path, number: int) -> int:
    """Returns 0 when all have succeeded."""
    with Producer() as producer, bodies.open("rb") as lines:
        began_s = time.process_time()
        ids = [producer.submit(json.loads(line)) for line in islice(lines, number)]
        succeeded = 0
        for each in ids:
            succeeded += producer.wait(each).state is JobState.SUCCEEDED
        print(time.process_time() - began_s)
    return 0 if succeeded == number else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
