"""What `mimoq status` prints: batches, live workers, gates that are shut."""

from __future__ import annotations

import dataclasses
import sys
import time

import msgspec

from jobs import identity
from jobs.workers import gate_of, live_workers
from producers.connection import Connection

SHOWN = 20


def show_status(connection: Connection, batch: str | None, as_json: bool) -> None:
    """One batch or the newest ones on stdout; workers and gates with them. Raises `NotFound`."""
    store = connection.store
    statuses = [store.status(id) for id in ([batch] if batch is not None else store.kept_batches(SHOWN))]
    if as_json:
        for status in statuses:
            sys.stdout.write(msgspec.json.encode(dataclasses.asdict(status)).decode() + "\n")
        return
    for status in statuses:
        usage = status.usage
        line = (
            f"{status.batch_id}  {status.state:<10}  {status.lane}  total {status.total:,}  queued {status.queued:,}  "
            f"running {status.running:,}  succeeded {status.succeeded:,}  failed {status.failed:,}  "
            f"cancelled {status.cancelled:,}  expired {status.expired:,}  tokens {usage.total_tokens:,}"
        )
        print(line + (f"  ({status.reason})" if status.reason else ""))
    if not statuses:
        print("no batches")
    workers = live_workers(connection.client)
    print(f"{len(workers)} live worker{'' if len(workers) == 1 else 's'}")
    for account in sorted({worker.account for worker in workers} | {identity.account_of(connection.settings)}):
        gate = gate_of(connection.client, account)
        if gate is not None:
            wait = max(0.0, gate.until - time.time())
            print(f"account {account} is shut: {gate.reason} ({gate.status}), next probe in {wait:.0f} s")
    for bound in sorted({bound for worker in workers for bound in worker.bounds}):
        print(f"held back by {bound}")
