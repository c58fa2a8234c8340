"""The image: how it is made, and that its lock is what the tests ran with."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from jobs.settings import PREFIX, Settings
from tests.unit.test_compose import SERVICES

ROOT = Path(__file__).resolve().parents[2]
TEXT = re.sub(r"\\\n", "", re.sub(r"(?m)^\s*#.*\n", "", (ROOT / "ops/Dockerfile").read_text(encoding="utf-8")))
LINES = [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in TEXT.splitlines() if line.strip()]
LAST = max(number for number, (word, _) in enumerate(LINES) if word == "FROM")
#: The stage that is shipped.
FINAL = LINES[LAST:]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def said(word: str) -> list[str]:
    """The arguments of every such line of the stage that is shipped."""
    return [rest for found, rest in FINAL if found == word]


def names(requirements: list[str]) -> set[str]:
    """The packages that these requirements are for."""
    return {re.split(r"[\[<>=;\s]", need)[0] for need in requirements}


def lock(name: str) -> dict[str, str]:
    """The entries of a lock, by package; without the comments, which say who needs it."""
    text = re.sub(r"(?m)^\s*#.*\n", "", (ROOT / name).read_text(encoding="utf-8"))
    entries = [entry.strip() for entry in re.split(r"(?m)^(?=[a-z0-9])", text) if entry.strip()]
    return {re.split(r"[\[=]", entry)[0]: entry for entry in entries}


# -- the lock


def test_its_lock_is_a_part_of_the_one_that_is_tested() -> None:
    tested, shipped = lock("requirements.lock"), lock("requirements-image.lock")
    assert {name: entry for name, entry in shipped.items() if tested.get(name) != entry} == {}, "run: make lock"
    assert [name for name, entry in shipped.items() if "--hash=sha256:" not in entry] == []


def test_its_lock_has_what_runs_and_nothing_of_development() -> None:
    shipped = set(lock("requirements-image.lock"))
    project = PROJECT["project"]
    needed = names([*project["dependencies"], *project["optional-dependencies"]["postgres"]])
    assert needed <= shipped
    assert not names(PROJECT["dependency-groups"]["dev"]) & shipped - needed


def test_the_build_backend_is_locked_with_all_that_it_needs() -> None:
    (pattern,) = re.findall(r"/\^\(([\w|-]+)\)==/", TEXT)
    named = set(pattern.split("|"))
    needed: set[str] = set()
    left = names(PROJECT["build-system"]["requires"])
    while left:
        name = left.pop()
        needed.add(name)
        more = [Requirement(text) for text in requires(name) or []]
        left |= {need.name for need in more if need.marker is None or need.marker.evaluate({"extra": ""})} - needed
    assert named == needed
    assert named <= set(lock("requirements.lock"))


# -- the build


def test_every_base_is_pinned() -> None:
    bases = [rest.split()[0] for word, rest in LINES if word == "FROM"]
    assert len(bases) == 2
    for base in bases:
        assert re.fullmatch(r"python:3\.\d+-slim-\w+", base)
    assert len(set(bases)) == 1, "what was built for one Python runs on another"


def test_nothing_is_installed_without_its_hash() -> None:
    commands = [
        command for _, rest in LINES for command in rest.split("&&") if re.search(r"\bpip\b.* (install|wheel)", command)
    ]
    assert len(commands) == 4
    for command in commands:
        assert "--require-hashes" in command or "--no-index" in command, command
        assert "--no-index" in command or "--only-binary :all:" in command, command


def test_what_is_copied_is_sent_and_nothing_secret_is() -> None:
    copied = {path for word, rest in LINES if word == "COPY" and "--from" not in rest for path in rest.split()[:-1]}
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignore[1] == "*", "only what is named"
    assert {line.removeprefix("!") for line in ignore if line.startswith("!")} == copied
    assert copied >= set(PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
    assert all((ROOT / path).exists() for path in copied)


# -- what is shipped


def test_no_compiler_and_no_package_manager_is_run_for_it() -> None:
    assert not re.search(r"apt-get|apk |gcc|build-essential|\bpip\b|curl|wget", "\n".join(said("RUN")))
    assert [rest for rest in said("COPY") if "--from=build" not in rest] == []


def test_it_runs_as_a_user_without_rights() -> None:
    (user,) = said("USER")
    assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", user)
    assert user == SERVICES["worker"]["user"]
    assert f"--uid {user.partition(':')[0]}" in "".join(said("RUN"))


def test_its_variables_are_settings_and_its_folders_are_there() -> None:
    variables = dict(re.findall(r"(\w+)=(\S+)", " ".join(said("ENV"))))
    ours = {name.removeprefix(PREFIX).lower(): value for name, value in variables.items() if name.startswith(PREFIX)}
    assert set(ours) <= set(Settings.model_fields)
    Settings(_env_file=None, **ours)
    assert variables["PYTHONDONTWRITEBYTECODE"] == "1"
    for folder in (ours["data_dir"], ours["files_dir"]):
        assert re.search(rf"install -d .*{folder}\b", "".join(said("RUN")))
    # Compose says the same, so that neither hides a fault of the other.
    inside = SERVICES["worker"]["environment"]
    assert {name: inside.get(PREFIX + name.upper()) for name in ours} == ours


def test_how_it_is_started_asked_and_stopped() -> None:
    assert said("ENTRYPOINT") == ['["mimoq"]']
    assert said("STOPSIGNAL") == ["SIGTERM"]
    (check,) = said("HEALTHCHECK")
    assert check.partition("CMD ")[2] == '["python", "-I", "-m", "ops.health"]'
    assert SERVICES["worker"]["healthcheck"]["test"] == ["CMD", "python", "-I", "-m", "ops.health"]


@pytest.mark.parametrize("secret", ["MIMOQ_API_KEY", "PASSWORD", "ARG "])
def test_no_secret_gets_in(secret: str) -> None:
    assert secret not in TEXT
