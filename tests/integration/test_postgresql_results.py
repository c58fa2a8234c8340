"""What PostgreSQL alone has of result backends: a table that is made and shared, statements, rights."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest

from jobs.backends import ResultBackend
from jobs.errors import StoreRefused, StoreUnavailable
from tests.components import PostgreSQL
from tests.integration.backend_stand import (
    Place,
    failure,
    on,
    one,
    success,
)


@on("postgresql")
def test_the_same_write_again_changes_nothing(backend: ResultBackend, place: Place, postgresql: PostgreSQL) -> None:
    made = [("a-0", success("a-0")), ("a-1", failure("a-1"))]
    with postgresql.connect() as connection:

        def rows() -> list[Any]:
            return connection.execute(
                "SELECT id, xmin::text, ctid::text FROM celery_taskmeta ORDER BY task_id"
            ).fetchall()

        backend.write(made)
        before = rows()
        backend.write(made)
        assert rows() == before
        assert len(before) == 2


@on("postgresql")
def test_only_what_a_row_holds_is_refused(place: Place, backend: ResultBackend, postgresql: PostgreSQL) -> None:
    """Not one for which the table has no number left, which the server says in words of the same kind."""
    long = "x" * 200
    with pytest.raises(ValueError, match="22001"):
        backend.write([("a-0", success("a-0")), (long, success(long))])
    with postgresql.connect() as connection:
        connection.execute("SELECT setval('task_id_sequence', 2147483647)")
        with pytest.raises(StoreUnavailable, match="22003"):
            backend.write([("a-0", success("a-0"))])
        connection.execute("ALTER SEQUENCE task_id_sequence MAXVALUE 2147483648")
        with pytest.raises(StoreUnavailable, match="2200H"):
            backend.write([("a-0", success("a-0"))])


@on("postgresql")
def test_workers_that_start_at_once_make_one_table(place: Place, postgresql: PostgreSQL) -> None:
    opened = [place.open() for _ in range(4)]
    assert opened[0].read(["a-0"]) == [None], "a reader finds nothing, and makes nothing"
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda backend: backend.check(), opened))
    opened[0].write([("a-0", success("a-0"))])
    postgresql.flush()  # somebody drops it while they run
    opened[1].cleanup(500, [])
    opened[1].delete(["a-0"])
    opened[1].write([("a-0", success("a-0"))])
    assert one(opened[2], "a-0").status == "SUCCESS"
    for backend in opened:
        backend.close()


@on("postgresql")
def test_a_table_that_celery_has_made(place: Place, postgresql: PostgreSQL) -> None:
    with closing(place.reader()) as app:
        app.backend.store_result("theirs", {"a": 1}, "SUCCESS")
        with closing(place.open()) as backend:
            assert backend.read(["a-0"]) == [None]
            backend.check()
            backend.write([("a-0", success("a-0"))])
            assert one(backend, "a-0").status == "SUCCESS"
            assert one(backend, "theirs").mimoq is None
        app.backend.store_result("more", {"a": 2}, "SUCCESS")
        assert app.AsyncResult("more").get(timeout=5) == {"a": 2}


@on("postgresql")
def test_what_waiting_does_not_help_is_said_in_one_line(place: Place, postgresql: PostgreSQL) -> None:
    with postgresql.connect() as connection:
        connection.execute("DROP ROLE IF EXISTS worker")
        connection.execute("CREATE ROLE worker LOGIN PASSWORD 'right'")
    made = {
        postgresql.url_of("worker:secret"): "authentication failed",
        postgresql.url_of("worker:right", "nowhere"): "database does not exist",
        postgresql.url_of("worker:right"): "CREATE on the schema",
    }
    for url, word in made.items():
        with closing(Place("p", url).open()) as backend, pytest.raises(StoreRefused, match=word) as raised:
            backend.check()
        assert "secret" not in str(raised.value)
        assert "\n" not in str(raised.value)
    with closing(place.reader()) as app:
        app.backend.store_result("theirs", 1, "SUCCESS")  # the table is another's, without our column
    with postgresql.connect() as connection:
        connection.execute("GRANT USAGE ON SCHEMA public TO worker")
        connection.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO worker")
    with closing(Place("p", postgresql.url_of("worker:right")).open()) as backend:
        with pytest.raises(StoreRefused, match="ADD COLUMN IF NOT EXISTS mimoq"):
            backend.check()
        with closing(place.open()) as owner:
            owner.check()
        backend.check()
        with pytest.raises(StoreRefused, match="rights"):
            backend.write([("a-0", success("a-0"))])
