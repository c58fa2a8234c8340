"""What tests of the engine share: an upstream that says what it is told, a wire to the store that can be cut."""

from __future__ import annotations

import asyncio
import functools
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import msgspec
import pytest

from jobs import keys
from jobs.backends import ResultBackend
from jobs.connections import connect, connect_async
from jobs.requests import Request
from jobs.results import Usage
from jobs.settings import Settings, load_settings
from jobs.store import BatchStatus, NewBatch, Store
from tests.integration.store_model import requests
from worker.answers import read_answer
from worker.engine import Engine
from worker.heartbeat import Heartbeat
from worker.line import Line
from worker.outcome import Outcome
from worker.upstream import Upstream

P = ParamSpec("P")
T = TypeVar("T")

ANSWER = (
    b'{"choices":[{"message":{"content":"hi"},"finish_reason":"stop"}],'
    b'"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}'
)
THINKING = ANSWER.replace(b'"content"', b'"reasoning_content"')
USAGE = Usage(3, 2, 0, 0, 5)


def in_loop(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """A test that runs in an event loop of its own."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


async def until(look: Callable[[], T], what: str = "", timeout_s: float = 5.0) -> T:
    """The first true value of `look`; raises AssertionError when none came in time."""
    end = time.monotonic() + timeout_s
    while not (value := look()):
        if time.monotonic() > end:
            raise AssertionError(f"did not come about: {what or look!r}; last seen: {value!r}")
        await asyncio.sleep(0.002)
    return value


def answered(body: bytes = ANSWER) -> Outcome:
    """A whole response with status 200."""
    answer = read_answer("/v1/chat/completions", body)
    return Outcome(
        started_at=time.time(), status=200, body=body, answer=answer, usage=answer.usage, request_id="r1", sent=True
    )


def refused(status: int, retry_after_s: float | None = None, body: bytes = b'{"error":{"message":"no"}}') -> Outcome:
    """A response that is an error."""
    return Outcome(started_at=time.time(), status=status, body=body, retry_after_s=retry_after_s, sent=True)


def unconnected() -> Outcome:
    """No response, because nobody listened."""
    return Outcome(started_at=time.time(), error="connect_error")


Said = Outcome | BaseException | Callable[[], Outcome]


class FakeUpstream:
    """Says what its script says, then `default`; while `hold`, calls stay in flight."""

    def __init__(self, *script: Said, default: Callable[[], Outcome] = answered, hold: bool = False) -> None:
        self.script = deque(script)
        self.default = default
        self.asked: list[bytes] = []
        self.in_flight = 0
        self.most_in_flight = 0
        self.cancelled = 0
        self.closed = False
        self._go = asyncio.Event()
        self._hold = hold

    def release(self, *, hold: bool = False) -> None:
        """Lets every call in flight end."""
        self._hold = hold
        self._go.set()
        self._go = asyncio.Event()

    def has(self, count: int) -> bool:
        """Whether so many calls are in flight."""
        return self.in_flight == count

    async def call(self, endpoint: str, body: bytes) -> Outcome:
        self.asked.append(body)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            said = self.script.popleft() if self.script else self.default
            if self._hold:
                await self._go.wait()
            else:
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.in_flight -= 1
        if isinstance(said, BaseException):
            raise said
        return said if isinstance(said, Outcome) else said()

    async def aclose(self) -> None:
        self.closed = True


class Wire:
    """A unix socket in front of the store's, which can be cut."""

    def __init__(self, store_url: str, folder: Path) -> None:
        self.path = folder / "wire.sock"
        self.url = f"unix://{self.path}"
        self.lose_reply_to: bytes | None = None
        self._store = store_url.removeprefix("unix://")
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def mend(self) -> None:
        """Joins both ends."""
        self._server = await asyncio.start_unix_server(self._serve, self.path)

    async def cut(self) -> None:
        """Ends every connection; nobody listens any more."""
        assert self._server is not None
        self._server.close()
        self.path.unlink(missing_ok=True)
        for writer in list(self._writers):
            writer.close()
        for task in list(self._tasks):
            with suppress(OSError):
                await task

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, here = await asyncio.open_unix_connection(self._store)
        lose = asyncio.Event()
        self._writers |= {writer, here}
        for source, sink, asking in ((reader, here, True), (there, writer, False)):
            task = asyncio.create_task(self._pass(source, sink, asking, lose, (writer, here)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass(
        self,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        asking: bool,
        lose: asyncio.Event,
        both: Iterable[asyncio.StreamWriter],
    ) -> None:
        try:
            while data := await source.read(65536):
                if asking and self.lose_reply_to is not None and self.lose_reply_to in data:
                    self.lose_reply_to = None
                    lose.set()
                elif not asking and lose.is_set():
                    break
                sink.write(data)
                await sink.drain()
        except OSError:
            pass  # cut
        finally:
            for writer in both:
                self._writers.discard(writer)
                writer.close()


class Stand:
    """An engine with all it needs, and the store as a producer sees it."""

    def __init__(self, engine: Engine, upstream: FakeUpstream, store: Store) -> None:
        self.engine = engine
        self.upstream = upstream
        self.store = store

    def submit(self, jobs: int | list[Request], **new: Any) -> str:
        """A batch of so many jobs."""
        made = requests(jobs) if isinstance(jobs, int) else jobs
        return self.store.submit(made, NewBatch(**new))[0]

    async def ended(self, batch_id: str) -> BatchStatus:
        """The batch's status once it is over and nothing of it is held here."""
        await until(lambda: self.store.status(batch_id).state == "finished", "a finished batch")
        await until(lambda: len(self.engine.holding) == 0, "nothing held")
        return self.store.status(batch_id)

    def attempts(self, batch_id: str, index: int = 0) -> list[dict[str, Any]]:
        """The attempts on record of an ended job."""
        about = self.about(batch_id, index)
        return cast("list[dict[str, Any]]", msgspec.to_builtins(about.attempts))

    def about(self, batch_id: str, index: int = 0) -> Any:
        """What is stored beside the answer of an ended job."""
        stored = self.store.results(batch_id, [index])[0]
        assert stored is not None
        assert stored.mimoq is not None
        return stored.mimoq


@asynccontextmanager
async def standing(
    url: str,
    upstream: FakeUpstream,
    *,
    store_url: str | None = None,
    backend: ResultBackend | None = None,
    beat: bool = True,
    on_death: Callable[[], None] = lambda: None,
    worker_id: str = "w1",
    **settings: Any,
) -> AsyncIterator[Stand]:
    """An engine on the store at `url` with flusher and (`beat`) heartbeat; ended with the block, and `backend` too."""
    client = connect_async(url)
    sync_client = connect(store_url or url)
    effective: Settings = load_settings(api_key="sk-test", **settings)
    engine = Engine(effective, client, backend, cast("Upstream", upstream), worker_id, on_death)
    engine.spawn(engine.flusher.run())
    if beat:
        engine.spawn(Heartbeat(client, engine, ["bulk"]).run())
    try:
        yield Stand(engine, upstream, Store(sync_client, backend))
    finally:
        upstream.release()
        await engine.drain(5)
        await engine.close()
        await client.aclose(close_connection_pool=True)
        sync_client.close()
        if engine.outside is not None:
            engine.outside.close()


def go_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries wait for nothing, and everything that goes by the clock goes soon: a fixture of the engine's tests."""
    monkeypatch.setattr("worker.engine.random.random", lambda: 0.0)
    monkeypatch.setattr("worker.heartbeat.BEAT_S", 0.02)
    monkeypatch.setattr("worker.flusher.RETRY_S", 0.01)


def flights(stand: Any, model: str = "") -> int:
    """Reservations that are held at the limiter."""
    name = keys.flight("bulk", stand.engine.account, model or stand.engine.settings.model)
    return int(stand.store.client.zcard(name))


def line_of(stand: Any) -> Line:
    """The line of bulk jobs of the default model."""
    line: Line = stand.engine.lines._lines[stand.engine.settings.model, "bulk"]
    return line
