"""`mimoq worker`: what is started, what is started again, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from jobs.connections import connect
from jobs.workers import WorkerInfo, live_workers
from producers import Producer
from tests.integration.commands import Box, opened
from tests.waiting import wait_for
from worker.__main__ import main


@pytest.fixture
def box(tmp_path: Path, store_url: str) -> Iterator[Box]:
    with opened(tmp_path, redis_url=store_url, api_key="sk-test") as found:
        yield found


def alive(url: str, count: int) -> dict[int, WorkerInfo]:
    """Live workers by process id, once there are so many of them and no other is listed."""
    client = connect(url)

    def look() -> dict[int, WorkerInfo]:
        found = {worker.pid: worker for worker in live_workers(client) if psutil.pid_exists(worker.pid)}
        return found if len(found) == count else {}

    try:
        return wait_for(look, what=f"{count} live workers")
    finally:
        client.close()


def test_one_process_a_lane_is_kept_alive_and_told_to_end(box: Box, store_url: str) -> None:
    supervisor = box.start("worker")
    workers = alive(store_url, 3)
    assert supervisor.pid not in workers
    lanes = [process.cmdline()[process.cmdline().index("--lane") + 1] for process in map(psutil.Process, workers)]
    assert sorted(lanes) == ["bulk", "complete", "interactive"]

    dead = min(workers)
    os.kill(dead, signal.SIGKILL)
    supervisor.heard("ended with -9; starting another")
    again = alive(store_url, 3)
    assert dead not in again
    assert len(set(again) & set(workers)) == 2
    # Both lanes are served.
    with Producer(redis_url=store_url) as producer:
        for lane in ("bulk", "interactive"):
            producer.submit("x", lane=lane)

    supervisor.signal(signal.SIGTERM)
    supervisor.wait(0)
    box.empty()
    assert supervisor.out == ""


def test_several_processes_of_one_lane_end_with_a_ctrl_c(box: Box, store_url: str) -> None:
    supervisor = box.start("worker", "--lane", "interactive", "--processes", "2")
    alive(store_url, 2)
    os.killpg(supervisor.pid, signal.SIGINT)
    supervisor.wait(0)
    box.empty()


@pytest.mark.parametrize("args", [[], ["--lane", "bulk"]])
def test_workers_end_with_their_starter(box: Box, store_url: str, args: list[str]) -> None:
    said = box.folder / "said-by-workers"
    with said.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "worker", "--exit-with-stdin", *args],
            cwd=box.folder,
            env={**os.environ, "MIMOQ_REDIS_URL": store_url, "MIMOQ_API_KEY": "sk-test"},
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=file,
        )
    try:
        wait_for(lambda: said.read_text().count("worker_ready") == (1 if args else 2), what="workers that listen")
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(30) == 0
        box.empty()
    finally:
        process.kill()
        process.wait()


def test_workers_end_when_their_supervisor_is_killed(box: Box, store_url: str) -> None:
    supervisor = box.start("worker")
    alive(store_url, 2)
    supervisor.process.kill()
    box.empty()


def test_told_to_end_before_they_began(box: Box) -> None:
    supervisor = box.start("worker")
    wait_for(lambda: len(box.processes("--lane")) == 3, what="three worker processes")
    supervisor.signal(signal.SIGTERM)
    supervisor.wait(0)
    box.empty()


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["--lane", "fast"], "--lane"),
        (["--processes", "0"], "at least 1"),
        (["--processes", "two"], "must be a number"),
        (["--frobnicate"], "--frobnicate"),
    ],
)
def test_what_can_not_be_meant_is_refused(capsys: pytest.CaptureFixture[str], args: list[str], part: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(args)
    out, err = capsys.readouterr()
    assert (out, part in err.splitlines()[-1]) == ("", True)


@pytest.mark.parametrize("args", [[], ["--lane", "bulk"]])
def test_a_bad_setting_ends_it(box: Box, args: list[str]) -> None:
    ended = box.start("worker", *args, rpm="many").wait(2)
    assert "MIMOQ_RPM" in ended.err
    assert ended.out == ""
    box.empty()


@pytest.mark.parametrize("args", [[], ["--lane", "bulk"]])
def test_a_store_that_is_away_at_the_start_is_waited_for(box: Box, args: list[str]) -> None:
    waiting = box.start("worker", *args, redis_url="unix:///nowhere/valkey.sock")
    waiting.heard("waiting_for_store")
    assert "check MIMOQ_REDIS_URL" in waiting.err
    waiting.signal(signal.SIGTERM)
    waiting.wait(0)
    box.empty()
