"""docker-compose.yml brought up for real, where a Docker engine and the images are; it downloads nothing.

Not a failure in CI either: images come from where CI does not reach. What can be told of the file without an engine,
tests/unit/test_compose.py tells.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import httpx
import pytest

from jobs.connections import connect
from jobs.guard import server_program
from tests.ports import free_port
from tests.unit.test_compose import ROOT, SERVICES
from tests.waiting import wait_for

UP = ("valkey", "worker", "api", "simulator")
#: Seconds until all of it is well.
UP_S = 180

Docker = Callable[..., str]


def docker(*args: str, cwd: Path | None = None, timeout_s: float = 60.0) -> str:
    """What `docker ARGS` says on stdout. Raises `CalledProcessError`."""
    argv = [shutil.which("docker") or "docker", *args]
    done = subprocess.run(argv, cwd=cwd, env=os.environ, capture_output=True, text=True, timeout=timeout_s, check=True)
    return done.stdout


def missing() -> str:
    """Why it can't be brought up here, '' if it can."""
    if shutil.which("docker") is None:
        return "no docker command"
    wanted = {
        "docker has no `compose` here": ("compose", "version"),
        "no Docker engine answers": ("version", "--format", "{{.Server.Version}}"),
    }
    for name in UP:
        image = SERVICES[name]["image"]
        build = ": docker compose build" if "build" in SERVICES[name] else ""
        wanted[f"the image {image} is not here{build}"] = ("image", "inspect", "--format", "-", image)
    for reason, args in wanted.items():
        try:
            docker(*args)
        except (subprocess.SubprocessError, OSError) as error:
            said = (getattr(error, "stderr", None) or "").strip().partition("\n")[0]
            return f"{reason} ({said})" if said else reason
    return ""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Docker]:
    """`docker compose ARGS` of a copy without a developer's .env, under a name of its own; all is removed at the end."""
    if reason := missing():
        pytest.skip(reason)
    shutil.copy(ROOT / "docker-compose.yml", tmp_path)
    monkeypatch.setenv("SIMULATOR_PORT", str(free_port()))
    monkeypatch.setenv("API_PORT", "0")
    name = f"mimoq-test-{secrets.token_hex(4)}"

    def compose(*args: str, timeout_s: float = 60.0) -> str:
        return docker("compose", "-p", name, "--profile", "simulator", *args, cwd=tmp_path, timeout_s=timeout_s)

    try:
        yield compose
    finally:
        compose("down", "--volumes", "--timeout", "0", timeout_s=UP_S)


def test_it_comes_up_answers_without_a_key_and_ends_well(project: Docker) -> None:
    waited = ("--wait", "--wait-timeout", str(UP_S))
    project("up", "-d", "--no-build", "--pull", "never", *waited, "--scale", "worker=2", *UP, timeout_s=UP_S + 30)
    token = project("exec", "-T", "simulator", "cat", "/data/serve.token").strip()
    answer = httpx.post(
        f"http://127.0.0.1:{os.environ['SIMULATOR_PORT']}/v1/jobs",
        params={"wait": 30},
        json={"request": {"messages": [{"role": "user", "content": "Hello"}]}},
        headers={"Authorization": f"Bearer {token}"},
        timeout=60,
        trust_env=False,
    )
    assert answer.json()["state"] == "succeeded"
    assert project("exec", "-T", "api", "mimoq", "token", "create", "--name", "test").startswith("mq_")
    project("stop", "worker", timeout_s=120)
    states = project("ps", "-a", "--format", "{{.Service}} {{.ExitCode}}").split("\n")
    assert states.count("worker 0") == 2


def test_valkey_takes_the_options_it_is_given(tmp_path: Path) -> None:
    """The embedded one, which is of the same version; on a socket alone, with a folder of its own."""
    socket_path = Path(tempfile.mkdtemp(prefix="mimoq-test-", dir="/tmp")) / "valkey.sock"
    options = [str(tmp_path) if option == "/data" else option for option in SERVICES["valkey"]["command"][1:]]
    argv = [server_program(), *options, "--port", "0", "--unixsocket", str(socket_path)]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        wait_for(lambda: socket_path.exists() or server.poll() is not None, what="a socket")
        client = connect(f"unix://{socket_path}")
        found = cast(
            "dict[str, str]", client.config_get("appendonly", "appendfsync", "maxmemory", "maxmemory-policy", "save")
        )
        client.close()
    finally:
        server.kill()
        server.wait()
        shutil.rmtree(socket_path.parent)
    said = {str(name): str(value) for name, value in found.items()}
    assert said == {
        "appendonly": "yes",
        "appendfsync": "everysec",
        "maxmemory": str(2**30),
        "maxmemory-policy": "noeviction",
        "save": "",
    }
