"""The embedded Valkey and its guard, with real processes: who starts it, who stops it, and what survives which kill."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import psutil
import pytest
import redis

from jobs.embedded import EmbeddedServer
from jobs.errors import EmbeddedServerError
from jobs.guard import remove_socket
from jobs.runtime import Runtime, ask

T = TypeVar("T")

USER = """
import sys
from pathlib import Path
from jobs.embedded import EmbeddedServer
with EmbeddedServer.open(Path(sys.argv[1])) as server:
    print("open", flush=True)
    sys.stdin.read()
"""

INCREMENTER = """
import random, sys, time
from pathlib import Path
from jobs.embedded import EmbeddedServer
from jobs.runtime import Runtime, ask
folder, seed, rounds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
pauses = random.Random(seed)
for _ in range(rounds):
    with EmbeddedServer.open(folder):
        print(ask(Runtime.of(folder).socket, "INCR n"), flush=True)
    time.sleep(pauses.uniform(0, 0.2))  # around the time in which a guard looks and stops
"""


def eventually(look: Callable[[], T], within_s: float = 20.0) -> T:
    """The first true value of `look`."""
    deadline = time.monotonic() + within_s
    while not (value := look()):
        assert time.monotonic() < deadline, "did not come about in time"
        time.sleep(0.01)
    return value


def ended(pid: int) -> bool:
    """Whether a process is gone, or but for its status."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


