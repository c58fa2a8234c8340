"""The page of figures: where each benchmark's section stands, and with which machine and versions it was measured."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

import psutil

from jobs.guard import server_program

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
LIBRARIES = ("celery", "kombu", "redis", "pydantic", "msgspec", "typer")


def circumstances() -> str:
    """Date, machine and versions."""
    valkey = subprocess.run([server_program(), "--version"], capture_output=True, text=True, check=True).stdout
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    memory_gb = psutil.virtual_memory().total / 1e9
    return (
        f"{time.strftime('%Y-%m-%d')}, {_processor()}, {os.cpu_count()} cores, {memory_gb:.0f} GB, "
        f"{platform.system()} {platform.release()}; Python {platform.python_version()}, {named(valkey)}, {libraries}."
    )


def named(said: str) -> str:
    """`Valkey 9.1.0` of `Valkey server v=9.1.0 sha=...`."""
    name, *words = said.split()
    return next((f"{name} {word.removeprefix('v=')}" for word in words if word.startswith("v=")), name)


def _processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def write(name: str, told: str, page: Path = PAGE) -> None:
    """Puts this run's section where that benchmark's last one stands, or at the end of the page."""
    text = page.read_text() if page.exists() else ""
    page.write_text(placed(text, name, told))


def placed(text: str, name: str, told: str) -> str:
    """A page with this section between its marks; without marks, it comes to the end."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    section = f"{begin}\n\n{told}\n{end}\n"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        return f"{text.rstrip()}\n\n{section}".lstrip()
    return before + section + after.removeprefix("\n")
