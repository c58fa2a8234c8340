"""The rows: what each is, which concurrencies it is tried with, and the jobs a second that are guessed for its first run."""

from __future__ import annotations

from typing import NamedTuple

from ops.bench.calls import runs
from ops.bench.calls.runs import Run

STREAM_EVENTS = 400
STREAMED = ("--stream-events", str(STREAM_EVENTS))


class Row(NamedTuple):
    """One row of the table. One with a single concurrency is not tried beforehand: its rate is the guess."""

    name: str
    label: str
    run: Run
    tried: tuple[int, ...]
    per_s: float


#: Calls in flight of each worker process where they are held by latency alone.
HELD = 100

ROWS = (
    Row("aiohttp", "bare aiohttp loop", runs.client("bare_aiohttp.py"), (500, 1000), 1800),
    Row("httpx", "bare httpx+aiohttp loop", runs.client("bare_httpx.py", "whole"), (200, 500, 1000), 1000),
    Row("openai", "openai SDK", runs.client("openai_sdk.py", "plain", peer="openai"), (100, 200, 500), 220),
    Row(
        "openai-aiohttp",
        "openai SDK, its aiohttp client",
        runs.client("openai_sdk.py", "aiohttp", peer="openai"),
        (200, 500, 1000),
        550,
    ),
    Row("litellm", "LiteLLM acompletion", runs.client("litellm_sdk.py", peer="litellm"), (50, 100, 200), 85),
    Row("celery-post", "plain Celery, gevent, defaults, httpx.post in each task", runs.celery("post"), (20, 50), 14),
    Row("celery", "the same, one httpx.Client for all", runs.celery("plain"), (50, 100, 200), 85),
    Row("celery-tuned", "the same, tuned", runs.celery("tuned"), (100, 200, 400), 250),
    Row("mimoq", "mimoq bulk, 1 worker", runs.bulk(), (500, 1000, 1500), 1800),
    Row("mimoq-2", "mimoq bulk, 2 workers", runs.bulk(workers=2), (1000, 1500), 2000),
    Row("held", f"mimoq bulk, 1 worker of {HELD} in flight", runs.bulk(held=True), (HELD,), 480),
    Row("held-2", f"mimoq bulk, 2 workers of {HELD} in flight", runs.bulk(workers=2, held=True), (HELD,), 900),
    Row(
        "httpx-streamed",
        f"bare httpx+aiohttp loop, streamed, {STREAM_EVENTS} events",
        runs.client("bare_httpx.py", "streamed", *STREAMED),
        (200, 500),
        270,
    ),
    Row(
        "mimoq-streamed",
        f"mimoq bulk, 1 worker, streamed, {STREAM_EVENTS} events",
        runs.bulk(*STREAMED, streaming="always"),
        (200, 500),
        250,
    ),
    Row("client", "mimoq singles, Python client", runs.singles_by_client, (500,), 400),
    Row("api", "mimoq singles, API, POST /v1/jobs", runs.singles_by_api(waiting=False), (500,), 400),
    Row("api-waiting", "mimoq singles, API, waiting calls", runs.singles_by_api(waiting=True), (500,), 300),
)
#: Beside these, a row that has one figure.
TAIL = "tail"
NAMES = (*(row.name for row in ROWS), TAIL)
