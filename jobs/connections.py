"""Connections to Redis and the addresses Celery wants for the same server."""

from __future__ import annotations

import functools
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from jobs import keys, tls
from jobs.errors import SchemaVersionError, StoreFull, StoreRefused, StoreUnavailable, UsageError

if TYPE_CHECKING:
    import redis
    import redis.asyncio

SCHEMA_VERSION = 1

#: Seconds after which a silent server counts as gone; a script of ours never runs so long.
SOCKET_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 5.0

#: What is said when Redis answers, but can't write its append-only file.
DISK_FULL = "Redis can't write to its disk: make room there; nothing was lost"


def connect(url: str, silent_s: float = SOCKET_TIMEOUT_S, setting: str = "MIMOQ_REDIS_URL") -> redis.Redis:
    """A sync client; replies are bytes. Raises `UsageError` for an address that can't be read.

    A server that is silent for `silent_s` counts as gone. `setting` is where the address comes from.

    It tries nothing twice: who waits for a store that is away (`jobs.patience`), or must not, says so itself.
    """
    import redis

    tls.split(url, setting)  # says more of what is wrong in it than redis-py would, which also looks later
    try:
        client = redis.Redis.from_url(url, **(_options(url) | {"socket_timeout": silent_s}))
        pool = client.connection_pool
        pool.connection_class(**pool.connection_kwargs)  # would else fail at the first command
    except (TypeError, ValueError):  # whose message may hold a part of the password
        raise UsageError(f"the address of Redis can't be read: check {setting} and its options") from None
    return client


def connect_async(url: str, max_connections: int = 16) -> redis.asyncio.Redis:
    """An async client for one event loop; replies are bytes. Calls wait for a free connection."""
    import redis.asyncio

    pool = redis.asyncio.BlockingConnectionPool.from_url(
        url, max_connections=max_connections, timeout=SOCKET_TIMEOUT_S, **_options(url)
    )
    kind: Any = pool.connection_class
    pool.connection_class = _packing(kind)
    return redis.asyncio.Redis(connection_pool=pool)


@functools.cache
def _packing(connection: type[Any]) -> type[Any]:
    """The same class of connections, whose commands hiredis packs: redis-py does that itself only where it is not async.

    A command of the worker has hundreds of arguments, each of which costs redis-py's Python 1 µs.
    """
    import hiredis

    def pack_command(self: Any, *args: Any) -> list[bytes]:
        name, *rest = args
        # Some names are two words, which Redis wants apart.
        return [hiredis.pack_command((*name.split(), *rest))]

    return type(connection.__name__, (connection,), {"pack_command": pack_command})


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
    return f"redis+socket://{parts.netloc}{parts.path}?virtual_host={db}"


@contextmanager
def redis_errors(hint: str = "; nothing was lost", opening: bool = False) -> Iterator[None]:
    """Turns errors of redis-py into `StoreUnavailable` with a line for people that ends in `hint`.

    It is `StoreFull` where Redis answers, and `StoreRefused` where waiting would not help. A host that nobody knows is
    such a case while `opening`; later it is one whose server is being restarted.
    """
    import redis

    try:
        yield
    except (redis.exceptions.AuthenticationError, redis.exceptions.AuthorizationError):
        raise StoreRefused("Redis refuses the user or password it is given: check MIMOQ_REDIS_URL") from None
    except redis.exceptions.NoPermissionError:
        raise StoreRefused("Redis does not allow its user what mimoq needs: check that user's ACL") from None
    except redis.exceptions.OutOfMemoryError:
        raise StoreFull("Redis is out of memory: free some, or raise its maxmemory; nothing was lost") from None
    except redis.RedisError as error:
        if "MISCONF" in str(error):
            raise StoreFull(DISK_FULL) from None
        if tls.untrusted(error):
            raise StoreRefused(f"Redis's certificate is not trusted: check MIMOQ_REDIS_URL, {tls.HINT}") from None
        cause = error.__context__
        if opening and isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME:
            raise StoreRefused(f"Redis's host is not known{hint}") from None
        raise StoreUnavailable(f"Redis does not answer ({type(error).__name__}){hint}") from None


def check_schema(client: redis.Redis) -> None:
    """Marks an empty store with the schema's version; refuses one written by another mimoq.

    Raises `SchemaVersionError`, or `StoreUnavailable` when Redis does not answer.
    """
    with redis_errors(": check MIMOQ_REDIS_URL", opening=True):
        found: Any = client.get(keys.SCHEMA)
        if found is None:  # only then, so that a store that is out of memory can be looked at
            client.set(keys.SCHEMA, SCHEMA_VERSION, nx=True)
            found = client.get(keys.SCHEMA)
    version = int(found) if found and bytes(found).isdigit() else -1
    if version != SCHEMA_VERSION:
        raise SchemaVersionError(
            f"the store has schema version {found.decode(errors='replace') if found else '?'}, "
            f"this mimoq reads {SCHEMA_VERSION}: use the mimoq that wrote it, or another MIMOQ_DATA_DIR or MIMOQ_REDIS_URL"
        )
