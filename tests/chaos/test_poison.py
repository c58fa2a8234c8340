"""A job that kills whoever calls it, with real worker processes: it is found out, and its neighbours are answered."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from jobs.connections import connect
from jobs.requests import CHAT, Request
from jobs.states import JobState
from jobs.store import NewBatch, Store
from tests.integration.worker_stand import SUPERVISOR, Process
from tests.waiting import wait_for

ANSWER = (
    b'{"choices":[{"message":{"content":"hi"},"finish_reason":"stop"}],'
    b'"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}'
)
JOBS, POISON = 60, 17
#: Five crashes, each found out after a lease, and workers that start.
PATIENCE_S = 240.0


class Deadly(ThreadingHTTPServer):
    """An upstream whose callers die of one of the jobs."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.killed: list[int] = []
        self.answered: Counter[bytes] = Counter()

    def kill(self, port: int) -> None:
        """`kill -9` of the process that calls from this port."""
        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr.port == port and connection.pid not in (None, os.getpid()):
                assert connection.pid is not None
                self.killed.append(connection.pid)
                os.kill(connection.pid, signal.SIGKILL)
                return
        raise AssertionError("nobody calls from there")


class _Handler(BaseHTTPRequestHandler):
    server: Deadly
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:  # the name http.server wants
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if b"poison" in body:
            self.server.kill(self.client_address[1])
            return
        self.server.answered[body] += 1
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(ANSWER)))
        self.end_headers()
        self.wfile.write(ANSWER)

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except OSError:
            self.close_connection = True  # its caller has died

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@contextmanager
def deadly() -> Iterator[Deadly]:
    server = Deadly()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_job_that_kills_its_workers_is_poison_and_the_others_are_answered(
    store_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = b'{"model":"m","messages":[{"role":"user","content":"%s %d"}]}'
    jobs = [Request(CHAT, text % (b"poison" if n == POISON else b"fine", n), f"c{n}") for n in range(JOBS)]
    client = connect(store_url)
    store = Store(client)
    with deadly() as upstream:
        address = f"http://127.0.0.1:{upstream.server_address[1]}"
        settings = {"redis_url": store_url, "base_url": address, "api_key": "sk", "log_format": "json"}
        workers = Process(SUPERVISOR, tmp_path, **settings)
        try:
            batch, *_ = store.submit(jobs, NewBatch())
            wait_for(lambda: store.status(batch).state == "finished", PATIENCE_S, "the end of the batch")
            workers.told()
            workers.ended(0)
        finally:
            workers.close()
        assert len(upstream.killed) == 5, "three crashes of its slice, two alone"
        assert upstream.answered.total() >= JOBS - 1
    status = store.status(batch)
    assert (status.succeeded, status.failed) == (JOBS - 1, 1)
    assert store.job_state(batch, POISON) is JobState.FAILED
    (stored,) = store.results(batch, [POISON])
    assert stored is not None
    assert stored.mimoq is not None
    assert stored.mimoq.error is not None
    assert stored.mimoq.error.code == "poison"
    assert sum(a.times for a in stored.mimoq.attempts if a.verdict == "worker_lost" and a.maybe_billed) == 5
    assert status.attempts >= JOBS - 1 + 5
    client.close()
