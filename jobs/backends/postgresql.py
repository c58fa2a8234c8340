"""Results in PostgreSQL: rows of Celery's own table, written by one statement a flush.

A row is what Celery's database backend writes, so that any Celery app on that backend reads it. What is kept beside the
answer (`jobs.results.About`) stands in one more column, `mimoq`, that Celery's readers pass over.

What goes wrong: the server is away, or stands still; a call gives up after some seconds of silence, and is tried once on a
new connection where an idle one had been cut meanwhile. Nothing expires by itself here: `cleanup` deletes what is old.
"""

from __future__ import annotations

import re
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any, LiteralString, TypeVar

import msgspec
import psycopg
from psycopg import errors, sql

from jobs.backends.base import HINT, Memory
from jobs.connections import CONNECT_TIMEOUT_S, SOCKET_TIMEOUT_S
from jobs.errors import StoreFull, StoreRefused, StoreUnavailable, UsageError
from jobs.results import NO_BODY_JSON, StoredResult, compressed, decode_about, split, unpack

#: Connections of one process, at most.
CONNECTIONS = 8
#: Rows deleted in one statement of a cleanup.
CLEANUP_ROWS = 5_000
#: How much of the time that a server may say nothing a statement of a cleanup may take.
BOUND = 0.8
#: Number of the lock under which the table is made: "mimoq" in ASCII.
LOCK = 0x6D696D6F71
#: Seconds that another process may take to make the table.
MAKE_S = 60.0

COLUMN = "ALTER TABLE celery_taskmeta ADD COLUMN IF NOT EXISTS mimoq bytea"

#: The order of rows is the same in each statement, so that two of them never wait for each other's. An answer is replaced by
#: nothing but an answer, as in Celery's own backends: of two writes under way at once, the failure of the one may come after
#: the answer of the other, which has been paid for and is what readers are to have.
WRITE = """
INSERT INTO celery_taskmeta AS kept (id, task_id, status, result, date_done, mimoq)
SELECT nextval('task_id_sequence'), new.* FROM unnest(
    %b::text[], %b::text[], %b::bytea[], %b::timestamp[], %b::bytea[]
) AS new (task_id, status, result, date_done, mimoq)
ON CONFLICT (task_id) DO UPDATE SET status = excluded.status, result = excluded.result, date_done = excluded.date_done,
    mimoq = excluded.mimoq, traceback = NULL, children = NULL
WHERE (kept.status, kept.result, kept.date_done, kept.mimoq)
    IS DISTINCT FROM (excluded.status, excluded.result, excluded.date_done, excluded.mimoq)
    AND (kept.status IS DISTINCT FROM 'SUCCESS' OR excluded.status = 'SUCCESS')
"""
READ = "SELECT task_id, status, result, date_done, mimoq FROM celery_taskmeta WHERE task_id = ANY(%b)"
DELETE = "DELETE FROM celery_taskmeta WHERE task_id = ANY(%b)"
DELETE_FAILURES = f"{DELETE} AND status IS DISTINCT FROM 'SUCCESS'"
#: A job's id is its batch's, a hyphen and a number.
CLEANUP = """
DELETE FROM celery_taskmeta WHERE id IN (
    SELECT id FROM celery_taskmeta WHERE date_done < %s AND rtrim(task_id, '0123456789') <> ALL(%s) LIMIT %s
)
"""
LIMIT = "SELECT set_config('statement_timeout', %s, true)"
CLEANUP_GROUPS = "DELETE FROM celery_tasksetmeta WHERE date_done < %s"
MADE = """
SELECT to_regclass('celery_taskmeta') IS NOT NULL, to_regclass('celery_tasksetmeta') IS NOT NULL,
    EXISTS (SELECT FROM pg_attribute
        WHERE attrelid = to_regclass('celery_taskmeta') AND attname = 'mimoq' AND NOT attisdropped)
"""

