"""Result backends: which one the settings name, opened.

`open_backend` gives every reader its own; `jobs.backends.base` says what each can do.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from jobs.backends.base import HINT, Memory, ResultBackend
from jobs.backends.redis import RedisResults
from jobs.connections import SOCKET_TIMEOUT_S, connect
from jobs.errors import UsageError

if TYPE_CHECKING:
    from jobs.settings import Settings

__all__ = ["HINT", "Memory", "RedisResults", "ResultBackend", "open_backend", "open_outside"]

POSTGRESQL = "db+postgresql+psycopg://"
_POSTGRESQL_EXAMPLE = f"{POSTGRESQL}USER:PASSWORD@HOST/DATABASE"
#: What cannot be a backend here, and why; by the scheme of its address.
_REFUSED = {
    "rpc": "its results can be read by one process alone, and once",
    "amqp": "its results can be read by one process alone, and once",
    "disabled": "it keeps no results",
    "cache+memory": "no other process can read its results",
    "memory": "no other process can read its results",
}


def open_backend(settings: Settings, redis_url: str, client: Any, silent_s: float = SOCKET_TIMEOUT_S) -> ResultBackend:
    """The result backend of these settings, for any thread; where it is the store's own Redis, on its sync `client`.

    Nothing is connected yet, so one that is away shows at the first call. Raises `UsageError` for an address that can't
    be read, a backend that can't serve, or a library that is missing.
    """
    return open_outside(settings, redis_url, silent_s) or RedisResults(client, with_state=True)


def open_outside(settings: Settings, redis_url: str, silent_s: float = SOCKET_TIMEOUT_S) -> ResultBackend | None:
    """The same, but None where it is the store's own Redis."""
    url = settings.result_backend.get_secret_value() if settings.result_backend is not None else redis_url
    scheme = url.partition("://")[0].lower()
    if scheme in ("redis", "rediss", "unix", "redis+socket"):
        url = _redis_url(url)
        return None if url == redis_url else RedisResults(connect(url, silent_s, "MIMOQ_RESULT_BACKEND"))
    if why := _REFUSED.get(scheme):
        raise UsageError(
            f"MIMOQ_RESULT_BACKEND: {scheme}:// can't serve: {why}; use redis://, rediss:// or {_POSTGRESQL_EXAMPLE}"
        )
    if url.startswith(POSTGRESQL):
        if not all(find_spec(library) for library in ("psycopg", "sqlalchemy")):
            raise UsageError("MIMOQ_RESULT_BACKEND: PostgreSQL needs pip install 'mimoq[postgres]'")
        from jobs.backends.postgresql import PostgreSQLResults

        return PostgreSQLResults(url, compress=settings.result_compression == "gzip", silent_s=silent_s)
    if scheme.removeprefix("db+").partition("+")[0] in ("postgresql", "postgres"):
        raise UsageError(f"MIMOQ_RESULT_BACKEND: PostgreSQL is spelled {_POSTGRESQL_EXAMPLE}")
    from jobs.backends.celery import CeleryResults

    return CeleryResults(url, settings.result_ttl_s)


def _redis_url(url: str) -> str:
    """Celery's spelling of a unix socket as redis-py's."""
    if not url.startswith("redis+socket://"):
        return url
    path, _, query = url.removeprefix("redis+socket://").partition("?")
    return f"unix://{path}" + (f"?db={query.removeprefix('virtual_host=')}" if query else "")
