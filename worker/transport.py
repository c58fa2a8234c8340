"""The wire below the upstream client: httpx's aiohttp transport over one pool of connections of our own."""

from __future__ import annotations

import base64
import ssl
import urllib.request
from contextvars import ContextVar
from functools import cache
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

import aiohttp
import httpx
from httpx_aiohttp import AiohttpTransport

from jobs.settings import is_loopback

KEEPALIVE_S = 30.0

# With buffers this small aiohttp stops reading a stream while nobody takes its pieces: the kernel gathers them.
_READ_BUFFER_BYTES = 64

connected: ContextVar[list[bool]] = ContextVar("connected")
"""Filled once the call of this context has a connection: from then on something may have been sent."""


class _Connector(aiohttp.TCPConnector):
    """Notes for each call that it has a connection: what fails before is never charged."""

    async def connect(self, *args: Any, **kwargs: Any) -> aiohttp.connector.Connection:
        connection = await super().connect(*args, **kwargs)
        connected.get().append(True)
        return connection


@cache
def _tls() -> ssl.SSLContext:
    return httpx.create_ssl_context()


def open_transport(base_url: str) -> httpx.AsyncBaseTransport:
    """A transport to this address; no limit of connections, no cookies, no retries, proxies from the environment."""
    context = _tls()
    proxy = find_proxy(base_url)
    # aiohttp shows these to a proxy it asks for a tunnel; without TLS the request itself must carry them.
    headers = proxy.headers if proxy is not None and base_url.startswith("http:") else None

    def session() -> aiohttp.ClientSession:
        # No limit here: the engine bounds the calls in flight, and a call that waited would look like a slow connect.
        connector = _Connector(limit=0, keepalive_timeout=KEEPALIVE_S, ssl=context)
        return aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=headers,
            read_bufsize=_READ_BUFFER_BYTES,
        )

    return AiohttpTransport(verify=context, client=session, proxy=proxy)


def find_proxy(base_url: str) -> httpx.Proxy | None:
    """The proxy that the environment names for this address, looked up once."""
    parts = urlsplit(base_url)
    host = parts.hostname or ""
    if is_loopback(host) or urllib.request.proxy_bypass(host):
        return None
    proxies = urllib.request.getproxies()
    given = proxies.get(parts.scheme) or proxies.get("all")
    if not given:
        return None
    proxy = urlsplit(given if "://" in given else f"http://{given}")
    headers = {}
    if proxy.username:
        pair = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
        headers["Proxy-Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
    return httpx.Proxy(urlunsplit((proxy.scheme, proxy.netloc.rpartition("@")[2], "", "", "")), headers=headers)
