"""Watching a batch of a run: rows written as its jobs end, workers kept alive, the key and the store looked after."""

from __future__ import annotations

import contextlib
import time

from jobs import identity
from jobs.errors import KeyRefused, MimoqError, NotFound, StoreUnavailable
from jobs.gates import account_gate, gates_of, server_time
from jobs.settings import PREFIX
from jobs.states import BatchState
from jobs.store import BatchStatus
from jobs.workers import live_workers
from producers.connection import Connection
from producers.follow import Follower, Listener
from producers.interrupts import Interrupts
from producers.progress import Display, Rates, View
from producers.rows import Rows
from producers.simulation import Simulation
from producers.source import say
from producers.workers import Workers

#: Seconds between looks at workers, gates and the display.
TICK_S = 0.25
#: Seconds a wait for a message lasts at most, so that signals are seen.
LISTEN_S = 0.1
#: Rows written to the output files together.
WRITE_ROWS = 200
#: Reasons of a gate that end a run whose first calls met it.
REFUSALS = ("key_refused", "forbidden")


class Watch:
    """Watches one batch until it is finished or the user has had enough.

    `workers` are the run's own, begun or not; `simulation` its simulator, if any; `opened_at` is the server's time from
    which on a refused key is news. `status` is the last look, `paused` why the batch paused by itself, or ''.
    """

    def __init__(
        self,
        connection: Connection,
        batch_id: str,
        rows: Rows,
        workers: Workers,
        simulation: Simulation | None,
        interrupts: Interrupts,
        opened_at: float,
    ) -> None:
        self._connection = connection
        # Signals and workers are seen to while the store is away, so no call waits for it here.
        self._store = connection.bare
        self._rows = rows
        self._workers = workers
        self._simulation = simulation
        self._interrupts = interrupts
        self._account = identity.account_of(connection.settings)
        self._label = identity.label(connection.settings)
        self._rates = Rates()
        self._drain_s = connection.settings.drain_s
        self._opened_at = opened_at
        self._gate_told = ""
        self._leave_by = 0.0
        self.paused = ""
        self.status = self._first = connection.store.status(batch_id)
        self._follower = connection.patience.call(Follower, self._store, batch_id, rows.written)

    def watch(self, shown: Display) -> bool:
        """Whether the batch is finished and all its rows are written; False after Ctrl-C, or when it paused by itself.

        Raises `KeyRefused`, or whatever ends a run before its time: a full disk, a store or workers that stay away.
        """
        interrupts, patience = self._interrupts, self._connection.patience
        if not self._workers.begun and self.status.state is not BatchState.FINISHED:
            self._look_for_workers()
        interrupts.following = True
        next_tick = 0.0
        with contextlib.closing(shown), Listener(self._store, self.status.batch_id) as listener:
            while True:
                leaving = bool(interrupts.count) and self._leave()
                drained = bool(self.paused) and not (self._workers.begun and self._workers.alive)
                written = more = away = False
                try:
                    self.status = self._look()
                    if self.status.state is BatchState.FINISHED:
                        self._workers.stop()  # they end while the last rows are written
                    self._see_pause()
                    # What had ended by the look above is read below, so a finished batch leaves nothing behind.
                    written = self._write()
                    more = not written
                    now = time.monotonic()
                    if now >= next_tick:
                        next_tick = now + TICK_S
                        self._keep_alive()
                        shown.show(self._view(now))
                        self._check_key()
                    patience.found()
                except StoreUnavailable as error:
                    away = True
                    if not leaving:
                        patience.lost(error)
                if leaving and (written or away or interrupts.count > 1):
                    return False
                if self.status.state is BatchState.FINISHED and written:
                    with contextlib.suppress(StoreUnavailable):  # all is written: only the last look is missing
                        shown.show(self._view(time.monotonic()))
                    return True
                if drained and written and (not self.status.running or time.monotonic() > self._leave_by):
                    return False
                if not more:
                    listener.wait(LISTEN_S)

    def _look(self) -> BatchStatus:
        try:
            return self._store.status(self.status.batch_id)
        except NotFound:
            raise MimoqError(
                "the store has lost the batch: was it emptied, or restarted without its append-only file? "
                "Run the same command again; what is in the output is not called again"
            ) from None

    def _see_pause(self) -> None:
        """A batch whose jobs all fail alike has paused: calls in flight end first, whoever's workers make them."""
        if not self.paused and self.status.state is BatchState.PAUSED and self.status.reason:
            self.paused = self.status.reason
            self._leave_by = time.monotonic() + self._drain_s
            self._workers.stop()

    def _write(self) -> bool:
        """Writes rows of jobs that have ended, for a tick at most; whether those were all."""
        end = time.monotonic() + TICK_S
        while (ended := self._follower.ready(WRITE_ROWS)) is not None:
            self._rows.write(ended)
            if time.monotonic() > end:
                return False
        return True

    def _keep_alive(self) -> None:
        if self._connection.server is not None:
            self._connection.server.ensure()
            if self._store.disk_full():
                folder = self._connection.settings.data_dir
                raise MimoqError(f"the disk of {folder} is full: make room, and run the same command again")
        self._workers.ensure()
        if self._simulation is not None:
            self._simulation.check()

    def _look_for_workers(self) -> None:
        found = self._connection.patience.call(live_workers, self._connection.client)
        alive = [worker for worker in found if "bulk" in worker.lanes]
        if any(worker.label == self._label for worker in alive):
            return
        if alive:
            others = ", ".join(sorted({worker.upstream for worker in alive}))
            say(f"no live worker calls this upstream (those alive call {others}); start one, or give --workers 1")
        else:
            say("no live worker: start one with `mimoq worker`, or give --workers 1; waiting")

    def _view(self, now: float) -> View:
        status = self.status
        mine = [worker for worker in live_workers(self._connection.client) if worker.label == self._label]
        jobs_per_s, tokens_per_min = self._rates.add(status.ended, status.usage.total_tokens, now)
        left = status.total - status.ended
        held_back = ", ".join(sorted({bound for worker in mine for bound in worker.bounds}))
        if gates := gates_of(self._connection.client, self._account):
            wait_s = gates[0].wait_s(server_time(self._connection.client))
            held_back = f"gate: {gates[0].reason}, next call in {wait_s:.0f} s"
        elif not held_back and status.queued and not status.running:
            not_before = self._store.next_retry(status.batch_id)
            if not_before is not None:
                held_back = f"retries: next in {max(0.0, not_before - time.time()):.0f} s"
        if self.paused:
            held_back = self.paused
        elif status.state is BatchState.PAUSED and not self._workers.stopping:
            held_back = f"paused; `mimoq resume {status.batch_id}` lets it go on"
        elif not mine and status.state is not BatchState.FINISHED and not self._workers.stopping:
            held_back = "no worker yet"
        return View(
            status,
            sum(worker.in_flight for worker in mine),
            jobs_per_s,
            tokens_per_min,
            left / jobs_per_s if jobs_per_s > 0 else None,
            held_back,
        )

    def _check_key(self) -> None:
        """Ends the run when its first calls are refused for the key; no job has failed for it."""
        if self._simulation is not None or self.status.succeeded > self._first.succeeded:
            return
        gate = account_gate(self._connection.client, self._account)
        if gate is None or (gate.refused_at or 0.0) <= self._opened_at:
            return  # open, or what an earlier run met; this one's probe is on its way
        if gate.reason != self._gate_told and gate.reason not in REFUSALS:
            self._gate_told = gate.reason
            say(
                f"the upstream has shut the account ({gate.reason}, {gate.status}): "
                "no job fails for it; one call tries at times"
            )
        if gate.reason in REFUSALS:
            self._workers.end()
            self.status = self._store.status(self.status.batch_id)
            raise KeyRefused(
                f"the upstream refuses the API key ({gate.status}): no job failed for it; "
                f"set another {PREFIX}API_KEY and run the same command again"
            )

    def _leave(self) -> bool:
        """After Ctrl-C: whether it is time to go. Once: calls in flight end first. Twice: at once."""
        if not self._workers.begun:
            return True
        if self._interrupts.count > 1:
            self._workers.kill()
            return True
        if not self._workers.stopping:
            say(f"stopping: calls in flight get up to {self._drain_s:g} s to end; Ctrl-C again to leave now")
            self._workers.stop()
            # So that another run in this folder does not go on with what was stopped; the same command does.
            with contextlib.suppress(StoreUnavailable, NotFound):
                self._store.pause(self.status.batch_id)
        return self._workers.alive == 0
