"""Calls to addresses that users of the API name, so that nobody reaches through them what only this machine can reach.

Whoever may submit may name a callback address. It is looked at twice: when it is submitted, for what can be seen in it, and
when it is called, on the very address that the socket connects to, whatever its name, its spelling or a changed answer of a
name server made of it. Redirects are not followed, proxies and cookies not used, connections not shared, and an answer gets
10 s and 64 KB, of which only the status counts. Allowed besides, by setting: `http://`, private addresses.
"""

from __future__ import annotations

import asyncio
import email.utils
import ipaddress
import socket
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from types import TracebackType
from typing import Any, Protocol, Self

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from jobs.errors import UsageError

MAX_URL = 2048
TOTAL_S = 10.0
#: Bytes of an answer that are read, so that its sender is not cut off; they are thrown away.
MAX_ANSWER = 65_536
#: Names looked up at once, in threads of their own: a slow name server must not hold up other work of the process.
LOOKUPS = 16

#: IPv4 that is not for everybody (the IANA special-purpose registry), multicast, reserved; and Azure's own services.
REFUSED_V4 = tuple(
    map(
        IPv4Network,
        (
            "0.0.0.0/8",
            "10.0.0.0/8",
            "100.64.0.0/10",
            "127.0.0.0/8",
            "168.63.129.16/32",
            "169.254.0.0/16",
            "172.16.0.0/12",
            "192.0.0.0/24",
            "192.0.2.0/24",
            "192.88.99.0/24",
            "192.168.0.0/16",
            "198.18.0.0/15",
            "198.51.100.0/24",
            "203.0.113.0/24",
            "224.0.0.0/3",
        ),
    )
)
#: IPv6 is public in one range alone, but for what tunnels (Teredo, 6to4), is set apart or made for documents.
PUBLIC_V6 = IPv6Network("2000::/3")
REFUSED_V6 = tuple(map(IPv6Network, ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")))
#: IPv6 that stands for the IPv4 address in its last 32 bits: mapped, and by NAT64.
EMBEDDING_V6 = tuple(map(IPv6Network, ("::ffff:0:0/96", "64:ff9b::/96")))


class Allowed(Protocol):
    """The settings that count here: `jobs.settings.Settings`."""

    @property
    def webhook_allow_http(self) -> bool:
        """Whether `http://` will do."""

    @property
    def webhook_allow_private(self) -> bool:
        """Whether any address will do."""


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


def is_public(address: str) -> bool:
    """Whether an address, as a socket is given it, can be that of anybody's server; False for what is no address."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, IPv4Address):
        return not any(ip in network for network in REFUSED_V4)
    if any(ip in network for network in EMBEDDING_V6):
        return is_public(str(IPv4Address(int(ip) & 0xFFFF_FFFF)))
    return ip in PUBLIC_V6 and not any(ip in network for network in REFUSED_V6)


def check_url(url: str, settings: Allowed) -> URL:
    """The address as it will be called. Raises `UsageError` with one line for one that never will be.

    What its name leads to is only known, and checked, when it is called.
    """
    if len(url) > MAX_URL:
        raise UsageError(f"the callback address is over {MAX_URL} characters long")
    # What another reader of addresses could take for something else; a host may be written in punycode.
    if not url.isascii() or not url.isprintable() or any(sign in url for sign in ' \\"<>^`{|}'):
        raise UsageError("the callback address holds characters that must be percent-encoded")
    try:
        parts = URL(url)
        host, port = parts.host, parts.port
    except ValueError:
        raise UsageError("the callback address can't be read") from None
    if parts.scheme != "https" and not (parts.scheme == "http" and settings.webhook_allow_http):
        raise UsageError(f"the callback address must begin with https://{_or_http(settings)}")
    if not host or not port:
        raise UsageError("the callback address names no host, or a port that can't be")
    if parts.user is not None or parts.password is not None:
        raise UsageError("the callback address must hold no user or password")
    if "#" in url:
        raise UsageError("the callback address must hold no fragment (#...)")
    if _is_number(host) and not _is_plain(host):
        raise UsageError("the callback address spells its host as a number: write 192.0.2.1, or [2001:db8::1]")
    if _is_plain(host) and not settings.webhook_allow_private and not is_public(host):
        raise UsageError("the callback address is not public: private, loopback and reserved ones are refused")
    return parts


def _or_http(settings: Allowed) -> str:
    return " or http://" if settings.webhook_allow_http else ""


def _is_plain(host: str) -> bool:
    """Whether a host is an address in its usual spelling."""
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return False
    return not (isinstance(ip, IPv6Address) and ip.scope_id)


def _is_number(host: str) -> bool:
    """Whether a host is an address in any spelling that a resolver takes: 2130706433, 0x7f.1, 127.1, fe80::1%eth0."""
    if ":" in host:
        return True
    try:
        socket.inet_aton(host.rstrip("."))
    except OSError:
        return False
    return True


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
    return list(socket.getaddrinfo(host, port, family, socket.SOCK_STREAM))


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
