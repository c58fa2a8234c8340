"""`mimoq run`: a file of requests in, a file of answers out, through the store and worker processes of its own.

The way of a run: judge the whole input, look at what the output already holds, open the store, create or continue the
batch, start workers, write rows as jobs end. What goes wrong is told in one line, and the same command run again goes
on where it stopped: the output file is the truth for rows in it, the store for everything else.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from jobs import identity
from jobs.errors import KeyRefused, MimoqError, StoreUnavailable, UsageError
from jobs.requests import CHAT, ENDPOINTS, InvalidLine, Request
from jobs.settings import PREFIX, Settings
from jobs.states import BatchState
from jobs.store import BatchStatus, NewBatch
from jobs.workers import gate_of, live_workers, open_gate
from producers.connection import Connection
from producers.follow import Follower, Listener
from producers.output import check_paths, default_output, error_file
from producers.progress import Rates, View, display
from producers.reader import Defaults, Report, requests, validate
from producers.rows import Rows
from producers.simulation import Simulation
from producers.workers import Workers

#: Seconds between looks at workers, gates and the display.
TICK_S = 0.25
#: Seconds a wait for a message lasts at most, so that signals are seen.
LISTEN_S = 0.1
#: Seconds a run waits for a store that is away.
PATIENCE_S = 60.0
#: Rows written to the output files together.
WRITE_ROWS = 200
#: Reasons of a gate that end a run whose first calls met it.
REFUSALS = ("key_refused", "forbidden")


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


def say(line: str) -> None:
    """A line for a person, on stderr."""
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def opened_input(source: str, data_dir: Path) -> Iterator[tuple[BinaryIO, Path | None]]:
    """The input as a file that can be read twice; standard input is spooled to the data folder.

    Yields `(file, its path or None)`. Raises `UsageError` with one line.
    """
    if source == "-":
        if sys.stdin is None:
            raise UsageError("standard input is closed")
        try:
            data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            spool: Any = tempfile.TemporaryFile(dir=data_dir)  # noqa: SIM115 - closed below, with its errors
        except OSError as error:
            raise UsageError(f"{data_dir}: {error.strerror}; choose another --data-dir") from None
        try:
            try:
                shutil.copyfileobj(sys.stdin.buffer, spool, 1 << 20)
                spool.flush()
            except OSError as error:
                raise MimoqError(f"standard input can't be kept in {data_dir}: {error.strerror}") from None
            yield spool, None
        finally:
            with contextlib.suppress(OSError):  # what a full disk left in its buffer
                spool.close()
        return
    path = Path(source)
    try:
        if path.is_dir():
            raise UsageError(f"{path} is a folder; give a file of JSON lines")
        file = path.open("rb")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    with file:
        if not file.seekable():
            raise UsageError(f"{path} can be read only once; give it as standard input: mimoq run - < {path}")
        yield file, path


def judge(file: BinaryIO, defaults: Defaults, settings: Settings, skip_invalid: bool, quiet: bool = False) -> Report:
    """One full pass over the input; says what is wrong. Raises `UsageError` when nothing may be submitted."""
    file.seek(0)
    try:
        report = validate(file, defaults, settings.max_line_bytes)
    except OSError as error:
        raise UsageError(f"the input can't be read: {error.strerror}") from None
    if not quiet:
        for warning in report.warnings:
            say(f"warning: {warning}")
    if report.ok or (skip_invalid and report.total):
        return report
    for problem in report.problems:
        say(problem)
    if report.bad > len(report.problems):
        say(f"... and {report.bad - len(report.problems):,} more")
    if report.bad:
        hint = "" if skip_invalid or not report.total else "; mend them, or run the good ones with --skip-invalid"
        raise UsageError(f"{report.bad:,} bad lines, nothing was submitted{hint}")
    raise UsageError("nothing was submitted")


class Patience:
    """How long a run waits for a store that is away, and what it says meanwhile."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._since: float | None = None

    def found(self) -> None:
        """The store answers."""
        if self._since is not None:
            self._since = None
            say("the store answers again")

    def lost(self, error: StoreUnavailable) -> None:
        """It does not. Raises the error after `PATIENCE_S`, or `EmbeddedServerError` when ours is given up."""
        now = time.monotonic()
        if self._since is None:
            self._since = now
            say(f"waiting for the store: {error}")
        elif now - self._since > PATIENCE_S:
            raise error
        if self._connection.server is not None:
            self._connection.server.ensure()


