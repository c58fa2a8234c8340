"""`mimoq serve` as people use it: real processes, the line that it prints run as it stands."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

import api.__main__ as api_main
from api.deliverer import GRACE_S
from jobs import tokens
from jobs.connections import connect
from jobs.errors import MimoqError, UsageError
from jobs.processes import put_aside
from jobs.settings import load_settings
from ops.simulator import running_simulator
from producers.serve import API_STOP_S, Serve, ServeOptions, check_port, curl_line, kept_token, token_name
from producers.service import Service
from producers.workers import Workers
from tests.integration.commands import Box, Command, opened
from tests.waiting import wait_for

KEY = "sk-not-for-your-eyes"
#: Processes of it that are killed, as their command lines name them.
KILLED = ("-m api", "--lane bulk", "ops.simulator")


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    with opened(tmp_path) as found:
        yield found


def serving(box: Box, *args: str) -> tuple[Command, dict[str, str], str]:
    """A `mimoq serve` that serves: the command, what it says of address and token, and the line to paste."""
    command = box.start("serve", "--port", "0", *args)
    wait_for(lambda: "\ncurl " in command.out or command.process.poll() is not None, 60.0, "a curl line")
    *said, line = command.out.splitlines()
    return command, dict(entry.split(": ", 1) for entry in said), line


def pasted(line: str) -> dict[str, Any]:
    """The job that the line answers with, run by a shell where there is a curl."""
    if shutil.which("curl"):
        found = subprocess.run(["/bin/sh", "-c", line], capture_output=True, timeout=60, check=True).stdout
    else:
        _, _, url, *options = shlex.split(line)
        *headers, data = options[1::2]
        given = dict(header.split(": ", 1) for header in headers)
        found = httpx.post(url, headers=given, content=data, timeout=60, trust_env=False).content
    job: dict[str, Any] = json.loads(found)
    return job


# -- what is refused before anything is started


def test_a_port_that_is_taken_and_a_key_that_is_missing(box: Box) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = box.run("serve", "--simulate", "--port", str(port), status=2)
    last = ended.err.splitlines()[-1]
    assert (
        last == f"mimoq: can't listen on 127.0.0.1 port {port}: Address already in use; choose another --port or --host"
    )
    assert "no API key" in box.run("serve", "--port", "0", status=2).err
    assert not (box.folder / ".mimoq").exists()


def test_without_tokens_it_listens_on_loopback_only_as_the_api_does(box: Box) -> None:
    ended = box.run("serve", "--simulate", "--host", "0.0.0.0", "--port", "0", status=2, api_auth="false")
    assert not (box.folder / ".mimoq").exists()
    with pytest.raises(UsageError, match="MIMOQ_API_AUTH is off") as refused:
        api_main.serve(load_settings(api_auth=False, api_host="0.0.0.0", api_port=0, data_dir=box.folder), False)
    assert ended.err.splitlines()[-1] == f"mimoq: {refused.value}"


def test_an_address_that_is_not_of_this_machine() -> None:
    with pytest.raises(UsageError, match=r"can't listen on 127\.0\.0\.\.1 port 1"):
        check_port("127.0.0..1", 1)
    check_port("127.0.0.1", 0)


# -- from the first answer to the last process


def test_the_printed_line_works_also_after_its_processes_were_killed_and_a_second_start_shows_the_same_token(
    box: Box,
) -> None:
    # No key, and an address that leads nowhere: neither is used.
    command, said, line = serving(box, "--simulate")
    assert "simulating" in command.err
    file = box.folder / ".mimoq" / "serve.token"
    assert (file.read_text(), file.stat().st_mode & 0o777) == (f"{said['token']}\n", 0o600)
    assert said["token"] in line
    assert pasted(line)["state"] == "succeeded"
    for kind in KILLED:
        box.kill(kind)
    wait_for(lambda: all(len(box.processes(kind)) == 1 for kind in KILLED))
    url = said["address"]
    wait_for(lambda: answers(url), what="the API at its port again")
    job = pasted(line)
    assert (job["state"], job["response"]["object"]) == ("succeeded", "chat.completion")
    command.signal(signal.SIGTERM)
    command.wait(0)
    box.empty()
    logs = "".join(path.read_text() for path in box.folder.rglob("*.log"))
    assert said["token"] not in command.err + logs

    again, now, _ = serving(box, "--simulate")
    assert now["token"] == said["token"]
    again.signal(signal.SIGKILL)
    again.process.wait()
    box.empty()


def answers(url: str) -> bool:
    """Whether anybody listens there."""
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/healthz", trust_env=False).status_code > 0
    return False


def test_ctrl_c_lets_calls_end_and_a_second_one_does_not(tmp_path: Path) -> None:
    with running_simulator(key=KEY, latency=60.0) as sim, opened(tmp_path, base_url=sim.url, api_key=KEY) as box:
        command, said, line = serving(box)
        with ThreadPoolExecutor(1) as caller:
            cut = caller.submit(pasted, line)
            sim.wait_until(lambda totals: totals.in_flight == 1)
            command.signal(signal.SIGINT)
            command.heard("stopping: calls in flight get up to 30 s")
            wait_for(lambda: not answers(said["address"]), what="an API that takes nothing new")
            wait_for(lambda: len(box.processes("--lane")) == 1, what="the end of the worker that has no call")
            assert command.process.poll() is None
            command.signal(signal.SIGINT)
            command.wait(130)
            assert cut.exception(20.0) is not None or cut.result()["state"] != "succeeded"
        box.empty()
        logs = "".join(path.read_text() for path in box.folder.rglob("*.log"))
        assert KEY not in command.out + command.err + logs


# -- its token


def test_the_token_is_kept_in_a_file_and_replaced_where_the_store_does_not_know_it(
    store_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "serve.token"
    with contextlib.closing(connect(store_url)) as client:
        first = kept_token(client, tmp_path)
        assert kept_token(client, tmp_path) == first
        (known,) = tokens.all_tokens(client)
        for lost in ("", "mq_nonsense\n", first[:-1] + ("A" if first[-1] != "A" else "B")):
            file.write_text(lost)
            file.chmod(0o644)
            text = kept_token(client, tmp_path)
            assert text != first
            assert (file.read_text(), file.stat().st_mode & 0o777) == (f"{text}\n", 0o600)
            (now,) = tokens.all_tokens(client)
            assert tokens.matches(now, text)
            assert (now.name, now.tenant) == (token_name(tmp_path), known.tenant)
            assert "a new token" in capsys.readouterr().err
        file.unlink()
        assert kept_token(client, tmp_path) != text
        client.flushall()
        assert kept_token(client, tmp_path) == file.read_text().strip()
        assert [path.name for path in tmp_path.iterdir()] == ["serve.token"]


def test_services_that_share_a_store_leave_each_others_tokens_and_those_of_users_alone(
    store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    (tmp_path / "link").symlink_to(one)
    with contextlib.closing(connect(store_url)) as client:
        made = [tokens.create(client, "serve"), kept_token(client, one), kept_token(client, two)]
        monkeypatch.setattr(socket, "gethostname", lambda: "another")
        assert kept_token(client, tmp_path / "link") == made[1]  # whatever the machine is called now
        (one / "serve.token").unlink()
        made.append(kept_token(client, one))
        known = tokens.all_tokens(client)
        assert all(tokens.matches(token, text) for token, text in zip(known, made, strict=True))
        assert len({token.tenant for token in known}) == 4
    assert token_name(tmp_path / "link") == token_name(one) != token_name(two)


def test_a_token_file_that_can_not_be_is_one_line(store_url: str, tmp_path: Path) -> None:
    (tmp_path / "serve.token").mkdir()
    with contextlib.closing(connect(store_url)) as client, pytest.raises(MimoqError, match=r"serve\.token: Is a dir"):
        kept_token(client, tmp_path)


def test_the_line_to_paste() -> None:
    words = shlex.split(curl_line("http://127.0.0.1:8000", "mq_x"))
    assert words[:3] == ["curl", "-s", "http://127.0.0.1:8000/v1/jobs?wait=30"]
    assert "Authorization: Bearer mq_x" in words
    assert json.loads(words[-1])["request"]["messages"][0]["content"] == "Hello"
    assert "Authorization" not in curl_line("http://127.0.0.1:8000", None)


# -- a process that listens

LISTENER = """
import os, signal, socket, sys, time
with open("starts", "a") as file:
    file.write("x")
