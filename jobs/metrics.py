"""Every metric mimoq exports; no other module names one, and docs/metrics.md is made from here.

What is counted (counters, histograms) happens in a process: a worker or the API. Each exports its own counts, workers under
`mimoq_worker_`, the API under `mimoq_api_`, and reports them to the store once a second, from where the API exports the
totals of all processes, ended ones too, under `mimoq_`. What is looked at (gauges) a process says of itself, or the API
reads it from the store.

No label holds a prompt, an answer, a key or free text: `jobs.tally.Names` says what gets through.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Source = Literal["worker", "api", "store"]
Door = Literal["worker", "api"]

#: What the names of a source's metrics begin with; those of the store are the totals.
PREFIXES: dict[Source, str] = {"worker": "mimoq_worker_", "api": "mimoq_api_", "store": "mimoq_"}

#: Seconds at which the buckets of a call's time end, of the wait for one, and of an HTTP request.
CALL_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
WAIT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
HTTP_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0, 300.0)

#: Open batches that are looked at for the figures of jobs, the oldest first; and those next in a lane, when all of its ready
#: jobs are younger.
BATCHES = 20_000
NEXT = 1_000
_BOUND = (
    "While more batches are open than `mimoq_open_batches_read` counts, of those it counts; "
    f"in a lane with none ready among these, of the {NEXT:,} batches next to be served"
)


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table: its name without a prefix, and who knows its value.

    `buckets` are the upper ends of a histogram's, in seconds, without the last, which has none.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    sources: tuple[Source, ...]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def counted(self) -> bool:
        """Whether it only ever grows, so that the counts of processes add up to a total."""
        return self.kind != "gauge"

    def exported(self) -> dict[str, Door]:
        """Its whole names, each with the door it is exported at: a worker's own port, or `/metrics` of the API."""
        names: dict[str, Door] = {}
        for source in self.sources:
            names[PREFIXES[source] + self.name] = "worker" if source == "worker" else "api"
        if self.counted:
            names[PREFIXES["store"] + self.name] = "api"
        return names


WORKER: tuple[Source, ...] = ("worker",)
API: tuple[Source, ...] = ("api",)
STORE: tuple[Source, ...] = ("store",)
BOTH: tuple[Source, ...] = ("worker", "store")

# -- jobs

JOBS_ENDED = Metric(
    "jobs_ended_total",
    "counter",
    WORKER,
    "Jobs that have ended, by how; of those cancelled or expired endpoint and model are empty.",
    ("state", "lane", "endpoint", "model"),
)
JOBS = Metric(
    "jobs",
    "gauge",
    STORE,
    "Jobs of open batches at present: queued or running (held by a worker). "
    "Of the batches that `mimoq_open_batches_read` counts.",
    ("state", "lane"),
)
READY_JOBS = Metric(
    "ready_jobs",
    "gauge",
    STORE,
    "Depth of the queue: jobs that any worker may claim now. Not those of paused batches or before their retry. "
    f"{_BOUND}: there may be more.",
    ("lane",),
)
OLDEST_READY = Metric(
    "oldest_ready_job_age_seconds",
    "gauge",
    STORE,
    "Time since the submit of the oldest job that any worker may claim now; 0 when there is none. "
    f"{_BOUND}: an older one may wait.",
    ("lane",),
)
OPEN_BATCHES = Metric("open_batches", "gauge", STORE, "Batches that have not finished.")
OPEN_BATCHES_READ = Metric(
    "open_batches_read",
    "gauge",
    STORE,
    f"Those of them that were looked at for the figures of jobs: the oldest {BATCHES:,}, or as many as a second allowed.",
)
HELD_JOBS = Metric("held_jobs", "gauge", WORKER, "Jobs that this worker holds, waiting or in flight.")

# -- calls of the upstream

CALLS = Metric(
    "calls_total",
    "counter",
    WORKER,
    "Calls of the upstream, by HTTP status (`none`: no response came) and verdict (docs/retries.md).",
    ("endpoint", "model", "status", "verdict"),
)
CALL_TIME = Metric(
    "call_seconds", "histogram", WORKER, "How long calls took, to the last byte.", ("endpoint", "model"), CALL_S
)
SLOT_TIME = Metric(
    "time_to_slot_seconds",
    "histogram",
    WORKER,
    "From when a job was ready to be called, in a worker, until its call started: the wait for limiter and room.",
    ("lane",),
    WAIT_S,
)
TOKENS = Metric(
    "tokens_total",
    "counter",
    WORKER,
    "Tokens the upstream has billed, by kind: prompt, completion, reasoning (part of completion), cached (part of prompt).",
    ("kind", "model"),
)
RETRIES = Metric(
    "retries_total", "counter", WORKER, "Jobs that are to be called again, by the verdict that led to it.", ("verdict",)
)
IN_FLIGHT = Metric(
    "in_flight",
    "gauge",
    BOTH,
    "Calls in flight: reservations held at the limiter.",
    ("account", "model", "lane"),
)

