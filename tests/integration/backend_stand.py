"""Result backends under test: where each is, how it goes and comes back, and results to be kept there."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from celery import Celery

from jobs.backends import ResultBackend, open_backend
from jobs.connections import celery_url
from jobs.requests import CHAT
from jobs.results import (
    About,
    Attempt,
    Failure,
    StoredResult,
    Usage,
    failure_payload,
    success_payload,
)
from jobs.settings import load_settings

USAGE = Usage(3, 2, 0, 0, 5)
ATTEMPTS = [Attempt(at=1.5, latency_s=0.25, verdict="succeeded", account="a", status=200, usage=USAGE)]
#: As long as an answer may be, and text that a reader could take for the end of one.
BODIES = {
    "short": b'{"id":"1","n":[1,2.5,null,true]}',
    "unicode": '{"text":"h\u00e9llo \u4f60\u597d \U0001f600 \u2028"}'.encode(),
    "escapes": b'{"text":"\\u0000 \\ud83d\\ude00 \\n \\"x\\"", "spaced" : [ 1 ]}',
    "misleading": b'{"traceback":null,"children":[],"date_done":"2020-01-01","task_id":"x","mimoq":{}}',
    "ends alike": b'[{"a":1,"traceback":null,"children":[],"date_done":"x","task_id":"y","mimoq":{}}]',
    "large": b'{"text":"%s"}' % (b"0123456789abcdef" * 320_000),
}


@dataclass
class Place:
    """A backend under test: where it is, and how it goes away and comes back."""

    name: str
    url: str = ""
    stop: Callable[[], None] = field(default=lambda: None)
    start: Callable[[], None] = field(default=lambda: None)
    pause: Callable[[], None] = field(default=lambda: None)
    go_on: Callable[[], None] = field(default=lambda: None)
    compression: str = "gzip"
    store: Any = None  # a client of the store, where it is the backend too

    @property
    def exact(self) -> bool:
        """Whether bodies come back as they came, to the byte."""
        return self.name != "file"

    def open(self, silent_s: float = 10.0) -> ResultBackend:
        settings = load_settings(result_backend=self.url, result_compression=self.compression)
        return open_backend(settings, self.url if self.store is not None else "unix:///nobody", self.store, silent_s)

    def reader(self) -> Celery:
        """A plain app of somebody else's."""
        return Celery(broker="memory://", backend=celery_url(self.url), set_as_current=False)


def on(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("place", names, indirect=True)


every = on("same", "redis", "postgresql", "postgresql plain", "file")
outside_ones = on("redis", "postgresql", "file")
first_class = on("redis", "postgresql")


def success(job_id: str, body: bytes = BODIES["short"], attempts: list[Attempt] | None = None) -> bytes:
    """Of a call that has just ended, the only one, where no attempts are given: the form that nearly all answers have."""
    call = Attempt(round(time.time() - 0.25, 3), 0.25, "succeeded", "a", 200, "r", usage=USAGE)
    about = About("c", CHAT, USAGE, [call] if attempts is None else attempts, 200, "r", model="m")
    payload = success_payload(job_id, body, about, compress=False)
    assert (b'"attempts"' in payload) is (attempts is not None)
    return payload


def failure(job_id: str, message: str = "n\u00f6") -> bytes:
    error = Failure("bad_request", message, 400, json_raw(b'{"error":{"traceback":null}}'))
    return failure_payload(job_id, About("c", CHAT, USAGE, ATTEMPTS, 400, error=error), compress=False)


def json_raw(body: bytes) -> Any:
    import msgspec

    return msgspec.Raw(body)


def revoked(job_id: str) -> bytes:
    """As common.lua makes it."""
    return (
        b'{"status":"REVOKED","result":{"exc_type":"TaskRevokedError","exc_message":["expired"],'
        b'"exc_module":"celery.exceptions"},"traceback":null,"children":[],"date_done":null,"task_id":"%s"}'
    ) % job_id.encode()


def one(backend: ResultBackend, job_id: str) -> StoredResult:
    (found,) = backend.read([job_id])
    assert found is not None
    return found
