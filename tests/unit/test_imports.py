"""The import rule of docs/layout.md, as import-linter reads it from pyproject.toml."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

CHECK = """
import sys
from importlinter.cli import lint_imports
sys.exit(lint_imports(config_filename=sys.argv[1], no_cache=True))
"""


def lint(config: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own: it is about modules as they lie in the checkout, not as a test may have changed them."""
    command = [sys.executable, "-c", CHECK, str(config)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_no_folder_imports_what_it_must_not() -> None:
    found = lint(ROOT / "pyproject.toml")
    assert found.returncode == 0, found.stdout + found.stderr


def test_a_breach_would_be_found(tmp_path: Path) -> None:
    config = tmp_path / "rule.toml"
    config.write_text(
        "[tool.importlinter]\nroot_packages = ['jobs', 'worker']\n"
        "[[tool.importlinter.contracts]]\nname = 'broken'\ntype = 'forbidden'\n"
        "source_modules = ['worker']\nforbidden_modules = ['jobs']\n"
    )
    found = lint(config)
    assert found.returncode == 1
    assert "worker" in found.stdout


@pytest.mark.parametrize("folder", ["jobs", "producers", "api", "worker", "ops"])
def test_every_folder_is_under_the_rule(folder: str) -> None:
    rules = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    assert folder in rules["root_packages"]
    named = [name for contract in rules["contracts"] for names in contract.values() for name in names]
    assert folder in named
