"""Keeps the suite on this machine: whatever in the test process reaches for another host is refused, and told.

An audit hook sees every socket of Python, whoever opened it; uvloop connects below Python and is wrapped beside it.
"""

from __future__ import annotations

import ipaddress
import sys
from typing import Any

import uvloop

#: What was refused, even where the code under test swallowed the error; a fixture fails the test that did it.
refused: list[str] = []

_NAMES = {"", "localhost", "ip6-localhost"}


class NetworkRefused(RuntimeError):
    """A test tried to reach another machine."""


def is_local(host: object) -> bool:
    """Whether a host name or address can only mean this machine; None and "" are every address of its own."""
    if isinstance(host, (bytes, bytearray)):
        host = bytes(host).decode("ascii", "replace")
    if host is None or (isinstance(host, str) and host.lower() in _NAMES):
        return True
    try:
        address = ipaddress.ip_address(str(host).split("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def check(host: object) -> None:
    """Raises NetworkRefused, and keeps a record, unless `host` is this machine."""
    if not is_local(host):
        refused.append(f"{host!r}")
        raise NetworkRefused(f"a test reached for {host!r}; tests may use loopback only")


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if not event.startswith("socket."):
        return
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        check(args[0])
    elif event in ("socket.connect", "socket.sendto", "socket.sendmsg") and isinstance(args[1], tuple) and args[1]:
        check(args[1][0])  # the address of a unix socket is no tuple


def stay_on_this_machine() -> None:
    """From now on, for the life of the process."""
    sys.addaudithook(_audit)
    connect, look_up = uvloop.Loop.create_connection, uvloop.Loop.getaddrinfo

    def create_connection(loop: Any, factory: Any, host: Any = None, *args: Any, **options: Any) -> Any:
        check(host)
        return connect(loop, factory, host, *args, **options)

    def getaddrinfo(loop: Any, host: Any, *args: Any, **options: Any) -> Any:
        check(host)
        return look_up(loop, host, *args, **options)

    for name, guarded in (("create_connection", create_connection), ("getaddrinfo", getaddrinfo)):
        setattr(uvloop.Loop, name, guarded)