what = os.environ["WHAT"]
if what == "refuse":
    print("no such thing", file=sys.stderr)
    sys.exit(2)
server = socket.create_server(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])))
print("listening on http://127.0.0.1:%d" % server.getsockname()[1], flush=True)
if what == "die":
    print("dying", file=sys.stderr)
    sys.exit(3)
if what == "linger":
    def told(*_):
        open("told", "w").close()  # it may be told twice
    signal.signal(signal.SIGTERM, told)
    print("ready", file=sys.stderr, flush=True)
    while not os.path.exists("done"):
        time.sleep(0.01)
    sys.exit(0)
os.read(0, 1)
"""


def listener(folder: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> Service:
    (folder / "listener.py").write_text(LISTENER)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("producers.service.RESTART_S", 0.0)
    return Service("the listener", ["listener"], 0, folder / "log", {"PYTHONPATH": str(folder), "WHAT": what})


def test_a_service_that_dies_is_started_again_at_its_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = listener(tmp_path, monkeypatch, "live")
    try:
        url = service.wait()
        service.ensure()
        service._process.kill()
        wait_for(lambda: not service.alive)

        def back() -> bool:
            service.ensure()
            return service.alive

        wait_for(back)
        port = httpx.URL(url).port
        assert port is not None

        def listens() -> bool:
            with contextlib.suppress(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port), 1.0).close()
                return True
            return False

        wait_for(listens)
        assert (tmp_path / "starts").read_text() == "xx"
    finally:
        service.stop()
    assert not service.alive


def test_a_service_that_keeps_dying_ends_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = listener(tmp_path, monkeypatch, "die")
    try:
        service.wait()
        with pytest.raises(MimoqError, match=r"the listener ended with 3: dying \(log: ") as found:
            wait_for(lambda: service.ensure())
        assert found.value.exit_code == 1
        assert len((tmp_path / "starts").read_text()) == 6
    finally:
        service.stop()


def test_a_service_that_refuses_its_settings_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = listener(tmp_path, monkeypatch, "refuse")
    with pytest.raises(UsageError, match=r"the listener did not start: no such thing \(log: "):
        service.wait()
    assert (tmp_path / "starts").read_text() == "x"


# -- the API's end


def test_the_api_gets_the_time_it_gives_its_requests_and_webhooks() -> None:
    assert api_main.STOP_S + GRACE_S + 1 < API_STOP_S


@pytest.mark.parametrize(
    ("then", "status"),
    [(lambda _, folder: (folder / "done").touch(), 0), (lambda serve, _: setattr(serve._interrupts, "count", 2), -9)],
    ids=["it ends", "a second signal"],
)
def test_an_api_that_is_still_busy_is_waited_for_until_a_second_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: Callable[[Serve, Path], None], status: int
) -> None:
    service = listener(tmp_path, monkeypatch, "linger")
    service.wait()
    wait_for(lambda: "ready" in (tmp_path / "log").read_text())
    serve = Serve(ServeOptions(simulate=True), load_settings(data_dir=tmp_path), Workers())
    serve._api = service

    def look() -> None:
        wait_for((tmp_path / "told").exists)
        then(serve, tmp_path)

    watcher = threading.Thread(target=look)
    watcher.start()
    serve._drain()
    watcher.join()
    serve._end()
    assert service._process.returncode == status


def test_an_api_that_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = listener(tmp_path, monkeypatch, "linger")
    service.wait()
    wait_for(lambda: "ready" in (tmp_path / "log").read_text())
    monkeypatch.setattr("producers.serve.API_STOP_S", 0.2)
    serve = Serve(ServeOptions(simulate=True), load_settings(data_dir=tmp_path), Workers())
    serve._api = service
    serve._drain()
    assert service._process.returncode == -9


# -- logs


def test_a_log_that_has_become_long_is_put_aside(tmp_path: Path) -> None:
    log = tmp_path / "api.log"
    put_aside(log)
    log.write_text("x" * 11)
    put_aside(log, 11)
    assert log.exists()
    put_aside(log, 10)
    assert not log.exists()
    assert (tmp_path / "api.old.log").read_text() == "x" * 11
