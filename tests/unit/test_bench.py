"""What the benchmarks share: their options, and the page that their tables stand on."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from ops.bench.calls import __main__ as calls
from ops.bench.page import PAGE, named, placed
from ops.bench.store import __main__ as store


@pytest.mark.parametrize("bench", [calls, store])
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rows", "nobody"], "no rows are called nobody; there are "),
        (["--scale", "0"], "must be over 0, and 1 at most"),
        (["--scale", "2"], "must be over 0, and 1 at most"),
        (["--scale", "much"], "must be over 0, and 1 at most"),
        (["--write", "--scale", "0.5"], "--write is for whole runs"),
        (["--write", "--rows", "first"], "--write is for whole runs"),
    ],
)
def test_bad_use_ends_in_one_line(
    bench: ModuleType,
    arguments: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = {calls: "aiohttp", store: "submit"}[bench]
    monkeypatch.setattr(sys, "argv", ["bench", *(first if word == "first" else word for word in arguments)])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_the_page_is_changed_between_the_marks_alone() -> None:
    first = placed("# Figures\n\nOthers.\n", "bench", "one\n")
    assert first == "# Figures\n\nOthers.\n\n<!-- bench: begin -->\n\none\n\n<!-- bench: end -->\n"
    assert placed(f"{first}\nMore.\n", "bench", "two\n") == first.replace("one", "two") + "\nMore.\n"
    assert placed("", "bench", "one\n").startswith("<!-- bench: begin -->")
    both = placed(first, "bench-store", "three\n")
    assert both.startswith(first)
    assert placed(both, "bench", "four\n") == both.replace("one", "four")


def test_versions_are_told_in_words() -> None:
    assert named("Valkey server v=9.1.0 sha=00000000:1 malloc=libc bits=64") == "Valkey 9.1.0"
    assert PAGE.name == "performance.md"
