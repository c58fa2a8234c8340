"""A Celery app with a task a job: `BENCH_HOW` is `post` (httpx's own), `plain` (one client for all) or `tuned`, as well as
it can be.

Of what could be changed without leaving "one task a job, httpx, gevent", these paid; reading Redis with hiredis, and
other prefetching, did not.
"""

from __future__ import annotations

import os
import ssl
from typing import Any

import httpx
from celery import Celery
from common import KEY, TIMEOUT_S  # type: ignore[import-not-found]  # found as a script

REDIS = os.environ["BENCH_REDIS"]
URL = f"{os.environ['BENCH_URL']}/v1/chat/completions"
HOW = os.environ["BENCH_HOW"]
TUNED = HOW == "tuned"
HEADERS = {"Authorization": f"Bearer {KEY}"}
#: More connections to Redis than any greenlet will ask for.
WIDE = 1_100

app = Celery("peer", broker=REDIS, backend=REDIS)

if TUNED:
    app.conf.update(
        result_backend_thread_safe=True,  # else every greenlet makes a backend of its own
        redis_max_connections=WIDE,
        broker_transport_options={"max_connections": WIDE},
        worker_disable_rate_limits=True,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
    )
    # httpx's pool looks through all its connections at every request: a client for each slot has but one.
    one = httpx.Limits(max_connections=1, max_keepalive_connections=1)
    verify = ssl.create_default_context()
    idle: list[httpx.Client] = []
else:
    client = httpx.Client(timeout=TIMEOUT_S)


def post(body: dict[str, Any]) -> httpx.Response:
    """One call by whichever client it is."""
    if HOW == "post":
        return httpx.post(URL, json=body, headers=HEADERS, timeout=TIMEOUT_S)
    if not TUNED:
        return client.post(URL, json=body, headers=HEADERS)
    mine = idle.pop() if idle else httpx.Client(timeout=TIMEOUT_S, limits=one, verify=verify, headers=HEADERS)
    try:
        return mine.post(URL, json=body)
    finally:
        idle.append(mine)


@app.task  # type: ignore[untyped-decorator]  # Celery ships no types
def complete(body: dict[str, Any]) -> Any:
    """Calls, and returns the whole response: its result."""
    response = post(body)
    response.raise_for_status()
    return response.json()
