"""The version of the store's layout: every process looks at it before it touches anything, and says what to do."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs import keys
from jobs.connections import SCHEMA_VERSION, connect
from jobs.errors import SchemaVersionError
from producers import AsyncProducer, Producer
from tests.integration.commands import Box, opened
from tests.integration.worker_stand import CELERY, PATIENCE_S

#: A command of each way to a store; `IN` is a file of requests.
COMMANDS = (
    ("run", "IN"),
    ("submit", "IN"),
    ("status",),
    ("api", "--port", "0"),
    ("serve", "--simulate", "--port", "0"),
    ("worker",),
    ("worker", "--lane", "bulk"),
)
SAID = (
    f"the store has schema version {SCHEMA_VERSION + 1}, this mimoq reads {SCHEMA_VERSION}: use the mimoq that wrote it"
)


@pytest.fixture
def client(store_url: str) -> Iterator[Any]:
    """Of a store that a later mimoq has written."""
    client: Any = connect(store_url)
    client.set(keys.SCHEMA, SCHEMA_VERSION + 1)
    yield client
    client.close()


@pytest.fixture
def box(tmp_path: Path, store_url: str) -> Iterator[Box]:
    with opened(tmp_path / "box", redis_url=store_url, api_key="sk-test") as found:
        found.prompts(3)
        yield found


def untouched(client: Any) -> bool:
    """Whether the store holds what it held, and the broker in the same Redis nothing either."""
    return bool(client.keys("*") == [keys.SCHEMA.encode()] and int(client.get(keys.SCHEMA)) == SCHEMA_VERSION + 1)


def test_every_command_refuses_a_store_of_another_version(client: Any, box: Box) -> None:
    told = [tuple("in.jsonl" if word == "IN" else word for word in words) for words in COMMANDS]
    for number in range(0, len(told), 4):  # a few at a time: each imports what it needs
        for started in [box.start(*words) for words in told[number : number + 4]]:
            started.wait(2)
            assert SAID in started.err
            assert started.out == ""
    assert untouched(client)


def test_celery_itself_refuses_it(client: Any, tmp_path: Path, store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIMOQ_REDIS_URL", store_url)
    done = subprocess.run(
        [sys.executable, "-P", *CELERY], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode == 2, done.stderr
    assert SAID in done.stderr
    assert untouched(client)


def test_a_program_gets_an_error_of_its_own(client: Any, store_url: str) -> None:
    with pytest.raises(SchemaVersionError, match=SAID):
        Producer(redis_url=store_url)

    async def ask() -> None:
        async with AsyncProducer(redis_url=store_url) as producer:
            await producer.status("b")

    with pytest.raises(SchemaVersionError, match=SAID):
        asyncio.run(ask())
    assert untouched(client)
