"""What the commands of the command line share: options, their settings, their store."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from jobs.settings import Settings
    from producers.connection import Connection

DataDir = Annotated[Path | None, typer.Option("--data-dir", metavar="DIR", help="Folder of the embedded Valkey.")]


def effective(**overrides: Any) -> Settings:
    """The settings under a command's own options. Raises `UsageError`."""
    from jobs.settings import load_settings

    return load_settings(**overrides)


@contextlib.contextmanager
def connected(settings: Settings) -> Iterator[Connection]:
    """The store of the settings, waited for with a line on stderr."""
    from producers.connection import Connection
    from producers.source import say

    connection = Connection(settings, say)
    try:
        yield connection
    finally:
        connection.close()
