"""What `mimoq status` prints: batches, live workers, gates that are shut."""

from __future__ import annotations

import dataclasses
import sys
import time
from datetime import UTC, datetime

import msgspec

from jobs import identity
from jobs.gates import Gate, gates_of, server_time
from jobs.outbox import dead_count
from jobs.workers import live_workers
from producers.connection import Connection

SHOWN = 20


def show_status(connection: Connection, batch: str | None, as_json: bool) -> None:
    """One batch or the newest ones on stdout; workers and gates with them. Raises `NotFound`.

    As JSON an object a batch, each with the shut gates of this user's account.
    """
    store, client, wait = connection.store, connection.client, connection.patience.call
    statuses = [store.status(id) for id in ([_named(batch)] if batch is not None else store.kept_batches(SHOWN))]
    own = identity.account_of(connection.settings)
    if as_json:
        gates = wait(gates_of, client, own) if statuses else []
        for status in statuses:
            sys.stdout.write(msgspec.json.encode({**dataclasses.asdict(status), "gates": gates}).decode() + "\n")
        return
    for status in statuses:
        usage = status.usage
        line = (
            f"{status.batch_id}  {status.state:<10}  {status.lane}  total {status.total:,}  queued {status.queued:,}  "
            f"running {status.running:,}  succeeded {status.succeeded:,}  failed {status.failed:,}  "
            f"cancelled {status.cancelled:,}  expired {status.expired:,}  tokens {usage.total_tokens:,}"
        )
        not_before = store.next_retry(status.batch_id)
        if not_before is not None:
            line += f"  next retry in {max(0.0, not_before - time.time()):.0f} s"
        print(line + (f"  ({status.reason})" if status.reason else ""))
    if not statuses:
        print("no batches")
    workers = wait(live_workers, client)
    print(f"{len(workers)} live worker{'' if len(workers) == 1 else 's'}")
    for account in sorted({worker.account for worker in workers} | {own}):
        for gate in wait(gates_of, client, account):
            print(gate_line(gate, wait(server_time, client)))
    if dead := wait(dead_count, client):
        print(f"{dead:,} webhook{'' if dead == 1 else 's'} could not be delivered")
    for bound in sorted({bound for worker in workers for bound in worker.bounds}):
        print(f"held back by {bound}")


def _named(batch: str) -> str:
    from producers.producer import batch_of  # which also submits and follows

    return batch_of(batch)


def gate_line(gate: Gate, now: float) -> str:
    """What is shut, why, since when, and how long it stays so from `now`, a time of the server's."""
    model = "" if gate.model is None else f"model {gate.model} of "
    since = datetime.fromtimestamp(gate.since, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    wait_s = gate.wait_s(now)
    return f"{model}account {gate.account} is shut: {gate.why} since {since}, next probe in {wait_s:.0f} s"
