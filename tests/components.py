"""The real components that tests run against; one that is missing fails in CI and skips elsewhere."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote

import psutil
import psycopg
import pytest

from jobs.guard import GuardError, server_program
from jobs.runtime import ask
from tests.ports import free_ports
from tests.tls import Door, authority
from tests.waiting import wait_for


def require(component: str, reason: str) -> NoReturn:
    """Ends the test that can't run: skipped, but failed where CI=true, since there nothing may go untested."""
    message = f"{component} is missing: {reason}"
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(message, pytrace=False)
    pytest.skip(message)


class Valkey:
    """A Valkey server of the tests' own; it keeps nothing on disk, or (`durable`) all it is told.

    It listens on a unix socket alone, or (`secure`) behind TLS on loopback too, for user `mimoq` with `PASSWORD`.
    """

    PASSWORD = "p@ss/word nobody may see"

    def __init__(self, durable: bool = False, secure: bool = False) -> None:
        """Starts it and returns once it answers; skips (in CI: fails) the test where there is no server program."""
        try:
            program = server_program()
        except GuardError as error:
            require("valkey", str(error))
        # Not under pytest's own folders: the address of a unix socket ends at 107 bytes.
        self._folder = Path(tempfile.mkdtemp(prefix="mimoq-test-", dir="/tmp"))
        self._socket = self._folder / "valkey.sock"
        self._log = self._folder / "valkey.log"
        self.url = f"unix://{self._socket}"
        options = (
            f"--port 0 --unixsocketperm 700 --save --appendonly {'yes' if durable else 'no'} "
            f"--unixsocket {self._socket} --dir {self._folder}"
        )
        self._argv = [program, *options.split()]
        self._door: Door | None = None
        if secure:
            # The socket's user, which is the tests' own, stays without a password.
            digest = sha256(self.PASSWORD.encode()).hexdigest()
            self._argv += f"--user mimoq on #{digest} ~* &* +@all".split()
            self._door = Door(str(self._socket))
            self.tls_url = (
                f"rediss://mimoq:{quote(self.PASSWORD, safe='')}@localhost:{self._door.port}/0"
                f"?ssl_ca_certs={quote(authority()[0])}"
            )
        try:
            self.start()
        except BaseException:
            self.stop()
            raise

    def start(self) -> None:
        """Starts it (again) and returns once it answers."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait_for(self._answers, what="an answer of Valkey")

    def _answers(self) -> bool:
        assert self._process.poll() is None, f"Valkey ended: {self._log.read_text(errors='replace')[-1000:]}"
        with contextlib.suppress(OSError):
            return ask(self._socket, "PING") == "+PONG"
        return False

    def flush(self) -> None:
        """Removes everything in it."""
        assert ask(self._socket, "FLUSHALL SYNC", timeout_s=10.0) == "+OK"

    def written(self) -> None:
        """Waits until all it was told is in its file: a disk that is busy may hold writes back."""
        wait_for(lambda: "\naof_buffer_length:0\r" in ask(self._socket, "INFO persistence"), what="a written file")

    def kill(self) -> None:
        """`kill -9`."""
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        """It keeps its connections, and says nothing."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """The end of a pause."""
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """Ends it at once and removes its folder."""
        if self._door is not None:
            self._door.close()
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)


class RabbitMQ:
    """A RabbitMQ node of the tests' own: on loopback alone, its files and its epmd its own too.

    It takes connections in the clear and over TLS, both with the `amqps://` address's user and password.
    """

    PROGRAM = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")

    def __init__(self) -> None:
        """Starts it and returns once it takes connections, some seconds later."""
        # Debian's wrapper on PATH would become another user; elsewhere the program itself is on PATH.
        program = self.PROGRAM if self.PROGRAM.exists() else shutil.which("rabbitmq-server")
        if program is None:
            require("rabbitmq", "no rabbitmq-server; install it, as .ci/run does")
        self._argv = [str(program)]
        self._folder = Path(tempfile.mkdtemp(prefix="mimoq-test-", dir="/tmp"))
        self._log = self._folder / "said"
        self.port, tls_port, distribution, epmd = free_ports(4)
        ca, certificate = authority()
        self.url = f"amqp://guest:guest@127.0.0.1:{self.port}//"
        self.tls_url = f"amqps://guest:guest@localhost:{tls_port}//?ssl_ca_certs={quote(ca)}"
        (self._folder / "plugins").write_text("[].\n")
        (self._folder / "tls.conf").write_text(
            f"listeners.ssl.1 = 127.0.0.1:{tls_port}\nssl_options.cacertfile = {ca}\n"
            f"ssl_options.certfile = {certificate}\nssl_options.keyfile = {certificate}\n"
            "ssl_options.verify = verify_none\n"
        )
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RABBITMQ_")},
            "HOME": str(self._folder),  # the cookie of Erlang's nodes is in it
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(epmd),
            "ERL_EPMD_RELAXED_COMMAND_CHECK": "true",  # lets it be ended at once, whoever it thinks it knows
            "RABBITMQ_NODENAME": f"mimoq-{self.port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(distribution),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1} +sbwt none",
            "RABBITMQ_MNESIA_BASE": str(self._folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self._folder / "log"),
            "RABBITMQ_PID_FILE": str(self._folder / "pid"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self._folder / "plugins"),
            "RABBITMQ_CONFIG_FILE": str(self._folder / "tls"),
            "RABBITMQ_CONF_ENV_FILE": str(self._folder / "none.sh"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(self._folder / "none.config"),
        }
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self.start()
        except BaseException:
            self.stop()
            raise

    def start(self) -> None:
        """Starts it (again), with what it kept of durable queues."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._argv,
                env=self._environment,
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_for(self._answers, 60.0, "a RabbitMQ that takes connections")

    def _answers(self) -> bool:
        """It listens before it is ready, and only then greets."""
        assert self._process is not None
        assert self._process.poll() is None, f"RabbitMQ ended: {self._log.read_text(errors='replace')[-2000:]}"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1.0) as connection:
            connection.settimeout(5.0)
            connection.sendall(b"AMQP\x00\x00\x09\x01")
            return connection.recv(1) == b"\x01"  # a method frame: connection.start
        return False

    def pause(self) -> None:
        """It keeps its connections, and says nothing."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """The end of a pause."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGCONT)

    def kill(self) -> None:
        """`kill -9` of the node."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def stop(self) -> None:
        """Ends it at once, its epmd too, and removes its folder."""
        self.kill()
        if epmd := shutil.which("epmd"):
            subprocess.run([epmd, "-kill"], env=self._environment, stdout=subprocess.DEVNULL, check=False)
        shutil.rmtree(self._folder, ignore_errors=True)


class PostgreSQL:
    """A PostgreSQL cluster of the tests' own, on a unix socket alone: `postgres` needs no password, others have one."""

    def __init__(self) -> None:
        """Makes it, starts it and returns once it answers, some seconds later."""
        folders = [*os.environ["PATH"].split(os.pathsep), *sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin")))]
        found = shutil.which("initdb", path=os.pathsep.join(folders))
        if found is None:
            require("postgresql", "no initdb; install it, as .ci/run does")
        self._programs = Path(found).resolve().parent
        self._folder = Path(tempfile.mkdtemp(prefix="mimoq-test-", dir="/tmp"))
        self._log = self._folder / "said"
        self._become: list[str] = []
        if os.geteuid() == 0:  # as which it refuses to run
            user = next(user for user in ("postgres", "nobody") if _has_user(user))
            self._become = ["setpriv", f"--reuid={user}", f"--regid={pwd.getpwnam(user).pw_gid}", "--clear-groups"]
            shutil.chown(self._folder, user)
        self.url = self.url_of("postgres")
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._make()
            self.start()
            with self.connect("postgres") as connection:
                connection.execute("CREATE DATABASE mimoq")
        except BaseException:
            self.stop()
            raise

    def url_of(self, user: str, database: str = "mimoq") -> str:
        """Its address as Celery spells it; `user` may have a password, as in `me:secret`."""
        return f"db+postgresql+psycopg://{user}@/{database}?host={self._folder}"

    def connect(self, database: str = "mimoq") -> psycopg.Connection[tuple[Any, ...]]:
        """A connection of the tests' own."""
        return psycopg.connect(host=str(self._folder), user="postgres", dbname=database, autocommit=True)

    def _make(self) -> None:
        data = self._folder / "data"
        options = ["--no-sync", "--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C"]
        command = [*self._become, str(self._programs / "initdb"), *options, str(data)]
        subprocess.run(command, cwd=self._folder, check=True, capture_output=True)
        rules = "local all postgres trust\nlocal all all scram-sha-256\n"
        (data / "pg_hba.conf").write_text(rules)

    def start(self) -> None:
        """Starts it (again) and returns once it answers."""
        options = ["-D", "data", "-k", str(self._folder), "-c", "listen_addresses=", "-F", "-c", "max_connections=60"]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._become, str(self._programs / "postgres"), *options],
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait_for(self._answers, 60.0, "an answer of PostgreSQL")

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"PostgreSQL ended: {self._log.read_text(errors='replace')[-2000:]}"
        with contextlib.suppress(psycopg.OperationalError), self.connect("postgres"):
            return True
        return False

    def flush(self) -> None:
        """Removes every table in it."""
        with self.connect() as connection:
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")

    def _each(self, work: Callable[[psutil.Process], object]) -> list[psutil.Process]:
        """Does it to the server's processes and to itself, each of which is the first of a session of its own."""
        assert self._process is not None
        server = psutil.Process(self._process.pid)
        server.suspend()  # it starts no others meanwhile
        processes = [*server.children(recursive=True), server]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                work(process)
        return processes

    def pause(self) -> None:
        """It keeps its connections, and says nothing."""
        self._each(psutil.Process.suspend)

    def go_on(self) -> None:
        """The end of a pause."""
        self._each(psutil.Process.resume)

    def kill(self) -> None:
        """`kill -9` of all its processes."""
        if self._process is not None and self._process.poll() is None:
            processes = self._each(psutil.Process.kill)
            self._process.wait()
            # What is left of their memory would be in the next server's way.
            wait_for(lambda: not any(map(_runs, processes)), what="the end of PostgreSQL's processes")

    def stop(self) -> None:
        """Ends it at once and removes its folder."""
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def _has_user(name: str) -> bool:
    with contextlib.suppress(KeyError):
        pwd.getpwnam(name)
        return True
    return False
