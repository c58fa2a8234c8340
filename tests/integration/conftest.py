"""The result backends that tests ask for by `on` of `backend_stand`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from jobs.backends import ResultBackend
from jobs.connections import connect
from tests.components import PostgreSQL, Valkey
from tests.integration.backend_stand import (
    Place,
)


@pytest.fixture(scope="module")
def other() -> Iterator[Valkey]:
    server = Valkey(durable=True)
    yield server
    with suppress(ProcessLookupError):
        server.go_on()
    server.stop()


@pytest.fixture
def place(request: pytest.FixtureRequest, store_url: str, tmp_path: Path) -> Iterator[Place]:
    """The backend that a test is given by `on`, empty."""
    name = request.param
    if name == "same":
        with closing(connect(store_url)) as client:
            yield Place(name, store_url, store=client)
    elif name == "redis":
        server: Valkey = request.getfixturevalue("other")
        server.flush()
        yield Place(name, server.url, server.kill, server.start, server.pause, server.go_on)
    elif name.startswith("postgresql"):
        database: PostgreSQL = request.getfixturevalue("postgresql")
        database.flush()
        compression = "none" if name.endswith("plain") else "gzip"
        yield Place(
            name, database.url, database.kill, database.start, database.pause, database.go_on, compression=compression
        )
    else:
        yield Place(name, f"file://{tmp_path}")


@pytest.fixture
def backend(place: Place) -> Iterator[ResultBackend]:
    found = place.open()
    found.check()
    yield found
    found.close()
