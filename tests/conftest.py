"""What holds for every test: no host but this one, no setting but the test's own; and the real servers they share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests import network
from tests.components import PostgreSQL, RabbitMQ, Valkey

#: Nobody listens on the discard port: a process that a test starts and gives no upstream reaches none.
NO_UPSTREAM = "http://127.0.0.1:9"

network.stay_on_this_machine()

# Nothing is timed: a slow machine is not a failure. In CI its own profile, on which this stands, also fixes the seed.
settings.register_profile("untimed", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


def pytest_configure() -> None:
    """Nothing of the developer's shell gets into a test or a process it starts."""
    for name in list(os.environ):
        if name.upper().startswith("MIMOQ_") or name.lower().endswith("_proxy") or name == "FORCE_COLOR":
            del os.environ[name]
    os.environ["MIMOQ_BASE_URL"] = NO_UPSTREAM
    # A shell has what it starts in the background ignore Ctrl-C, and so would all that is started here.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _away_from_env_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A working directory without a developer's `.env` (or data folder) in it, for tests and their processes."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("cwd"))
    yield
    os.chdir(before)


@pytest.fixture(autouse=True)
def _no_other_host() -> Iterator[None]:
    """Fails a test that reached for another host, even where the code under test took the refusal for an outage."""
    network.refused.clear()
    yield
    assert not network.refused, f"reached for {', '.join(network.refused)}"


@pytest.fixture(scope="session")
def valkey() -> Iterator[Valkey]:
    """A real Valkey, one for the whole session."""
    server = Valkey()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def rabbitmq() -> Iterator[RabbitMQ]:
    """A real RabbitMQ, one for the whole session, as it takes seconds to start."""
    server = RabbitMQ()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    """A real PostgreSQL, one for the whole session; who looks for tables in it flushes it first."""
    server = PostgreSQL()
    yield server
    server.stop()


@pytest.fixture
def store_url(valkey: Valkey) -> str:
    """The `unix://` address of a real, empty Valkey."""
    valkey.flush()
    return valkey.url
