"""Connections to Redis and the addresses Celery wants for the same server."""

from __future__ import annotations

import socket
import sys
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from jobs import keys
from jobs.errors import SchemaVersionError, StoreUnavailable, UsageError

if TYPE_CHECKING:
    import redis
    import redis.asyncio

    from jobs.settings import Settings

SCHEMA_VERSION = 1

#: Seconds after which a silent server counts as gone; a script of ours never runs so long.
SOCKET_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 5.0


def connect(url: str) -> redis.Redis:
    """A sync client; replies are bytes."""
    import redis

    return redis.Redis.from_url(url, **_options(url))


def connect_async(url: str, max_connections: int = 16) -> redis.asyncio.Redis:
    """An async client for one event loop; replies are bytes. Calls wait for a free connection."""
    import redis.asyncio

    pool = redis.asyncio.BlockingConnectionPool.from_url(
        url, max_connections=max_connections, timeout=SOCKET_TIMEOUT_S, **_options(url)
    )
    return redis.asyncio.Redis(connection_pool=pool)


def _options(url: str) -> dict[str, Any]:
    options: dict[str, Any] = {
        "socket_timeout": SOCKET_TIMEOUT_S,
        "socket_connect_timeout": CONNECT_TIMEOUT_S,
        "health_check_interval": 15,
    }
    if urlsplit(url).scheme != "unix":
        # On a Unix socket redis-py raises TypeError for these.
        options["socket_keepalive"] = True
        if sys.platform == "linux":
            options["socket_keepalive_options"] = {
                socket.TCP_KEEPIDLE: 15,
                socket.TCP_KEEPINTVL: 5,
                socket.TCP_KEEPCNT: 3,
            }
    return options


def celery_url(url: str) -> str:
    """The same server as Celery spells it: it calls a Unix socket `redis+socket://`."""
    parts = urlsplit(url)
    if parts.scheme == "rediss" and "ssl_cert_reqs" not in parse_qs(parts.query):
        return url + ("&" if parts.query else "?") + "ssl_cert_reqs=required"
    if parts.scheme != "unix":
        return url
    query = parse_qs(parts.query)
    db = query.get("db", ["0"])[0]
    return f"redis+socket://{parts.path}?virtual_host={db}"


def results_url(settings: Settings, redis_url: str) -> str:
    """The Redis that holds results, as redis-py spells it. Raises `UsageError` for another kind of backend."""
    if settings.result_backend is None:
        return redis_url
    url = settings.result_backend.get_secret_value()
    if url.startswith("redis+socket://"):
        path, _, query = url.removeprefix("redis+socket://").partition("?")
        return f"unix://{path}" + (f"?db={query.removeprefix('virtual_host=')}" if query else "")
    if not url.startswith(("redis://", "rediss://")):
        raise UsageError("MIMOQ_RESULT_BACKEND: must begin with redis://, rediss:// or redis+socket://")
    return url


def check_schema(client: redis.Redis) -> None:
    """Marks an empty store with the schema's version; refuses one written by a newer mimoq.

    Raises `SchemaVersionError`, or `StoreUnavailable` when Redis does not answer.
    """
    import redis

    try:
        client.set(keys.SCHEMA, SCHEMA_VERSION, nx=True)
        found: Any = client.get(keys.SCHEMA)
    except redis.RedisError as error:
        raise StoreUnavailable(f"Redis does not answer ({type(error).__name__}): check MIMOQ_REDIS_URL") from None
    version = int(found) if found and bytes(found).isdigit() else -1
    if version != SCHEMA_VERSION:
        raise SchemaVersionError(
            f"the store has schema version {found.decode(errors='replace') if found else '?'}, "
            f"this mimoq reads {SCHEMA_VERSION}: use the mimoq that wrote it, or another MIMOQ_DATA_DIR or MIMOQ_REDIS_URL"
        )
