"""Which callback addresses are called: what can be seen in one, and which addresses are public.

`check_url` judges an address as it was written; `is_public` the one a socket connects to, whatever a name led to.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Protocol

from yarl import URL

from jobs.errors import UsageError

MAX_URL = 2048
#: A host that a name server can be asked for; names are not percent-encoded.
NAME = re.compile(r"(?=.{1,253}\.?$)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\.?", re.IGNORECASE)

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
    if not _is_plain(host) and not NAME.fullmatch(parts.raw_host or ""):
        raise UsageError("the callback address names a host that can't be: each part is 1 to 63 of a-z, 0-9, - and _")
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
