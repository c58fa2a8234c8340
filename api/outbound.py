"""Calls to addresses that users of the API name, so that nobody reaches through them what only this machine can reach.

Whoever may submit may name a callback address. It is looked at twice: when it is submitted, for what can be seen in it, and
when it is called, on the very address that the socket connects to, whatever its name, its spelling or a changed answer of a
name server made of it. Redirects are not followed, proxies and cookies not used, connections not shared, and an answer gets
10 s and 64 KB, of which only the status counts. Allowed besides, by setting: `http://`, private addresses.
"""

from __future__ import annotations

import asyncio
import email.utils
import socket
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from types import TracebackType
from typing import Any, Self

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from api.addresses import Allowed, check_url, is_public
from jobs.errors import UsageError

TOTAL_S = 10.0
#: Bytes of an answer that are read, so that its sender is not cut off; they are thrown away.
MAX_ANSWER = 65_536
#: Names looked up at once, in threads of their own: a slow name server must not hold up other work of the process. A lookup
#: can't be broken off and may outlast its call, by 20 s as systems are set up: three times the calls under way at once.
LOOKUPS = 192


class RefusedAddress(OSError):
    """A name, or an address as it was written, led to an address that is not public."""

    def __init__(self) -> None:
        # Always the same text: of errors that are alike aiohttp raises the first, of others a mixture.
        super().__init__("the address is not public")


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a call: its status, or an error in one word; `retry_after_s` as the answer asked for."""

    status: int | None = None
    error: str | None = None
    retry_after_s: float | None = None

    @property
    def ok(self) -> bool:
        """Whether it was taken: any 2xx."""
        return self.status is not None and 200 <= self.status < 300


class Resolver(AbstractResolver):
    """Looks names up as the system does, in threads of its own."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(LOOKUPS, thread_name_prefix="webhook-names")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Every address of a name. Raises OSError for one that has none."""
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._threads, _look_up, host, port, family)
        return [
            ResolveResult(
                hostname=host,
                host=str(address[0]),
                port=port,
                family=kind,
                proto=proto,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for kind, _, proto, _, address in found
        ]

    async def close(self) -> None:
        """Lets go of the threads; one that still looks something up ends with that."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _look_up(host: str, port: int, family: socket.AddressFamily) -> list[Any]:
    try:
        return list(socket.getaddrinfo(host, port, family, socket.SOCK_STREAM))
    except UnicodeError:  # of a host that can be no name
        raise socket.gaierror(socket.EAI_NONAME, "no name") from None


class Outbound:
    """Posts to callback addresses; an async context manager, for one event loop."""

    def __init__(self, settings: Allowed, resolver: AbstractResolver | None = None, total_s: float = TOTAL_S) -> None:
        self._settings = settings
        self._resolver = resolver
        self._total_s = total_s

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(
            resolver=self._resolver or Resolver(),
            socket_factory=self._socket,
            use_dns_cache=False,
            force_close=True,  # a connection is for one delivery: whom it leads to was checked for that one
            limit=0,  # who calls limits
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=self._total_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            auto_decompress=False,
            skip_auto_headers={"Accept-Encoding"},
            headers={"User-Agent": f"mimoq/{version('mimoq')}", "Accept-Encoding": "identity"},
            max_line_size=8190,
            max_field_size=8190,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    def _socket(self, info: tuple[Any, ...]) -> socket.socket:
        """The socket for one address, about to be connected. Raises `RefusedAddress` instead for one that is not public."""
        family, kind, proto, _, address = info
        if not self._settings.webhook_allow_private and not is_public(str(address[0])):
            raise RefusedAddress
        return socket.socket(family=family, type=kind, proto=proto)

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        """What came of posting `body`; never raises, and takes 10 s at most."""
        try:
            address = check_url(url, self._settings)
        except UsageError:
            return Answer(error="refused_address")  # it was fine when it was submitted, under other settings
        try:
            async with self._session.post(
                address, data=body, headers=headers, allow_redirects=False, raise_for_status=False
            ) as response:
                wait_s = retry_after_s(response.headers.get("Retry-After"), response.headers.get("Date"))
                await _drop(response)
                status = response.status
        except TimeoutError:
            return Answer(error="timeout")
        except aiohttp.ClientConnectorError as error:
            return Answer(error=_why(error))
        except RuntimeError:  # which uvloop raises for some connections that fail
            return Answer(error="connect_error")
        except (aiohttp.ClientConnectionError, OSError):
            return Answer(error="connection_lost")
        except (aiohttp.ClientError, ValueError):
            return Answer(error="invalid_response")
        return Answer(status, None if 200 <= status < 300 else f"status_{status}", wait_s)


def _why(error: aiohttp.ClientConnectorError) -> str:
    if isinstance(error.os_error, RefusedAddress):
        return "refused_address"
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "unknown_host"
    # Both kinds of trouble with TLS: the certificate, and anything else.
    return "tls_error" if isinstance(error, aiohttp.ClientSSLError) else "connect_error"


async def _drop(response: aiohttp.ClientResponse) -> None:
    """Reads what little an answer holds; what is wrong with it does not matter, its status has come."""
    left = MAX_ANSWER
    try:
        while left > 0:
            piece = await response.content.read(left)
            if not piece:
                return
            left -= len(piece)
    except (aiohttp.ClientError, OSError, ValueError):  # a timeout is an OSError
        pass
    response.close()


def retry_after_s(value: str | None, date: str | None) -> float | None:
    """Seconds that a `Retry-After` asks to wait: a number, or a time, which is read against the answer's own `Date`."""
    if value is None:
        return None
    text = value.strip()
    if text.isascii() and text.isdigit() and len(text) < 10:
        return float(text)
    try:
        until = email.utils.parsedate_to_datetime(text)
        since = email.utils.parsedate_to_datetime(date or "")
        return max(0.0, (until - since).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return None