class Run:
    """One run, from its options to its exit status."""

    def __init__(self, options: RunOptions, settings: Settings, workers: Workers) -> None:
        self._options = options
        self._settings = settings
        self._started = workers.since
        self._interrupts = 0
        self._terminated = False
        self._following = False
        self._status: BatchStatus | None = None  # the last look
        self._prepared = workers
        self._workers: Workers | None = None  # once there are any of our own
        self._simulation: Simulation | None = None
        self._connection: Connection | None = None
        self._rows = 0
        self._invalid = 0

    def run(self) -> int:
        """Does it all; returns the exit status. Raises `MimoqError` where a line says it all."""
        options = self._options
        if options.endpoint not in ENDPOINTS:
            raise UsageError(f"--endpoint must be one of {', '.join(ENDPOINTS)}")
        if options.simulate:
            say("simulating: the answers come from mimoq's own simulator on this machine, not from MiMo")
        elif self._settings.api_key is None:
            raise UsageError(f"no API key: set {PREFIX}API_KEY, or try it out with --simulate")
        with opened_input(options.source, self._settings.data_dir) as (file, path), self._signals():
            if path is None and options.output is None:
                raise UsageError("standard input has no name to derive the output's from: give it with -o")
            output = options.output if options.output is not None else default_output(path or Path("-"))
            errors = options.errors if options.errors is not None else error_file(output)
            check_paths(path, output, errors)
            try:
                return self._run(file, output, errors)
            except KeyboardInterrupt:
                return self._stopped()
            finally:
                self._close()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def interrupt(number: int, _: Any) -> None:
            self._interrupts += 1
            self._terminated = number == signal.SIGTERM
            if not self._following or self._interrupts > 2:
                raise KeyboardInterrupt  # nothing is under way that must end well

        before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _run(self, file: BinaryIO, output: Path, errors: Path) -> int:
        options, settings = self._options, self._settings
        if options.simulate:
            self._simulation = Simulation()
        if options.simulate:
            settings = settings.model_copy(update={"simulated": True})
        own = options.workers if options.workers is not None else (0 if settings.redis_url is not None else 1)
        if options.simulate:
            own = max(own, 1)  # nobody else's worker takes simulated work
        self._connection = Connection(settings)
        defaults = Defaults(options.endpoint, None if settings.endpoint_path else settings.model)
        report = judge(file, defaults, settings, options.skip_invalid)
        label = identity.label(settings)
        run_identity = identity.run_identity(report.digest, options.endpoint, defaults.model, label)
        rows = Rows(output, errors, run_identity)
        try:
            batch_id = self._batch(file, defaults, report, run_identity, label, rows)
            if own and self._connection.store.status(batch_id).state is not BatchState.FINISHED:
                self._begin_workers(own, settings)
            return self._follow(batch_id, rows)
        except MimoqError:
            if self._status is not None:
                self._summary(self._status)
            raise
        finally:
            rows.close()

    def _begin_workers(self, count: int, settings: Settings) -> None:
        variables = {}
        for name in settings.model_fields_set | {"data_dir", "simulated"}:
            value = getattr(settings, name)
            if value is not None:
                shown = value.get_secret_value() if hasattr(value, "get_secret_value") else value
                variables[PREFIX + name.upper()] = str(shown)
        variables[f"{PREFIX}DATA_DIR"] = str(settings.data_dir.resolve())
        if self._simulation is not None:
            variables[f"{PREFIX}BASE_URL"] = self._simulation.wait()
            variables[f"{PREFIX}API_KEY"] = "simulated"
        settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._workers = self._prepared
        self._workers.begin(count, variables, settings.data_dir.resolve() / "worker.log", settings.drain_s)

    # -- the batch

    def _batch(
        self, file: BinaryIO, defaults: Defaults, report: Report, run_identity: str, label: str, rows: Rows
    ) -> str:
        """The batch of this input: the one that is there, or a new one with everything the output does not hold."""
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
            batch_id, total, _ = store.submit(jobs, new)
            queued = total - len(new.answered.replace(b"\0", b""))
        else:
            say(f"continuing batch {batch_id}")
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
        self._connection.ring(batch_id, "bulk", label, queued)
        return batch_id

    def _jobs(self, file: BinaryIO, defaults: Defaults, report: Report, batch_id: str, rows: Rows) -> Iterator[Request]:
        """The good lines; bad ones go to the error file. Raises `UsageError` when they are not those that were judged."""
        file.seek(0)
        good = bad = 0
        for number, found in requests(file, defaults, self._settings.max_line_bytes, self._options.skip_invalid):
            if isinstance(found, InvalidLine):
                bad += 1
                rows.invalid(batch_id, number, found)
            else:
                good += 1
                yield found
        if (good, bad) != (report.total, report.bad):
            raise UsageError("the input changed while it was read, nothing was submitted")

    # -- following it

    def _follow(self, batch_id: str, rows: Rows) -> int:
        assert self._connection is not None
        connection, store, workers = self._connection, self._connection.store, self._workers
        account = identity.account_of(self._settings)
        if self._simulation is None:
            open_gate(connection.client, account)
        self._following = True
        first = self._status = store.status(batch_id)
        follower = Follower(store, batch_id, rows.written)
        if workers is None and first.state is not BatchState.FINISHED:
            self._look_for_workers(identity.label(self._settings))
        shown = display(self._options.quiet)
        rates = Rates()
        next_tick = 0.0
        patience = Patience(self._connection)
        status = first
        with contextlib.closing(shown), Listener(store, batch_id) as listener:
            while True:
                leaving = bool(self._interrupts) and self._leave()
                written = more = False
                try:
                    status = self._status = store.status(batch_id)
                    # What had ended by the look above is read below, so a finished batch leaves nothing behind.
                    written = _write(follower, rows)
                    more = not written
                    now = time.monotonic()
                    if now >= next_tick:
                        next_tick = now + TICK_S
                        if connection.server is not None:
                            connection.server.ensure()
                        if workers is not None:
                            workers.ensure()
                        if self._simulation is not None:
                            self._simulation.check()
                        shown.show(self._view(status, rates, now, account))
                        self._check_key(first, status, account)
                    patience.found()
                except StoreUnavailable as error:
                    patience.lost(error)
                if leaving and (written or self._interrupts > 1):
                    self._summary(status)
                    return self._stopped()
                if status.state is BatchState.FINISHED and written:
                    shown.show(self._view(status, rates, time.monotonic(), account))
                    break
                if not more:
                    listener.wait(LISTEN_S)
        rows.close()
        self._summary(status)
        if (missing := status.total - rows.count()) > 0:
            say(f"{missing:,} rows have no result any more; run with --fresh to call them again")
            return 1
        return 1 if status.total - status.succeeded + self._invalid else 0

    def _look_for_workers(self, label: str) -> None:
        assert self._connection is not None
        alive = [worker for worker in live_workers(self._connection.client) if "bulk" in worker.lanes]
        if any(worker.label == label for worker in alive):
            return
        if alive:
            others = ", ".join(sorted({worker.upstream for worker in alive}))
            say(f"no live worker calls this upstream (those alive call {others}); start one, or give --workers 1")
        else:
            say("no live worker: start one with `mimoq worker`, or give --workers 1; waiting")

    def _view(self, status: BatchStatus, rates: Rates, now: float, account: str) -> View:
        assert self._connection is not None
        label = identity.label(self._connection.settings)
        mine = [worker for worker in live_workers(self._connection.client) if worker.label == label]
        jobs_per_s, tokens_per_min = rates.add(status.ended, status.usage.total_tokens, now)
        left = status.total - status.ended
        gate = gate_of(self._connection.client, account)
        held_back = ", ".join(sorted({bound for worker in mine for bound in worker.bounds}))
        if gate is not None:
            held_back = f"gate: {gate.reason}, next probe in {max(0.0, gate.until - time.time()):.0f} s"
        if not mine:
            held_back = "no worker yet"
        return View(
            status,
            sum(worker.in_flight for worker in mine),
            jobs_per_s,
            tokens_per_min,
            left / jobs_per_s if jobs_per_s > 0 else None,
            held_back,
        )

    def _check_key(self, first: BatchStatus, status: BatchStatus, account: str) -> None:
        """Ends the run when its first calls are refused for the key; no job has failed for it."""
        assert self._connection is not None
        if self._simulation is not None or status.succeeded > first.succeeded:
            return
        gate = gate_of(self._connection.client, account)
        if gate is not None and gate.reason in REFUSALS:
            self._prepared.end()
            self._status = self._connection.store.status(status.batch_id)
            raise KeyRefused(
                f"the upstream refuses the API key ({gate.status}): no job failed for it; "
                f"set another {PREFIX}API_KEY and run the same command again"
            )

    # -- ending

    def _leave(self) -> bool:
        """After Ctrl-C: whether it is time to go. Once: calls in flight end first. Twice: at once."""
        workers = self._workers
        if workers is None:
            return True
        if self._interrupts > 1:
            workers.kill()
            return True
        if not workers.stopping:
            say("stopping: calls in flight get up to 30 s to end; Ctrl-C again to leave now")
            workers.stop()
        return workers.alive == 0

    def _stopped(self) -> int:
        return 143 if self._terminated else 130

    def _summary(self, status: BatchStatus) -> None:
        elapsed_s = time.monotonic() - self._started
        failed = status.failed + self._invalid
        if not self._options.quiet:
            say(
                f"batch {status.batch_id}: {status.succeeded:,} of {status.total + self._invalid:,} succeeded, "
                f"{failed:,} failed, {status.usage.total_tokens:,} tokens, {elapsed_s:.1f} s"
            )
        if self._options.json:
            usage = status.usage
            summary = {
                "batch": status.batch_id,
                "total": status.total + self._invalid,
                "succeeded": status.succeeded,
                "failed": failed,
                "cancelled": status.cancelled,
                "expired": status.expired,
                "attempts": status.attempts,
                "usage": {name: getattr(usage, name) for name in type(usage).__struct_fields__},
                "elapsed_s": round(elapsed_s, 3),
            }
            sys.stdout.write(msgspec.json.encode(summary).decode() + "\n")
            sys.stdout.flush()

    def _close(self) -> None:
        self._prepared.end()
        if self._simulation is not None:
            self._simulation.stop()
        if self._connection is not None:
            self._connection.close()


def _write(follower: Follower, rows: Rows) -> bool:
    """Writes rows of jobs that have ended, for a tick at most; whether those were all."""
    end = time.monotonic() + TICK_S
    while (ended := follower.ready(WRITE_ROWS)) is not None:
        rows.write(ended)
        if time.monotonic() > end:
            return False
    return True
