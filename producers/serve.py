"""`mimoq serve`: store, workers and API on one machine, by one command, until it is told to stop.

Every process is a child that reads a pipe whose other end this one holds, so none outlives it, kill -9 included; the
embedded Valkey has its guard. Children that die are started again; one that keeps dying, or refuses its settings, ends all
with a line. Told to stop, the API goes first, so that nothing new comes in; what workers have in flight may end.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shlex
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from jobs import identity, tokens
from jobs.errors import MimoqError, NotFound, StoreUnavailable, UsageError
from jobs.gates import account_gate, open_gate
from jobs.keys import SERVED
from jobs.settings import PREFIX, Settings, is_loopback
from producers.connection import Connection
from producers.environment import variables
from producers.interrupts import Interrupts
from producers.service import Service
from producers.simulation import Simulation, simulated
from producers.source import say
from producers.workers import Workers

#: The file in the data folder that holds its token's text.
TOKEN_FILE = "serve.token"  # noqa: S105 - a name, not a secret
#: Seconds that the API gets to end: its requests have 10, webhooks under way 6 more, and to close the store takes a moment.
API_STOP_S = 17.0
#: Seconds between two looks at the children.
TICK_S = 0.1
#: Seconds between two looks at the account's gate.
GATE_S = 2.0
REQUEST = {"request": {"messages": [{"role": "user", "content": "Hello"}]}}


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """The flags of `mimoq serve` that are not settings; `workers` is the number of processes for each lane."""

    workers: int = 1
    simulate: bool = False


class Serve:
    """One such service, from its options to its exit status."""

    def __init__(self, options: ServeOptions, settings: Settings, workers: Workers) -> None:
        self._settings = simulated(settings) if options.simulate else settings
        self._simulate = options.simulate
        self._lanes = [*SERVED] * options.workers
        self._interrupts = Interrupts()
        self._workers = workers
        self._simulation: Simulation | None = None
        self._connection: Connection | None = None
        self._api: Service | None = None
        self._gate_at = 0.0
        self._gate_told = ""

    def run(self) -> int:
        """Does it all; returns the exit status. Raises `MimoqError` where a line says it all."""
        if self._simulate:
            say("simulating: the answers come from mimoq's own simulator on this machine, not from MiMo")
        elif self._settings.api_key is None:
            raise UsageError(f"no API key: set {PREFIX}API_KEY, or try it out with --simulate")
        check_auth(self._settings)
        check_port(self._settings.api_host, self._settings.api_port)
        with self._interrupts.heard():
            try:
                self._start()
                self._interrupts.following = True
                while not self._interrupts.count:
                    self._look_after()
                    time.sleep(TICK_S)
                self._drain()
            except KeyboardInterrupt:
                pass  # the third, or one that came before all had started
            finally:
                self._end()
        return 0 if self._interrupts.status == 128 + signal.SIGTERM else self._interrupts.status

    # -- the start

    def _start(self) -> None:
        for lane in self._lanes:
            self._workers.prepare(lane)
        if self._simulate:
            self._simulation = Simulation()
        settings = self._settings
        self._connection = connection = Connection(settings, say)
        folder = settings.data_dir.resolve()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{folder}: {error.strerror}; choose another --data-dir") from None
        token = connection.patience.call(kept_token, connection.client, folder) if settings.api_auth else None
        # A key that was refused once may be tried at once.
        connection.patience.call(open_gate, connection.client, identity.account_of(settings))
        told = variables(settings, **({"base_url": self._simulation.wait()} if self._simulation is not None else {}))
        self._workers.begin(self._lanes, told, folder / "worker.log", settings.drain_s)
        argv = ["api", "--host", settings.api_host, "--exit-with-stdin"]
        self._api = Service("the API", argv, settings.api_port, folder / "api.log", told)
        url = _callable(self._api.wait())
        print(f"address: {url}")
        if token is not None:
            print(f"token: {token}")
        print(curl_line(url, token), flush=True)
        say(f"serving until Ctrl-C; logs: {folder / 'api.log'}, {folder / 'worker.log'}")

    # -- while it runs

    def _look_after(self) -> None:
        assert self._connection is not None
        assert self._api is not None
        if self._connection.server is not None:
            self._connection.server.ensure()
        self._workers.ensure()
        self._api.ensure()
        if self._simulation is not None:
            self._simulation.ensure()
        elif time.monotonic() >= self._gate_at:
            self._gate_at = time.monotonic() + GATE_S
            with contextlib.suppress(StoreUnavailable):  # workers and API wait for it, and say so in their logs
                self._tell_gate()

    def _tell_gate(self) -> None:
        """Says when the upstream refuses the account's calls: whoever waits for an answer would not learn why."""
        assert self._connection is not None
        gate = account_gate(self._connection.client, identity.account_of(self._settings))
        why = "" if gate is None else f"{gate.reason}, {gate.status}"
        if why != self._gate_told:
            self._gate_told = why
            if why:
                say(f"the upstream has shut the account ({why}): no job fails for it; one call tries at times")
            else:
                say("the upstream takes the account's calls again")

    # -- the end

    def _drain(self) -> None:
        """Takes no more requests and lets what is in flight end, in the API too; a second signal ends that."""
        assert self._api is not None
        say(f"stopping: calls in flight get up to {self._settings.drain_s:g} s to end; Ctrl-C again to leave now")
        self._api.terminate()
        self._workers.stop()
        api_end = time.monotonic() + API_STOP_S
        while self._interrupts.count < 2:
            if not self._workers.alive and (not self._api.alive or time.monotonic() >= api_end):
                break
            time.sleep(TICK_S)
        if self._interrupts.count > 1:
            self._workers.kill()
        self._api.stop(0.0)  # it has ended, or has had its time

    def _end(self) -> None:
        hurried = self._interrupts.count > 1
        if self._api is not None:
            self._api.stop(0.0 if hurried else API_STOP_S)
        self._workers.end()
        if self._simulation is not None:
            self._simulation.stop()
        if self._connection is not None:
            self._connection.close()