#: What a server says, before it has a code for it, that no waiting changes.
_REFUSALS = re.compile(
    r"authentication failed|no password supplied|no pg_hba\.conf entry|(role|database) \".*\" does not exist"
    r"|permission denied for database|Name or service not known|nodename nor servname"
)

#: Classes of codes (data exception, limit exceeded) with which it refuses a statement for what that holds; but not the codes
#: of a table that has no number left for a row.
_CONTENT = ("22", "54")
_NO_NUMBER = ("2200H", "22003")

#: The table, or our column in it, is not there.
_NOT_MADE = (errors.UndefinedTable, errors.UndefinedColumn)

T = TypeVar("T")


class _Connection(psycopg.Connection[tuple[Any, ...]]):
    """A connection on which silence is an error: a server that stands still would hold a thread for ever."""

    silent_s = SOCKET_TIMEOUT_S

    def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
        return super().wait(gen, interval, self.silent_s if timeout is None else timeout)


class PostgreSQLResults:
    """Results in the PostgreSQL that this address names, as Celery spells it; their answers compressed where `compress`.

    Raises `UsageError` when the address can't be read.
    """

    name = "PostgreSQL"
    with_state = False
    compressed = False  # a value is taken apart before it is kept
    expires = False

    def __init__(self, url: str, compress: bool = True, silent_s: float = SOCKET_TIMEOUT_S) -> None:
        self._compress = compress
        self._silent_s = silent_s
        self._idle: list[_Connection] = []
        self._places = threading.BoundedSemaphore(CONNECTIONS)
        self._lock = threading.Lock()
        conninfo = "postgresql://" + url.partition("://")[2]
        try:
            options: dict[str, Any] = psycopg.conninfo.conninfo_to_dict(conninfo)
        except psycopg.ProgrammingError:  # whose message may hold a part of the password
            raise UsageError(
                "MIMOQ_RESULT_BACKEND: can't be read; in its user and password, write /, #, ?, @ and : as %2F and so on"
            ) from None
        options.setdefault("connect_timeout", round(min(CONNECT_TIMEOUT_S, max(silent_s, 2.0))))
        options.setdefault("application_name", "mimoq")
        options.setdefault("keepalives_idle", 15)
        self._conninfo = psycopg.conninfo.make_conninfo(**options)

    # -- results

    def check(self) -> None:
        """Sees that Celery's table is there, with our column. Raises `StoreRefused` where it may not be made."""
        if not all(self._call(_made)):
            with self._errors():
                self._make()

    def read(self, job_ids: Sequence[str]) -> list[StoredResult | None]:
        """One statement; a table that nobody has made yet holds nothing."""
        if not job_ids:
            return []
        rows: list[tuple[Any, ...]] = []
        with suppress(*_NOT_MADE):
            rows = self._call(lambda connection: connection.execute(READ, (list(job_ids),), binary=True).fetchall())
        found = {row[0]: row for row in rows}
        return [_stored(found[job_id]) if job_id in found else None for job_id in job_ids]

    def packed(self, job_ids: Sequence[str]) -> None:
        """They are taken apart."""

    def write(self, results: Sequence[tuple[str, bytes]]) -> None:
        """One statement, and one commit. Raises `ValueError` when it refuses one of them for what that holds."""
        if not results:
            return
        columns = list(zip(*(self._row(job_id, value) for job_id, value in sorted(dict(results).items())), strict=True))

        def write(connection: _Connection) -> None:
            connection.execute(WRITE, [list(column) for column in columns])

        try:
            self._call(write)
        except _NOT_MADE:  # somebody has dropped it since this process began
            self.check()
            self._call(write)

    def _row(self, job_id: str, payload: bytes) -> tuple[str, str, bytes, datetime, bytes | None]:
        parts = split(payload)
        done = datetime.fromisoformat(parts.date_done) if parts.date_done else datetime.now(UTC).replace(tzinfo=None)
        result = compressed(parts.result) if self._compress else parts.result
        return job_id, parts.status, result, done, parts.about or None

    def delete(self, job_ids: Sequence[str]) -> None:
        """One statement."""
        self._delete(DELETE, job_ids)

    def delete_failures(self, job_ids: Sequence[str]) -> None:
        """One statement."""
        self._delete(DELETE_FAILURES, job_ids)

    def _delete(self, statement: LiteralString, job_ids: Sequence[str]) -> None:
        if job_ids:
            with suppress(*_NOT_MADE):
                self._call(lambda connection: connection.execute(statement, (list(job_ids),)))

    def keep(self, job_ids: Sequence[str]) -> None:
        """Nothing: none goes by itself."""

    def expire(self, job_ids: Sequence[str], at: int) -> None:
        """Nothing: `cleanup` takes away what is old."""

    def cleanup(self, ttl_s: float, kept: Sequence[str]) -> None:
        """What Celery's own cleanup does, some rows at a time, but for the jobs of batches that are still kept."""
        before = datetime.fromtimestamp(time.time() - ttl_s, UTC).replace(tzinfo=None)
        batches = [f"{batch_id}-" for batch_id in kept]

        with suppress(*_NOT_MADE):
            while self._bounded(CLEANUP, (before, batches, CLEANUP_ROWS)) == CLEANUP_ROWS:
                pass
            self._bounded(CLEANUP_GROUPS, (before,))

    def _bounded(self, statement: LiteralString, values: tuple[Any, ...]) -> int:
        """How many rows a statement changed that the server ends before it is given up on here, and would go on there."""

        def work(connection: _Connection) -> int:
            # In a transaction, so that a pooler's other clients have nothing of it; one that fails ends with its connection.
            connection.execute("BEGIN")
            connection.execute(LIMIT, (f"{round(BOUND * 1000 * self._silent_s)}",))
            count = connection.execute(statement, values).rowcount
            connection.execute("COMMIT")
            return count

        return self._call(work)

    def memory(self) -> Memory | None:
        """None: it is a matter of disks."""
        return None

    def close(self) -> None:
        """Ends the connections that nobody uses."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    # -- connections

    def _call(self, work: Callable[[_Connection], T]) -> T:
        """What `work` returns, in a transaction of its own; on a new connection where an idle one turns out to be cut."""
        with self._errors():
            if not self._places.acquire(timeout=self._silent_s):
                raise StoreUnavailable(f"PostgreSQL does not answer: {CONNECTIONS} calls wait for it; {HINT}")
            try:
                while True:
                    with self._lock:
                        connection = self._idle.pop() if self._idle else None
                    fresh = connection is None
                    connection = connection or self._connect()
                    try:
                        found = work(connection)
                    except psycopg.OperationalError as error:
                        cut = connection.closed
                        connection.close()
                        if fresh or not cut or isinstance(error, errors._WaitTimeout):
                            raise
                        continue  # and so on with the others that lie there
                    except BaseException:
                        connection.close()
                        raise
                    with self._lock:
                        self._idle.append(connection)
                    return found
            finally:
                self._places.release()

    def _connect(self) -> _Connection:
        # No prepared statements: a pooler such as pgbouncer may stand between.
        connection = _Connection.connect(self._conninfo, autocommit=True, prepare_threshold=None)
        connection.silent_s = self._silent_s
        return connection

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except _NOT_MADE:
            raise  # for who can make it, or knows that nothing is there yet
        except errors.InsufficientPrivilege:
            raise StoreRefused(f"PostgreSQL does not allow its user what mimoq needs: {HINT} and its rights") from None
        except errors.DiskFull:
            raise StoreFull("PostgreSQL's disk is full: make room there; nothing was lost") from None
        except errors.ReadOnlySqlTransaction:
            raise StoreUnavailable(f"PostgreSQL takes no writes, as a standby does: {HINT}") from None
        except errors.QueryCanceled:
            raise StoreUnavailable("PostgreSQL took too long over a statement, which was ended") from None
        except psycopg.Error as error:
            if _refuses_content(error):  # not chained: what it says may hold that
                raise ValueError(f"PostgreSQL refuses a result ({error.sqlstate or type(error).__name__})") from None
            if not isinstance(error, psycopg.OperationalError):
                raise StoreUnavailable(
                    f"PostgreSQL refuses a statement ({error.sqlstate or type(error).__name__}): {HINT}; nothing was lost"
                ) from None
            said = str(error)
            if error.sqlstate is None and (found := _REFUSALS.search(said)):
                raise StoreRefused(f"PostgreSQL refuses the connection ({_plain(found[0])}): {HINT}") from None
            raise StoreUnavailable(
                f"PostgreSQL does not answer ({type(error).__name__.lstrip('_')}): {HINT}; nothing was lost"
            ) from None

    # -- the table

    def _make(self) -> None:
        """Makes what is missing, one process at a time; other Celery apps may be about the same."""
        with _Connection.connect(self._conninfo, autocommit=True) as connection:
            connection.silent_s = MAKE_S
            connection.execute("SELECT pg_advisory_lock(%s)", (LOCK,))
            table, groups, column = _made(connection)
            try:
                if not (table and groups):
                    self._make_tables()
                if not column:
                    connection.execute(sql.SQL(COLUMN))
            except (
                errors.InsufficientPrivilege,
                errors.InvalidSchemaName,
            ):  # as of one that may not look into it either
                missing = f"have its owner run: {COLUMN}" if table and groups else "give it CREATE on the schema"
                raise StoreRefused(
                    f"PostgreSQL's user may not make the table of results as mimoq needs it: {missing}"
                ) from None

    def _make_tables(self) -> None:
        """Celery's own tables, as its own backend makes them."""
        from celery.backends.database.models import Task, TaskSet
        from celery.backends.database.session import ResultModelBase
        from sqlalchemy import create_engine
        from sqlalchemy.exc import DBAPIError
        from sqlalchemy.pool import NullPool

        engine = create_engine(
            "postgresql+psycopg://", creator=lambda: psycopg.connect(self._conninfo), poolclass=NullPool
        )
        for tries in range(1, 6):
            try:
                ResultModelBase.metadata.create_all(engine, tables=[Task.__table__, TaskSet.__table__])
                return
            except DBAPIError as error:
                # A Celery app that makes them at this moment, without our lock: the next look finds them.
                if isinstance(error.orig, errors.InsufficientPrivilege | errors.InvalidSchemaName) or tries == 5:
                    raise (error.orig or error) from None
                time.sleep(0.1 * tries)