# -- limiter and gates

LIMIT_USED = Metric(
    "limit_used",
    "gauge",
    STORE,
    "What is used of a limit: requests and tokens started in the last minute, calls in flight (concurrency).",
    ("account", "model", "limit"),
)
LIMIT_ALLOWED = Metric(
    "limit_allowed",
    "gauge",
    STORE,
    "What is allowed: the least of the API's own settings and what was told or learned; of concurrency also the window.",
    ("account", "model", "limit"),
)
LIMIT_UTILISATION = Metric(
    "limit_utilisation",
    "gauge",
    STORE,
    "Used by allowed: 1 is all of it; absent where there is no limit.",
    ("account", "model", "limit"),
)
GATE_SHUT = Metric(
    "gate_shut",
    "gauge",
    STORE,
    "1 while a gate is shut, with its reason; absent while it is open. An empty model: the whole account.",
    ("account", "model", "reason"),
)
GATE_PROBE = Metric(
    "gate_probe_seconds",
    "gauge",
    STORE,
    "Time until one call tries a shut gate.",
    ("account", "model"),
)

# -- workers and the store

STORE_UP = Metric("store_up", "gauge", BOTH, "1 while the store answers this process, else 0.")
WORKERS = Metric("workers", "gauge", STORE, "Live workers, by the lane they serve.", ("lane",))
LEASE_LOSSES = Metric(
    "lease_losses_total", "counter", WORKER, "Jobs held by a worker whose lease had become somebody else's."
)
LATE_ANSWERS = Metric("late_answers_total", "counter", WORKER, "Answers to jobs that had ended otherwise meanwhile.")
FENCED_ENDS = Metric(
    "fenced_ends_total", "counter", WORKER, "Ends of jobs that were not taken, because the lease was somebody else's."
)
REAPER_ACTIONS = Metric(
    "reaper_actions_total",
    "counter",
    WORKER,
    "What reapers did: jobs_taken_back from dead workers, batches_woken for a due retry, jobs_found_lost, rings.",
    ("action",),
)

FOLLOWUPS = Metric(
    "followups_total",
    "counter",
    WORKER,
    "Follow-ups of ended jobs (links, tasks of pipelines): done, failed (tried again later), given_up.",
    ("result",),
)
FOLLOWUPS_PENDING = Metric(
    "followups_pending", "gauge", STORE, "Follow-ups of ended jobs that are still to be seen to."
)
PIPELINE_MESSAGES = Metric(
    "pipeline_messages",
    "gauge",
    STORE,
    "Messages of Celery pipelines that wait on their queue, and are no jobs until a worker takes them; rings for their lane "
    "are among them. Absent while the broker does not answer.",
    ("lane",),
)

# -- the API

HTTP_REQUESTS = Metric(
    "http_requests_total",
    "counter",
    API,
    "HTTP requests, by the template of their route and the status of the answer. Route `none`: no route was reached, as "
    "there is none, the request was refused before (401, 403, 429, 431, 503), or it asked for /docs or /openapi.json. "
    "Status `0`: the client went away before an answer began.",
    ("route", "method", "status"),
)
HTTP_TIME = Metric(
    "http_request_seconds",
    "histogram",
    API,
    "How long HTTP requests took, waiting ones too. Route `none` is as in `mimoq_http_requests_total`.",
    ("route",),
    HTTP_S,
)
DELIVERIES = Metric(
    "webhook_deliveries_total",
    "counter",
    API,
    "Attempts to deliver a webhook: delivered, failed (tried again later), dead (given up).",
    ("result",),
)
WEBHOOKS_PENDING = Metric("webhooks_pending", "gauge", STORE, "Webhooks that are still to be delivered.")
WEBHOOKS_DEAD = Metric("webhooks_dead", "gauge", STORE, "Webhooks that were given up and are kept for a month.")

TABLE = tuple(value for value in list(vars().values()) if isinstance(value, Metric))
BY_NAME = {metric.name: metric for metric in TABLE}
