"""`python -m ops.simulator`: arguments, the one line on stdout, the ways to end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ops.simulator.__main__ import main
from ops.simulator.config import configure

ROOT = Path(__file__).parents[2]


@contextmanager
def started(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and the address it prints."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ops.simulator", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("listening on http://127.0.0.1:")
        yield process, line.removeprefix("listening on ").strip()
    finally:
        process.kill()
        process.communicate()


def test_it_serves_and_ends_with_its_parent(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    arguments = ("--exit-with-parent", "--latency", "0", "--ledger", str(ledger), "--trigger", "a=b=500")
    with started(*arguments, MIMOQ_SIMULATOR_KEY="from-the-environment") as (process, url):
        body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}]}).encode()
        headers = {"Authorization": "Bearer from-the-environment"}
        request = urllib.request.Request(f"{url}/v1/chat/completions", body, headers)
        with urllib.request.urlopen(request, timeout=20) as response:
            assert json.load(response)["model"] == "m"
        out, err = process.communicate(timeout=20)  # closes its standard input
        assert (process.returncode, out, err) == (0, "", "")
    assert json.loads(ledger.read_text())["status"] == 200


def test_it_ends_on_a_signal() -> None:
    with started() as (one, _), started() as (other, _):
        one.send_signal(signal.SIGTERM)
        other.send_signal(signal.SIGINT)
        assert (one.wait(20), other.wait(20)) == (0, 0)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--port", "many"],
        ["--nonsense"],
        ["--host", "0.0.0.0"],
        ["--fault", "500"],
        ["--fault", "odd=0.5"],
        ["--trigger", "text"],
        ["--rpm", "0"],
        ["--key"],
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert out == ""
    assert err.startswith("simulator: ")
    assert err.count("\n") == 1


def test_a_ledger_that_cannot_be_written_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--ledger", str(tmp_path / "no" / "file"), "--fault", "500=0.5"]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)


def test_help_names_every_fault(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    assert "repetition" in capsys.readouterr().out


def test_defaults_are_those_of_the_configuration() -> None:
    assert (configure({}).latency, configure({}).answer_bytes, configure({}).port) == (0.2, 1700, 0)
