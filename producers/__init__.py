"""Everything that puts jobs in: the Python client, the reader of bulk files, the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from producers.async_producer import AsyncProducer
    from producers.producer import JobResult, Producer

__all__ = ["AsyncProducer", "JobResult", "Producer"]


def __getattr__(name: str) -> Any:
    # Lazy, because `mimoq --help` lives in this package and must not wait for Redis and Celery to import.
    if name == "AsyncProducer":
        from producers.async_producer import AsyncProducer

        return AsyncProducer
    if name in __all__:
        from producers import producer

        return getattr(producer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
