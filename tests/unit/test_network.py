"""The suite's own wall: nothing in it reaches another host, and a test that tries fails."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import uvloop

from tests import network
from tests.network import NetworkRefused

ELSEWHERE = "192.0.2.1"  # reserved for documentation: nobody has it


def connect_by_name() -> None:
    socket.create_connection(("elsewhere.invalid", 80), timeout=1)


def connect_by_address() -> None:
    with socket.socket() as sock:
        sock.connect((ELSEWHERE, 80))


def connect_ex() -> None:
    with socket.socket() as sock:
        sock.connect_ex((ELSEWHERE, 80))


def connect_v6() -> None:
    with socket.socket(socket.AF_INET6) as sock:
        sock.connect(("2001:db8::1", 80))


def send() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"x", (ELSEWHERE, 53))


def look_up() -> None:
    socket.gethostbyname("elsewhere.invalid")


async def open_connection() -> None:
    await asyncio.open_connection(ELSEWHERE, 80)


async def resolve() -> None:
    await asyncio.get_running_loop().getaddrinfo("elsewhere.invalid", 80)


def on(factory: Callable[[], asyncio.AbstractEventLoop], act: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(act())  # type: ignore[arg-type]  # a coroutine function

    return run


REACHES = [
    connect_by_name,
    connect_by_address,
    connect_ex,
    connect_v6,
    send,
    look_up,
    *(on(loop, act) for loop in (asyncio.new_event_loop, uvloop.new_event_loop) for act in (open_connection, resolve)),
]


@pytest.mark.parametrize("reach", REACHES)
def test_another_host_is_refused_and_told(reach: Callable[[], None]) -> None:
    with pytest.raises(NetworkRefused, match=r"192\.0\.2\.1|2001:db8::1|elsewhere\.invalid"):
        reach()
    assert len(network.refused) == 1
    network.refused.clear()  # or the wall would fail this test, too


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "::1", "localhost", "", None, b"127.0.0.1", "0.0.0.0"])
def test_this_machine_is_allowed(host: object) -> None:
    network.check(host)


def test_loopback_works() -> None:
    with socket.create_server(("localhost", 0)) as server, socket.create_connection(server.getsockname()) as client:
        assert client.getpeername() == server.getsockname()


def test_no_setting_of_the_shell_or_a_file_is_left() -> None:
    assert [name for name in os.environ if name.startswith("MIMOQ_")] == ["MIMOQ_BASE_URL"]
    assert not Path(".env").exists()