def _refuses_content(error: psycopg.Error) -> bool:
    """Whether a statement fails for what it holds, and would whenever it is sent."""
    if error.sqlstate is None:  # psycopg itself can't send it
        return isinstance(error, psycopg.DataError)
    return error.sqlstate.startswith(_CONTENT) and error.sqlstate not in _NO_NUMBER


def _made(connection: _Connection) -> tuple[bool, bool, bool]:
    """Whether Celery's table of results, that of groups and our column are there."""
    row = connection.execute(MADE).fetchone()
    assert row is not None
    return bool(row[0]), bool(row[1]), bool(row[2])


def _stored(row: tuple[Any, ...]) -> StoredResult:
    task_id, status, result, date_done, about = row
    done = date_done.isoformat() if date_done is not None else None
    try:
        body = unpack(result) if result is not None else NO_BODY_JSON
        return StoredResult(
            status=status,
            task_id=task_id,
            result=msgspec.Raw(body),
            mimoq=decode_about(about, done, body) if about is not None else None,
            # A job that was revoked ended with its batch, whenever that was written down.
            date_done=done if status != "REVOKED" else None,
        )
    except (zlib.error, msgspec.MsgspecError, ValueError) as error:
        raise ValueError(f"a stored result can't be read: {type(error).__name__}") from None


def _plain(said: str) -> str:
    """What a server said, without names that it may hold."""
    return re.sub(r' "[^"]*"', "", said)
