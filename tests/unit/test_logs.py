"""Where log lines go and what form they have."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from jobs import logs


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """Logging is the process's: give it back as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    libraries = {
        name: logging.getLogger(name).level for name in ("celery", "kombu", "amqp", "asyncio", "aiohttp", "httpx")
    }
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, before in libraries.items():
        logging.getLogger(name).setLevel(before)
    structlog.reset_defaults()


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_json_lines_go_to_stderr_alone(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")
    structlog.get_logger("mimoq.test").info("job_ended", jobs=3)
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = lines(err)
    assert line.pop("timestamp").endswith("Z")
    assert line == {"event": "job_ended", "jobs": 3, "level": "info", "logger": "mimoq.test"}


def test_the_standard_library_has_the_same_form(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")
    logging.getLogger("somebody").warning("%d things", 3)
    (line,) = lines(capsys.readouterr().err)
    assert (line["event"], line["level"], line["logger"]) == ("3 things", "warning", "somebody")


def test_an_exception_is_in_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")
    try:
        raise KeyError("x")
    except KeyError:
        structlog.get_logger("mimoq.test").exception("went_wrong")
    (line,) = lines(capsys.readouterr().err)
    assert "KeyError" in line["exception"]


@pytest.mark.parametrize(
    ("level", "told"), [("debug", "d i w e"), ("info", "i w e"), ("warning", "w e"), ("error", "e")]
)
def test_what_is_under_the_level_is_not_told(level: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(level, "json")
    log = structlog.get_logger("mimoq.test")
    log.debug("d")
    log.info("i")
    log.warning("w")
    log.error("e")
    assert [line["event"] for line in lines(capsys.readouterr().err)] == told.split()


def test_libraries_speak_from_warnings_up(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("debug", "json")
    logging.getLogger("httpx").info("a request")
    logging.getLogger("kombu.transport").warning("broker away")
    assert [line["event"] for line in lines(capsys.readouterr().err)] == ["broker away"]


def test_without_a_terminal_it_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure()
    structlog.get_logger("mimoq.test").info("x")
    assert lines(capsys.readouterr().err)


def test_on_a_terminal_it_is_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    logs.configure()
    structlog.get_logger("mimoq.test").info("job_ended", jobs=3)
    assert "job_ended" in terminal.getvalue()
    assert not terminal.getvalue().startswith("{")


def test_configured_twice_a_line_comes_once(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")
    logs.configure("info", "json")
    structlog.get_logger("mimoq.test").info("x")
    assert len(lines(capsys.readouterr().err)) == 1
