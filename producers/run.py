"""`mimoq run`: a file of requests in, a file of answers out, through the store and worker processes of its own.

The way of a run: judge the whole input, look at what the output already holds, open the store, create or continue the
batch, start workers, write rows as jobs end. What goes wrong is told in one line, and the same command run again goes
on where it stopped: the output file is the truth for rows in it, the store for everything else.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec

from jobs import identity
from jobs.errors import MimoqError, UsageError
from jobs.gates import open_gate
from jobs.requests import CHAT, ENDPOINTS, InvalidLine, Request
from jobs.results import Usage
from jobs.settings import PREFIX, Settings
from jobs.states import BatchState
from jobs.store import BatchStatus
from jobs.submission import NewBatch
from producers.connection import Connection
from producers.environment import variables
from producers.interrupts import Interrupts
from producers.output import check_paths, default_output, error_file
from producers.progress import display
from producers.reader import Defaults, Report, requests
from producers.rows import Rows
from producers.simulation import Simulation, simulated
from producers.source import judge, opened_input, say
from producers.watch import Watch
from producers.workers import Rings, Workers


@dataclass(frozen=True, slots=True)
class RunOptions:
    """The flags of `mimoq run` that are not settings."""

    source: str
    output: Path | None = None
    errors: Path | None = None
    endpoint: str = CHAT
    workers: int | None = None
    max_attempts: int | None = None
    retry_failed: bool = False
    fresh: bool = False
    overwrite: bool = False
    simulate: bool = False
    skip_invalid: bool = False
    json: bool = False
    quiet: bool = False


class Run:
    """One run, from its options to its exit status."""

    def __init__(self, options: RunOptions, settings: Settings, workers: Workers) -> None:
        self._options = options
        self._settings = settings
        self._started = workers.since
        self._interrupts = Interrupts()
        self._workers = workers
        self._simulation: Simulation | None = None
        self._connection: Connection | None = None
        self._invalid = 0
        self._told = False  # whether the summary has been given

    def run(self) -> int:
        """Does it all; returns the exit status. Raises `MimoqError` where a line says it all."""
        options = self._options
        if options.endpoint not in ENDPOINTS:
            raise UsageError(f"--endpoint must be one of {', '.join(ENDPOINTS)}")
        if options.simulate:
            say("simulating: the answers come from mimoq's own simulator on this machine, not from MiMo")
        elif self._settings.api_key is None:
            raise UsageError(f"no API key: set {PREFIX}API_KEY, or try it out with --simulate")
        with opened_input(options.source, self._settings.data_dir) as (file, path), self._interrupts.heard():
            if path is None and options.output is None:
                raise UsageError("standard input has no name to derive the output's from: give it with -o")
            output = options.output if options.output is not None else default_output(path or Path("-"))
            errors = options.errors if options.errors is not None else error_file(output)
            check_paths(path, output, errors)
            try:
                return self._run(file, output, errors)
            except KeyboardInterrupt:
                if not self._told:
                    say("interrupted before a job was called; run the same command again")
                    self._tell(None)
                return self._interrupts.status
            except MimoqError as error:
                if not self._told and error.exit_code == 1:
                    self._tell(None)
                raise
            finally:
                self._close()

    def _run(self, file: BinaryIO, output: Path, errors: Path) -> int:
        options, settings = self._options, self._settings
        if options.simulate:
            self._simulation = Simulation()
            settings = simulated(settings)
        own = options.workers if options.workers is not None else (0 if settings.redis_url is not None else 1)
        if options.simulate:
            own = max(own, 1)  # nobody else's worker takes simulated work
        self._connection = Connection(settings, say)
        defaults = Defaults(options.endpoint, None if settings.endpoint_path else settings.model)
        report = judge(file, defaults, settings, options.skip_invalid)
        label = identity.label(settings)
        run_identity = identity.run_identity(report.digest, report.bad, options.endpoint, defaults.model, label)
        rows = Rows(output, errors, run_identity)
        try:
            batch_id, queued = self._batch(file, defaults, report, run_identity, label, rows)
            # Every run may try its key at once; before workers begin, so that what they meet is later.
            account = identity.account_of(settings)
            opened_at = self._connection.patience.call(open_gate, self._connection.client, account)
            if own and self._connection.store.status(batch_id).state is not BatchState.FINISHED:
                self._name_others(batch_id, label)
                self._begin_workers(own, settings, (batch_id, "bulk", label, self._connection.slices(queued)))
            else:
                self._connection.ring(batch_id, "bulk", label, queued)
            return self._watch(batch_id, rows, errors, opened_at)
        finally:
            rows.close()

    def _name_others(self, batch_id: str, label: str) -> None:
        """Says which other batches this run's workers will go on with: they may be unwanted, and cost money."""
        assert self._connection is not None
        for other in self._connection.store.unfinished(label):
            if other != batch_id:
                say(f"batch {other} is unfinished here and goes on too; `mimoq cancel {other}` stops it")

    def _begin_workers(self, count: int, settings: Settings, rings: Rings) -> None:
        others = {"base_url": self._simulation.wait()} if self._simulation is not None else {}
        told = variables(settings, **others)
        settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        log = settings.data_dir.resolve() / "worker.log"
        self._workers.begin(["bulk"] * count, told, log, settings.drain_s, rings)

    # -- the batch

    def _batch(
        self, file: BinaryIO, defaults: Defaults, report: Report, run_identity: str, label: str, rows: Rows
    ) -> tuple[str, int]:
        """The batch of this input: the one that is there, or a new one with everything the output does not hold.

        Returns its id and how many jobs are to be rung for.
        """
        assert self._connection is not None
        options, settings, store = self._options, self._settings, self._connection.store
        # Before anything is changed in the store: a file that may not be written ends the run here.
        rows.open(overwrite=options.overwrite, fresh=options.fresh)
        batch_id = store.batch_of_identity(run_identity)
        if options.fresh and batch_id is not None:
            if store.status(batch_id).state is not BatchState.FINISHED:
                store.cancel(batch_id)
            store.forget_identity(run_identity)
            batch_id = None
        if options.retry_failed:
            rows.forget_failed()
        if batch_id is None:
            batch_id = run_identity + secrets.token_hex(4)
            new = NewBatch(
                batch_id=batch_id,
                label=label,
                slice_size=settings.slice_size,
                ttl_s=settings.result_ttl_s,
                max_attempts=options.max_attempts,
                identity=run_identity,
                content=report.digest,
                answered=rows.states(report.total),
                answered_usage=rows.usage(),
            )
            jobs = self._jobs(file, defaults, report, batch_id, rows)
            batch_id, total, *_ = store.submit(jobs, new)
            queued = total - len(new.answered.replace(b"\0", b""))
        else:
            say(f"continuing batch {batch_id}")
            store.resume(batch_id)
            if options.max_attempts is not None:
                store.set_max_attempts(batch_id, options.max_attempts)
            if options.retry_failed:
                again = store.requeue_failed(batch_id)
                say(f"calling {again:,} failed rows again")
            if options.skip_invalid and report.bad:
                for _ in self._jobs(file, defaults, report, batch_id, rows):
                    pass
            queued = 0 if store.status(batch_id).state is BatchState.FINISHED else settings.slice_size
        self._invalid = report.bad
        return batch_id, queued

    def _jobs(self, file: BinaryIO, defaults: Defaults, report: Report, batch_id: str, rows: Rows) -> Iterator[Request]:
        """The good lines; bad ones go to the error file. Raises `UsageError` when they are not those that were judged."""
        file.seek(0)
        for number, found in requests(file, defaults, self._settings.max_line_bytes, report):
            if isinstance(found, InvalidLine):
                rows.invalid(batch_id, number, found)
            else:
                yield found

    # -- to its end

    def _watch(self, batch_id: str, rows: Rows, errors: Path, opened_at: float) -> int:
        assert self._connection is not None
        watch = Watch(self._connection, batch_id, rows, self._workers, self._simulation, self._interrupts, opened_at)
        try:
            finished = watch.watch(display(self._options.quiet, self._settings))
        finally:
            rows.close()
            self._summary(watch.status)
        if not finished:
            if watch.paused and not self._interrupts.count:
                raise MimoqError(
                    f"{watch.paused}; see {errors}, then run the same command again "
                    "(with --retry-failed to call these again too)"
                )
            return self._interrupts.status
        status = watch.status
        if (missing := status.total - rows.count()) > 0:
            say(f"{missing:,} rows have no result any more; run with --fresh to call them again")
            return 1
        return 1 if status.total - status.succeeded + self._invalid else 0

    def _summary(self, status: BatchStatus) -> None:
        failed = status.failed + self._invalid
        elapsed_s = time.monotonic() - self._started
        if not self._options.quiet:
            say(
                f"batch {status.batch_id}: {status.succeeded:,} of {status.total + self._invalid:,} succeeded, "
                f"{failed:,} failed, {status.usage.total_tokens:,} tokens, {elapsed_s:.1f} s"
            )
        self._tell(status)

    def _tell(self, status: BatchStatus | None) -> None:
        """The object of `--json`, the last line on stdout; of zeros where there is no batch."""
        self._told = True
        if not self._options.json:
            return
        usage = status.usage if status is not None else Usage()
        summary = {
            "batch": status.batch_id if status is not None else None,
            "total": status.total + self._invalid if status is not None else 0,
            "succeeded": status.succeeded if status is not None else 0,
            "failed": status.failed + self._invalid if status is not None else 0,
            "cancelled": status.cancelled if status is not None else 0,
            "expired": status.expired if status is not None else 0,
            "attempts": status.attempts if status is not None else 0,
            "usage": {name: getattr(usage, name) for name in type(usage).__struct_fields__},
            "elapsed_s": round(time.monotonic() - self._started, 3),
        }
        try:
            print(msgspec.json.encode(summary).decode(), flush=True)
        except OSError as error:
            raise MimoqError(f"stdout can't be written: {error.strerror}") from None

    def _close(self) -> None:
        self._workers.end()
        if self._simulation is not None:
            self._simulation.stop()
        if self._connection is not None:
            self._connection.close()
