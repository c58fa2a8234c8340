"""The documents against the code they speak of."""

from __future__ import annotations

import inspect
import re
import tomllib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest
from dotenv import dotenv_values

from jobs import keys
from jobs.settings import PREFIX, Settings
from jobs.states import BatchState, JobState
from ops import docs

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("jobs", "producers", "api", "worker", "ops", "tests", "docs", "examples", ".ci")
GENERATED = {"__pycache__"}


def files() -> Iterator[Path]:
    """Every file of the project, as a fresh clone has it."""
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith(".coverage") and path.name not in (".env", "uv.lock", ".git"):
            yield path
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and not GENERATED & set(path.parts) and not path.match("*.out.jsonl"):
                yield path


PAGES = sorted(path.relative_to(ROOT).as_posix() for path in files() if path.suffix == ".md")
# Spelt so that this file does not hold what it looks for.
INDEX = re.compile(
    r"py[p]i\.org|pythonhost[e]d|/simpl[e]\b|(?:extra-)?index-ur[l]\s*[= ]\s*\S*:/|find-link[s]|trusted-hos[t]"
)


@pytest.mark.parametrize("name", docs.documents())
def test_a_made_document_is_in_sync(name: str) -> None:
    assert (ROOT / name).read_text(encoding="utf-8") == docs.documents()[name], "run: make docs"


def test_the_check_tells_what_is_out_of_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    assert docs.main(["--check"]) == 1
    assert "docs/settings.md is out of date" in capsys.readouterr().err
    assert not list(tmp_path.glob("docs/*"))
    assert docs.main([]) == 0
    assert docs.main(["--check"]) == 0
    (tmp_path / ".env.example").write_text("changed")
    assert docs.main(["--check"]) == 1


def test_the_pages_name_every_setting_once() -> None:
    variables = [PREFIX + name.upper() for name in Settings.model_fields]
    page = docs.settings_page()
    assert [row.split("`")[1] for row in page.splitlines() if row.startswith("| `")] == variables
    uncommented = re.sub(r"(?m)^#(?=MIMOQ_)", "", docs.env_example())
    assert re.findall(r"(?m)^(\w+)=", uncommented) == variables


def test_the_env_example_sets_nothing_and_its_defaults_are_the_defaults(tmp_path: Path) -> None:
    example = tmp_path / "example"
    example.write_text(docs.env_example(), encoding="utf-8")
    assert dotenv_values(example) == {}
    example.write_text(docs.env_example().replace("\n#MIMOQ_", "\nMIMOQ_"), encoding="utf-8")
    told = Settings(_env_file=example, _env_prefix="MIMOQ_", base_url=Settings.model_fields["base_url"].default)
    assert told == Settings.model_construct()


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target and not target.startswith(("#", "mailto:")):
            assert ((ROOT / page).parent / target.partition("#")[0]).exists(), target


def test_no_file_names_a_package_index() -> None:
    found = {}
    for path in files():
        text = path.read_bytes().decode("utf-8", "replace")
        if match := INDEX.search(text):
            found[path.relative_to(ROOT).as_posix()] = match[0]
    assert found == {}


def test_the_lock_has_a_hash_for_everything_and_no_address() -> None:
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert "://" not in lock
    packages = [entry for entry in re.split(r"(?m)^(?=[a-z0-9])", lock) if entry.strip()]
    assert len(packages) > 30
    assert [entry.split()[0] for entry in packages if "--hash=sha256:" not in entry] == []


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    optional = project["project"]["optional-dependencies"].values()
    needed = [*project["project"]["dependencies"], *project["dependency-groups"]["dev"], *chain(*optional)]
    names = [re.split(r"[<>=;\s]", need)[0] for need in needed]
    page = (ROOT / "docs/decisions/dependencies.md").read_text(encoding="utf-8")
    told = re.findall(r"(?m)^\| ([\w\[\],-]+) \| \S", page)
    assert sorted(set(told) - {"package"}) == sorted(names)


def functions_of_keys() -> dict[str, str]:
    """The pattern of every key that takes arguments, with the docstring of the function that makes it."""
    found = {}
    for _, function in inspect.getmembers(keys, inspect.isfunction):
        arguments = [f"<{name}>" for name in inspect.signature(function).parameters]
        found[function(*arguments)] = function.__doc__ or ""
    return found


def test_every_key_says_what_it_holds() -> None:
    kinds = ("string", "hash", "zset", "set", "list", "channel", "The same")
    assert {key: doc for key, doc in functions_of_keys().items() if not doc.startswith(kinds)} == {}


def test_the_store_page_tells_of_every_key_and_script() -> None:
    page = (ROOT / "docs/store.md").read_text(encoding="utf-8")
    fixed = [value for name, value in vars(keys).items() if isinstance(value, str) and value.startswith(keys.PREFIX)]
    patterns = [*(key for key in fixed if key != keys.PREFIX), *functions_of_keys()]
    scripts = [path.relative_to(ROOT).as_posix() for path in files() if path.suffix == ".lua" and path.stem != "common"]
    assert [name for name in [*patterns, *scripts] if f"`{name}`" not in page] == []


def test_scripts_that_run_out_of_memory_are_told() -> None:
    page = (ROOT / "docs/store.md").read_text(encoding="utf-8")
    told = set(
        re.findall(r"`(\w+)`", page.partition("## The scripts")[2].partition("run even when")[0].rpartition("\n\n")[2])
    )
    marked = {
        path.stem for path in files() if path.suffix == ".lua" and "allow-oom" in path.read_text(encoding="utf-8")
    }
    assert told == marked


def test_the_states_page_draws_every_state() -> None:
    page = (ROOT / "docs/states.md").read_text(encoding="utf-8")
    jobs, batches = re.findall(r"(?s)```mermaid\n(.*?)```", page)
    for diagram, states in ((jobs, JobState), (batches, BatchState)):
        assert set(re.findall(r"\w+", re.sub(r":.*|stateDiagram-v2", "", diagram))) == {state.value for state in states}


def test_every_promise_names_tests_that_are_there() -> None:
    page = (ROOT / "docs/guarantees.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)
    assert len(named) > 20
    gone = [(path, name) for path, name in named if f"def {name}(" not in (ROOT / path).read_text(encoding="utf-8")]
    assert gone == []
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| what")]
    assert all("`tests/" in row for row in rows), "a promise without a test"