class Folder:
    """A data folder, its processes, and the users we started on it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runtime = Runtime.of(path)
        self.users: list[subprocess.Popen[str]] = []

    def pids(self, *words: str) -> list[int]:
        found = []
        for process in psutil.process_iter():
            try:
                line = "\0".join(process.cmdline())
                if process.status() != psutil.STATUS_ZOMBIE and all(word in line for word in words):
                    found.append(process.pid)
            except psutil.NoSuchProcess:
                pass
        return found

    def guards(self) -> list[int]:
        return self.pids("jobs.guard", str(self.runtime.data_dir))

    def servers(self) -> list[int]:
        return self.pids("valkey", str(self.runtime.socket))

    def ask(self, command: str) -> str:
        return ask(self.runtime.socket, command)

    def answers(self) -> bool:
        try:
            return self.ask("PING") == "+PONG"
        except OSError:
            return False

    def kill(self, pids: list[int]) -> None:
        (pid,) = pids
        os.kill(pid, signal.SIGKILL)
        eventually(functools.partial(ended, pid))

    def revived(self, old: list[int]) -> bool:
        return self.answers() and self.servers() != old

    def is_over(self) -> bool:
        return not self.guards() and not self.servers()

    def run(self, program: str, *arguments: str) -> subprocess.Popen[str]:
        user = subprocess.Popen(
            [sys.executable, "-c", program, str(self.path), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.users.append(user)
        return user

    def end(self) -> None:
        for user in self.users:
            user.kill()
            user.communicate()
        self.kill_all()
        eventually(self.is_over)
        remove_socket(self.runtime)

    def kill_all(self) -> None:
        # A guard first: it would start its server again.
        for pid in [*self.guards(), *self.servers()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    folder = Folder(tmp_path / "data")
    try:
        yield folder
    finally:
        folder.end()


def line_of(user: subprocess.Popen[str]) -> str:
    assert user.stdout is not None
    return user.stdout.readline().strip()


def test_what_was_written_is_there_again(folder: Folder) -> None:
    with EmbeddedServer.open(folder.path) as server:
        assert server.url == f"unix://{folder.runtime.socket}"
        assert folder.ask("SET k v") == "+OK"
        assert folder.path.stat().st_mode & 0o777 == 0o700
        assert folder.runtime.socket.parent.stat().st_mode & 0o777 == 0o700
        assert folder.runtime.server_dir.stat().st_mode & 0o777 == 0o700
        server.ensure()
        assert len(folder.guards()) == len(folder.servers()) == 1
    eventually(folder.is_over)
    assert not folder.runtime.socket.parent.exists()
    with EmbeddedServer.open(folder.path):
        assert folder.ask("GET k") == "v"
    server.close()  # again: nothing
    eventually(folder.is_over)


def test_the_durable_options_are_on(folder: Folder) -> None:
    expected = {
        "appendonly": "yes",
        "appendfsync": "everysec",
        "aof-load-truncated": "yes",
        "maxmemory-policy": "noeviction",
        "save": "",
        "port": "0",
        "unixsocketperm": "700",
    }
    with EmbeddedServer.open(folder.path) as server, redis.Redis.from_url(server.url, decode_responses=True) as client:
        assert client.config_get(*expected) == expected


def test_a_guard_and_its_server_hold_no_settings_and_no_output_of_ours(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIMOQ_API_KEY", "sk-hidden")
    with EmbeddedServer.open(folder.path):
        for pid in [*folder.guards(), *folder.servers()]:
            process = psutil.Process(pid)
            assert "MIMOQ_API_KEY" not in process.environ()
            assert os.getsid(pid) != os.getsid(0)
            held = [file.path for file in process.open_files()]
            assert not any(Path(path).name == "lock" for path in held) or pid in folder.guards()
        (guard,) = folder.guards()
        command = " ".join(psutil.Process(guard).cmdline()[:-2])  # without the folder, which the test's name is in
        assert "valkey" not in command
        assert "worker" not in command


def test_the_first_user_to_end_leaves_the_server_to_the_others(folder: Folder) -> None:
    with EmbeddedServer.open(folder.path):
        first = EmbeddedServer.open(folder.path)
        other = folder.run(USER)
        assert line_of(other) == "open"
        servers = folder.servers()
        first.close()
    folder.ask("SET k v")
    assert folder.servers() == servers
    other.communicate()  # closes its standard input, at which it ends
    assert other.returncode == 0
    eventually(folder.is_over)


def test_a_killed_server_comes_back_with_its_data(folder: Folder) -> None:
    with EmbeddedServer.open(folder.path) as server:
        for count in range(1, 4):
            assert folder.ask("INCR n") == f":{count}"
            old = folder.servers()
            folder.kill(old)
            eventually(lambda old=old: folder.revived(old))  # type: ignore[misc]  # a default can't be annotated
            server.ensure()
        assert folder.ask("GET n") == "3"


def test_a_server_that_keeps_dying_is_given_up_and_tried_again_by_the_next_command(folder: Folder) -> None:
    with EmbeddedServer.open(folder.path) as server:
        folder.ask("SET k v")
        for _ in range(4):
            server.ensure()
            old = eventually(folder.servers)
            folder.kill(old)
            eventually(lambda old=old: folder.revived(old) or not folder.guards())  # type: ignore[misc]  # as above
        eventually(lambda: not folder.guards())
        with pytest.raises(EmbeddedServerError, match=r"died 4 times within a minute; see .*valkey\.log, which ends: "):
            server.ensure()
        with EmbeddedServer.open(folder.path):
            server.ensure()
            assert folder.ask("GET k") == "v"
    eventually(folder.is_over)


def test_a_server_that_cannot_start_is_told_in_one_line(folder: Folder) -> None:
    with EmbeddedServer.open(folder.path):
        folder.ask("SET k v")
    eventually(folder.is_over)
    manifest = next((folder.runtime.server_dir / "appendonlydir").glob("*.manifest"))
    manifest.write_text("not a manifest\n")
    with pytest.raises(EmbeddedServerError, match="died 4 times within a minute") as raised:
        EmbeddedServer.open(folder.path)
    assert "\n" not in str(raised.value)
    eventually(folder.is_over)


def test_a_file_that_a_crash_cut_short_is_read_to_its_last_whole_command(folder: Folder) -> None:
    with EmbeddedServer.open(folder.path):
        folder.ask("SET k v")
        folder.ask("SET long " + "x" * 100)
    eventually(folder.is_over)
    increments = next((folder.runtime.server_dir / "appendonlydir").glob("*.incr.aof"))
    os.truncate(increments, increments.stat().st_size - 10)
    with EmbeddedServer.open(folder.path):
        assert folder.ask("GET k") == "v"
        assert folder.ask("EXISTS long") == ":0"


def test_a_killed_guard_is_replaced_and_its_server_adopted(folder: Folder) -> None:
    with EmbeddedServer.open(folder.path) as server:
        folder.ask("SET k v")
        servers = folder.servers()
        folder.kill(folder.guards())
        server.ensure()
        eventually(lambda: "adopted the server" in folder.runtime.guard_log.read_text())
        assert folder.servers() == servers
        # The adopted server is guarded like a child ...
        folder.kill(servers)
        eventually(lambda: folder.revived(servers))
        assert folder.ask("GET k") == "v"
    eventually(folder.is_over)  # ... and stopped like one


def test_an_adopted_server_is_stopped_with_its_data_after_the_last_user(folder: Folder) -> None:
    with EmbeddedServer.open(folder.path):
        folder.ask("SET k v")
        folder.kill(folder.guards())
    eventually(folder.is_over)  # close had it guarded again
    with EmbeddedServer.open(folder.path):
        assert folder.ask("GET k") == "v"


def test_when_all_but_the_server_are_killed_the_next_command_adopts_it(folder: Folder) -> None:
    user = folder.run(USER)
    assert line_of(user) == "open"
    folder.ask("SET k v")
    servers = folder.servers()
    folder.kill(folder.guards())
    user.kill()
    user.wait()
    with EmbeddedServer.open(folder.path):
        assert folder.ask("GET k") == "v"
        assert folder.servers() == servers
    eventually(folder.is_over)


def test_when_all_are_killed_the_next_command_finds_the_data_and_clears_what_is_stale(folder: Folder) -> None:
    user = folder.run(USER)
    assert line_of(user) == "open"
    folder.ask("SET k v")
    user.kill()
    user.wait()
    folder.kill_all()
    eventually(folder.is_over)
    folder.runtime.make_socket_folder()
    folder.runtime.socket.touch()  # not even a socket
    folder.runtime.failure.write_text("of yesterday")
    with EmbeddedServer.open(folder.path) as server:
        assert folder.ask("GET k") == "v"
        server.ensure()


def test_a_killed_user_takes_all_along(folder: Folder) -> None:
    user = folder.run(USER)
    assert line_of(user) == "open"
    user.kill()
    user.wait()
    eventually(folder.is_over)


def test_a_guard_told_to_stop_stops_its_server_and_a_user_gets_another(folder: Folder) -> None:
    with EmbeddedServer.open(folder.path) as server:
        folder.ask("SET k v")
        (guard,) = folder.guards()
        for ignored in (signal.SIGINT, signal.SIGHUP):
            os.kill(guard, ignored)
        old = folder.servers()
        os.kill(guard, signal.SIGTERM)
        eventually(lambda: old[0] not in folder.servers())
        eventually(folder.is_over)
        server.ensure()
        eventually(folder.answers)
        assert folder.ask("GET k") == "v"


def test_a_socket_that_was_cleaned_away_comes_back(folder: Folder) -> None:
    with EmbeddedServer.open(folder.path) as server:
        folder.ask("SET k v")
        # Only of an adopted server is it sure from outside that its guard has met the socket.
        folder.kill(folder.guards())
        server.ensure()
        eventually(lambda: "adopted the server" in folder.runtime.guard_log.read_text())
        old = folder.servers()
        folder.runtime.socket.unlink()
        eventually(lambda: folder.revived(old))
        assert folder.ask("GET k") == "v"


def test_a_removed_data_folder_is_an_error_not_a_server_that_writes_nowhere(folder: Folder) -> None:
    with EmbeddedServer.open(folder.path) as server:
        folder.path.rename(folder.path.with_name("elsewhere"))
        eventually(folder.is_over)
        with pytest.raises(EmbeddedServerError, match="was removed while it was in use"):
            server.ensure()


def test_many_commands_at_the_same_moment_share_one_server(folder: Folder) -> None:
    users = [folder.run(USER) for _ in range(5)]
    assert [line_of(user) for user in users] == ["open"] * 5
    assert len(folder.servers()) == len(folder.guards()) == 1
    for user in users:
        user.communicate()
        assert user.returncode == 0
    eventually(folder.is_over)
    assert folder.runtime.guard_log.read_text().count("started the server") == 1


def test_commands_that_come_while_the_server_is_stopping_lose_nothing(folder: Folder) -> None:
    seed = random.randrange(1_000_000)
    print(f"seed {seed}")
    rounds = 12
    users = [folder.run(INCREMENTER, str(seed + number), str(rounds)) for number in range(3)]
    outputs = [user.communicate()[0].split() for user in users]
    assert [user.returncode for user in users] == [0, 0, 0]
    # Each number once: a second server on the file, or one begun before the other's end, would give one twice.
    assert sorted(int(count[1:]) for output in outputs for count in output) == list(range(1, 3 * rounds + 1))
    eventually(folder.is_over)
    assert folder.runtime.guard_log.read_text().count("started the server") > 1  # it did stop in between
    with EmbeddedServer.open(folder.path):
        assert folder.ask("GET n") == str(3 * rounds)


@pytest.mark.parametrize(
    "name", ["with space", "quo\"te's", "ümläut-数据", "back\\slash #; $x", "x" * 200 + "/" + "y" * 200]
)
def test_any_path_will_do(tmp_path: Path, name: str) -> None:
    folder = Folder(tmp_path / name / "data")
    try:
        for value in ("1", "2"):
            with EmbeddedServer.open(folder.path):
                assert folder.ask("INCR n") == f":{value}"
            eventually(folder.is_over)
        assert (folder.path / "valkey" / "appendonlydir").is_dir()
    finally:
        folder.end()


def test_a_folder_named_jobs_in_the_working_directory_is_not_taken_for_ours(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "__init__.py").write_text("raise RuntimeError")
    monkeypatch.chdir(tmp_path)
    with EmbeddedServer.open(Path("data")):
        assert folder.answers()