def check_auth(settings: Settings) -> None:
    """Raises `UsageError`, with the API's own words, where it would refuse to listen for others without tokens."""
    if not settings.api_auth and not is_loopback(settings.api_host):
        raise UsageError(
            f"{PREFIX}API_AUTH is off, so the API listens on loopback only, not on {settings.api_host}: "
            "turn it on, or use --host 127.0.0.1"
        )


def check_port(host: str, port: int) -> None:
    """Raises `UsageError` where the API could not listen; better told before anything is started."""
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "is no address of this machine"
        raise UsageError(f"can't listen on {host} port {port}: {reason}; choose another --port or --host") from None


def token_name(folder: Path) -> str:
    """The name of a folder's token in a store that other machines and folders may share, each with a token of its own."""
    place = f"{socket.gethostname()}\n{folder.resolve()}"
    return f"serve-{hashlib.blake2b(os.fsencode(place), digest_size=4).hexdigest()}"


def kept_token(client: Any, folder: Path) -> str:
    """The token of the file in the data folder; where there is none that the store knows, a new one of the same tenant.

    Raises `StoreUnavailable`, or `MimoqError` when the file can't be written.
    """
    path = folder / TOKEN_FILE
    try:
        text = path.read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        text = ""
    except OSError as error:
        raise MimoqError(f"{path}: {error.strerror}") from None
    parts = tokens.split(text)
    found = tokens.find(client, parts[0]) if parts is not None else None
    if found is not None and tokens.matches(found, text):
        return text
    name = token_name(folder)
    try:
        text = tokens.replace(client, name)
        say(f"a new token: {path} did not hold the one named {name!r}, which is revoked")
    except NotFound:
        text = tokens.create(client, name)
    _write(path, text)
    return text


def _write(path: Path, text: str) -> None:
    """Writes the file whole, and for its owner alone."""
    new = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:  # noqa: PTH123 - it opens a descriptor
            file.write(text + "\n")
        new.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            new.unlink()
        raise MimoqError(f"{path}: {error.strerror}") from None


def _callable(url: str) -> str:
    """An address to call it at: where it listens on every address of this machine, its loopback."""
    parts = urlsplit(url)
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(parts.hostname or "")  # noqa: S104 - nothing listens here
    return url if host is None else f"{parts.scheme}://{host}:{parts.port}"


def curl_line(url: str, token: str | None) -> str:
    """A line for a shell that submits a job and waits for its answer."""
    words = ["curl", "-s", f"{url}/v1/jobs?wait=30"]
    if token is not None:
        words += ["-H", f"Authorization: Bearer {token}"]
    return shlex.join([*words, "-H", "Content-Type: application/json", "-d", json.dumps(REQUEST)])
