"""What the image's health check says of real processes; /proc as a container has it, which holds nothing but these."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from ops.health import main
from ops.simulator import running_simulator
from tests.components import Valkey
from tests.integration.api_stand import Api
from tests.integration.worker_stand import MODULE, working
from tests.ports import free_port
from tests.waiting import wait_for


def container(folder: Path, *pids: int) -> Path:
    """A /proc of these processes, with one of another program's."""
    proc = folder / "proc"
    for pid in pids:
        (proc / str(pid)).mkdir(parents=True, exist_ok=True)
        (proc / str(pid) / "cmdline").write_bytes(Path(f"/proc/{pid}/cmdline").read_bytes())
    (proc / "1").mkdir(parents=True, exist_ok=True)
    (proc / "1/cmdline").write_bytes(b"python\0-P\0-m\0worker\0")  # a supervisor
    return proc


def test_of_a_worker_it_is_whether_its_engine_hears_the_store(
    tmp_path: Path, store_url: str, valkey: Valkey, capsys: pytest.CaptureFixture[str]
) -> None:
    environ = {"MIMOQ_METRICS_PORT": str(free_port())}
    port = environ["MIMOQ_METRICS_PORT"]
    with (
        running_simulator() as simulator,
        working(MODULE, tmp_path, simulator, store_url, metrics_port=port) as work,
    ):
        proc = container(tmp_path, work.process.process.pid)
        wait_for(lambda: main(proc, environ) == 0, what="a worker that is well")
        valkey.pause()
        try:
            wait_for(lambda: main(proc, environ) == 1, what="a worker without its store")
        finally:
            valkey.go_on()
        assert "worker 0 does not hear its store" in capsys.readouterr().out
        wait_for(lambda: main(proc, environ) == 0, what="a worker that hears it again")
        work.process.close()
    assert main(proc, environ) == 1
    assert capsys.readouterr().out.endswith("worker 0 does not answer\n")


def test_of_the_api_it_is_whether_it_answers(
    tmp_path: Path, store_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with closing(Api(store_url, tmp_path)) as api:
        port = api.url.rpartition(":")[2]
        proc = container(tmp_path, api.process.pid)
        told = proc / str(api.process.pid) / "cmdline"
        # It has found its port itself; in a container it is told.
        told.write_bytes(told.read_bytes().replace(b"--port\x000\x00", f"--port\0{port}\0".encode()))
        assert main(proc, {}) == 0
    assert main(proc, {}) == 1
    assert capsys.readouterr().out == "the API does not answer\n"


@pytest.mark.parametrize(
    ("argv", "port"),
    [
        ("python -P -m api", 8000),
        ("python -P -m api --port=8001 --host 0.0.0.0", 8001),
        ("python -P -m worker --lane bulk", 9100),
        ("python -P -m worker --lane bulk --exit-with-stdin --place 2", 9102),
        ("python -P -m worker --lane bulk --processes 2", None),
        ("python -P -m worker", None),
        ("python -P -m producers run in.jsonl", None),
        ("python -I -m ops.health", None),
        ("sh -c true", None),
    ],
)
def test_who_is_asked(argv: str, port: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("ops.health.ask", lambda port, path: asked.append(port))
    (tmp_path / "7").mkdir()
    (tmp_path / "7/cmdline").write_bytes(argv.replace(" ", "\0").encode() + b"\0")
    assert main(tmp_path, {"MIMOQ_METRICS_PORT": "9100"}) == (port is not None)
    assert asked == ([] if port is None else [port])
