"""The name of every key mimoq keeps in Redis; no other module spells one out.

The Lua scripts get the prefix as their first key and build the keys of a batch from it, because which batch is next is
only known inside the script. The store is one primary, so keys need no hash tags.
"""

from __future__ import annotations

PREFIX = "mimoq:"

SCHEMA = PREFIX + "schema"  # string: version of this layout
BATCHES = PREFIX + "batches"  # zset: batch id -> created_at, all that are still kept
OPEN = PREFIX + "open"  # zset: batch id -> created_at, those not finished
OPEN_MANY = PREFIX + "open:many"  # zset: batch id -> its jobs, of those not finished that have more than one
DEADLINES = PREFIX + "deadlines"  # zset: batch id -> unix time at which it expires
LANE_NAMES = PREFIX + "lanes"  # set: `<lane>:<label>` of every lane that has had work
CLOSING = PREFIX + "closing"  # set: batch ids being cancelled or expired
DUE = PREFIX + "due"  # zset: batch id -> unix time of its earliest scheduled retry
LEASES = PREFIX + "leases"  # zset: fencing token -> unix time its lease ends
WORKERS = PREFIX + "workers"  # zset: worker id -> unix time of its last heartbeat
REAPER = PREFIX + "reaper"  # string: the worker that reaps, with expiry
ELSEWHERE = PREFIX + "elsewhere"  # string: there while results live in another backend than this Redis
REVOKED = PREFIX + "revoked"  # list: `<job id> <result>` of cancelled or expired jobs, to be told to that backend
RETIRING = (
    PREFIX + "retiring"
)  # hash: batch id -> `<next index>:<total>:<unix time its results go>`, until all are told
CLEANED = PREFIX + "cleaned"  # string with expiry: there while the results' backend was cleaned up lately
ROUNDS = PREFIX + "rounds"  # hash: last = unix time of the reaper's last round, patient_until
DEATHS = PREFIX + "deaths"  # zset: worker id -> unix time of its last heartbeat, of those whose lease ran out lately
QUARANTINED = PREFIX + "quarantined"  # string: the worker that calls what may kill it, with expiry
LIMITS = PREFIX + "limits"  # zset: `<account>:<model>` of every limit record -> unix time it was last used

TENANTS = PREFIX + "tenants"  # set: every tenant of the API that has submitted something
TOKENS = PREFIX + "tokens"  # hash: token id -> JSON of a token of the API, its digest in place of its text
SECRETS = PREFIX + "secrets"  # hash: tenant -> what its webhooks are signed with
OUTBOX = PREFIX + "outbox"  # zset: event id -> unix time it is due; channel: a message when one comes in
DEAD = PREFIX + "outbox:dead"  # zset: event id -> unix time its delivery was given up
OPENAI_DUE = PREFIX + "openai:due"  # zset: tenant -> unix time at which it is its turn to have an OpenAI batch seen to
FILES = PREFIX + "files"  # zset: file id -> unix time at which it expires, of uploaded files that do
METRICS = PREFIX + "metrics"  # hash: what all processes have counted
FOLLOWUPS = PREFIX + "followups"  # zset: job id -> unix time at which its follow-up is due
FOLLOWUP_TRIES = PREFIX + "followups:tries"  # hash: job id -> how often its follow-up was begun
# kombu's record of messages that are taken and not yet acked, in the broker's Redis: hash, zset, string.
UNACKED, UNACKED_INDEX, UNACKED_LOCK = PREFIX + "unacked", PREFIX + "unacked_index", PREFIX + "unacked_lock"

LANES = ("interactive", "bulk")
COMPLETE = "complete"  # the lane of Celery pipelines, which no submit names
SERVED = (*LANES, COMPLETE)  # lanes that worker processes serve


def batch(batch_id: str) -> str:
    """hash: the batch's record."""
    return f"{PREFIX}batch:{batch_id}"


def requests(batch_id: str) -> str:
    """hash: block number -> compressed block; `r<index>` -> one large request."""
    return f"{PREFIX}batch:{batch_id}:requests"


def staged(batch_id: str, nonce: str) -> str:
    """The same hash while it is being written; expires unless the batch is created."""
    return f"{PREFIX}staged:{batch_id}:{nonce}"


def states(batch_id: str) -> str:
    """string: one byte a job, NUL (or beyond the end) while it is not terminal."""
    return f"{PREFIX}batch:{batch_id}:states"


def claims(batch_id: str) -> str:
    """hash: job index -> fencing token of the lease that holds it."""
    return f"{PREFIX}batch:{batch_id}:claims"


def history(batch_id: str) -> str:
    """hash: job index -> JSON array of its attempts so far, of jobs given back."""
    return f"{PREFIX}batch:{batch_id}:history"


def retries(batch_id: str) -> str:
    """zset: job index -> unix time before which it is not called again."""
    return f"{PREFIX}batch:{batch_id}:retries"


def suspects(batch_id: str) -> str:
    """hash: job index -> crashes of workers that were alone with it, of jobs that may kill their worker."""
    return f"{PREFIX}batch:{batch_id}:suspects"


