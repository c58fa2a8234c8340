"""Ports of loopback for servers that are told theirs."""

from __future__ import annotations

import contextlib
import random
import socket


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on at present, below those that systems hand out to clients by themselves:
    whoever asks at one of those in vain, time and again, is one day its own client there and hears its own words."""
    with contextlib.ExitStack() as stack:
        found: list[int] = []
        for port in random.sample(range(20_000, 30_000), 1_000):
            if len(found) == count:
                return found
            listener = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                listener.bind(("127.0.0.1", port))
                found.append(port)
    raise OSError(f"found no {count} free ports")


def free_port() -> int:
    return free_ports(1)[0]