def strays(batch_id: str) -> str:
    """set: `<fencing token>:<index>` of leases that have told what they spent on a job that did not end by them."""
    return f"{PREFIX}batch:{batch_id}:strays"


def done(batch_id: str) -> str:
    """string: the indexes of ended jobs in the order of their ends, 4 bytes each, little-endian."""
    return f"{PREFIX}batch:{batch_id}:done"


def channel(batch_id: str) -> str:
    """channel: a message each time jobs of the batch end or its state changes."""
    return f"{PREFIX}batch:{batch_id}:events"


def lane(name: str, label: str) -> str:
    """zset: batch id -> virtual time (jobs handed out), of batches with ready work for the upstream `label`."""
    return f"{PREFIX}lane:{name}:{label}"


def leads(name: str, label: str) -> str:
    """zset: batch id -> unix time, of new batches whose first job is to be called before their turn."""
    return f"{PREFIX}leads:{name}:{label}"


def quarantine(name: str, label: str) -> str:
    """zset: batch id -> unix time, of batches with jobs in quarantine; these are in the batch's list `quarantine`."""
    return f"{PREFIX}quarantine:{name}:{label}"


def turn(name: str, label: str) -> str:
    """string: the virtual time of a lane for an upstream, at which a batch that becomes ready joins."""
    return f"{PREFIX}turn:{name}:{label}"


def lease(token: str) -> str:
    """hash: worker, batch, indexes, crashes, jobs left, alone, c<index> = calls let through; '' for what all begin with."""
    return f"{PREFIX}lease:{token}"


def worker(worker_id: str) -> str:
    """string with expiry: JSON of what a worker says of itself."""
    return f"{PREFIX}worker:{worker_id}"


def identity(digest: str) -> str:
    """string: the batch that a content identity or an idempotency key stands for."""
    return f"{PREFIX}identity:{digest}"


def made(digest: str) -> str:
    """zset with expiry: batch id -> unix time, of those that calls alike made of which nobody has heard yet."""
    return f"{PREFIX}made:{digest}"


def limit(account: str, model: str) -> str:
    """hash: levels of the buckets, window, gate, learned rate: what limits.lua and adapt.lua name."""
    return f"{PREFIX}limit:{account}:{model}"


def flight(lane: str, account: str, model: str) -> str:
    """zset: reservation id -> unix time at which it counts as lost with its worker."""
    return f"{PREFIX}flight:{lane}:{account}:{model}"


def answering(account: str) -> str:
    """string with expiry: there while a worker that serves the interactive lane lives."""
    return f"{PREFIX}answering:{account}"


def minute(account: str, model: str) -> str:
    """hash: `r` or `t` and the number of a quarter second -> requests or tokens started in it."""
    return f"{PREFIX}minute:{account}:{model}"


def gate(account: str) -> str:
    """hash: reason, status, since, until (no call before), step_s, refused_at, asked_until; absent while it is open."""
    return f"{PREFIX}gate:{account}"


def result(job_id: str) -> str:
    """string: Celery's own key of a task's result."""
    return f"celery-task-meta-{job_id}"


def tenant_batches(tenant: str) -> str:
    """zset: batch id -> created_at, those that a tenant of the API has submitted; tenant '' is who needs no token."""
    return f"{PREFIX}tenant:{tenant}:batches"


def tenant_protocol(tenant: str, protocol: str) -> str:
    """zset: batch id -> created_at, those that a tenant has made by the protocol `openai` or `anthropic`."""
    return f"{PREFIX}tenant:{tenant}:{protocol}"


def tenant_due(tenant: str) -> str:
    """zset: batch id -> unix time at which an OpenAI batch of the tenant has to be validated or finalized."""
    return f"{PREFIX}tenant:{tenant}:due"


def tenant_files(tenant: str, purpose: str = "") -> str:
    """zset: file id -> created_at, a tenant's files, or those of one purpose."""
    return f"{PREFIX}tenant:{tenant}:files:{purpose}" if purpose else f"{PREFIX}tenant:{tenant}:files"


def file(file_id: str) -> str:
    """hash: tenant, purpose, filename, bytes, created_at, expires_at of a file; its content is on a disk, or in results."""
    return f"{PREFIX}file:{file_id}"


def openai(batch_id: str) -> str:
    """hash: what an OpenAI batch is beside its record, and before it has one: input file, window, errors."""
    return f"{PREFIX}batch:{batch_id}:openai"


def tenant_events(tenant: str) -> str:
    """zset: event id -> created_at, of a tenant's webhooks."""
    return f"{PREFIX}tenant:{tenant}:events"


def event(event_id: str) -> str:
    """hash: kind, type, tenant, subject, url, created_at, attempts, and what became of it."""
    return f"{PREFIX}event:{event_id}"


def joins(digest: str) -> str:
    """zset with expiry: id of a job that a waiting call made -> when somebody last waited for it, 0 once nobody does."""
    return f"{PREFIX}joins:{digest}"


def rate(token_id: str, minute: int) -> str:
    """string with expiry: requests of a token in that minute of the unix time."""
    return f"{PREFIX}rate:{token_id}:{minute}"


def reported(process: str) -> str:
    """string with expiry: number of the last report of what a process has counted."""
    return f"{PREFIX}reported:{process}"
