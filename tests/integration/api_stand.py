"""Real API processes over a real store, with workers and a simulator behind them where tests need answers."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx

from api.app import guarded, make_app
from api.core import Core
from jobs import leases, tokens
from jobs.connections import check_schema, connect
from jobs.leases import End, Job
from jobs.requests import CHAT
from jobs.results import About, Attempt, Usage, success_payload
from jobs.settings import load_settings
from jobs.store import Store
from jobs.workers import live_workers
from ops.simulator import RunningSimulator, running_simulator
from tests.components import Valkey
from tests.integration.store_model import run
from tests.integration.worker_stand import KEY, Process
from tests.waiting import wait_for

#: Stands in every prompt of these tests: no log, metric or error may repeat it.
PROMPT = "a prompt nobody may see"
#: Seconds that a process may take to import what it needs, on a machine that is busy.
PATIENCE_S = 60.0
#: Seconds after which a request is taken for one that hangs.
HANGS_S = 60.0

#: A response whose bytes no encoder of ours would write.
ANSWER = b'{ "id":"x",\t"n" : [1.0, 1e2,12345678901234567890],"\\u0041":"\\u00e9\\/ \xe2\x80\xa8",  "choices":[]}'
USAGE = Usage(1_000, 200, 100, 400, 1_200)

_numbers = itertools.count()


def ask(**more: Any) -> dict[str, Any]:
    """The body of a chat completion, unlike every other."""
    text = f"{PROMPT} {next(_numbers)}"
    return {"model": "m", "messages": [{"role": "user", "content": text}], **more}


def ask_message(**more: Any) -> dict[str, Any]:
    """The body of a message, unlike every other."""
    return {**ask(), "max_tokens": 2_000, **more}


def line(custom_id: str | None = None, **more: Any) -> dict[str, Any]:
    """A request as a line of OpenAI's input files."""
    return {"custom_id": custom_id or f"c{next(_numbers)}", "method": "POST", "url": CHAT, "body": ask(**more)}


def lines(*items: Any) -> bytes:
    """JSON lines."""
    return b"".join(json.dumps(item).encode() + b"\n" for item in items)


#: Jobs that tests have claimed, by id.
_claimed: dict[str, Job] = {}


def claim(url: str, *wanted: str, lane: str = "interactive") -> list[Job]:
    """These jobs as a worker gets them; the test is the worker then. All that is ready on the lane is claimed with them."""

    def look() -> bool:
        if not _claimed.keys() >= set(wanted):
            jobs: list[Job] = run(lambda client: leases.claim(client, "w", lane, [""], 1000, lease_s=600.0), url)
            _claimed.update({job.job_id: job for job in jobs})
        return _claimed.keys() >= set(wanted)

    wait_for(look, what="jobs to claim")
    return [_claimed[job] for job in wanted]


def answer(url: str, *jobs: Job, body: bytes = ANSWER) -> None:
    """Ends jobs of one batch with this response of the upstream."""
    ends = []
    for job in jobs:
        attempt = Attempt(1_700_000_000.0, 0.5, "succeeded", status=200, usage=USAGE)
        about = About(job.request.custom_id, job.request.endpoint, USAGE, [attempt], 200, model="m")
        ends.append(End(job, "s", success_payload(job.job_id, body, about, True), 1, USAGE))
    words = run(lambda client: leases.finish(client, jobs[0].batch_id, ends), url)
    assert words == ["ended"] * len(jobs)


class Api:
    """One API process, as `mimoq api` starts it, and its log; `settings` are those of its environment.

    `script` is Python that it runs before, to break something of it.
    """

    def __init__(self, store_url: str, folder: Path, script: str = "", **settings: str) -> None:
        argv = ["-c", f"{script}\nfrom api.__main__ import main; sys.exit(main())"] if script else ["-m", "api"]
        number = next(_numbers)
        self.log = folder / f"api-{number}.log"
        self._said = folder / f"api-{number}.out"
        told = {"redis_url": store_url, "files_dir": str(folder / "files"), "log_format": "json", "log_level": "debug"}
        told |= settings
        with self.log.open("wb") as log, self._said.open("wb") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-P", *argv, "--port", "0"],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=log,
                env=os.environ | {f"MIMOQ_{name.upper()}": value for name, value in told.items()},
            )

    @property
    def url(self) -> str:
        """Its address, once it listens."""
        wait_for(lambda: b"\n" in self._said.read_bytes() or self.process.poll() is not None, PATIENCE_S, "an address")
        assert self.process.poll() is None, self.text
        return self._said.read_text().split()[-1]

    @property
    def text(self) -> str:
        """All that it has logged."""
        return self.log.read_text(errors="replace")

    def records(self) -> list[dict[str, Any]]:
        """Its log, line by line."""
        return [json.loads(line) for line in self.text.splitlines() if line.startswith("{")]

    def end(self, number: int = signal.SIGTERM) -> int:
        """Its exit status after a signal."""
        self.process.send_signal(number)
        return self.process.wait(30)

    def close(self) -> None:
        """Ends it at once, if it still runs."""
        self.process.kill()
        self.process.wait()


class ApiStand:
    """A store of its own with API and worker processes over it, and the upstream that these call."""

    def __init__(self, valkey: Valkey, simulator: RunningSimulator, folder: Path, stack: ExitStack) -> None:
        self.valkey = valkey
        self.simulator = simulator
        self.folder = folder
        self.redis = stack.enter_context(contextlib.closing(connect(valkey.url)))
        check_schema(self.redis)
        self.store = Store(self.redis)
        self._stack = stack
        self.apis: list[Api] = []
        self.secrets: list[str] = [PROMPT, KEY]

    def api(self, script: str = "", **settings: str) -> Api:
        """One more API process."""
        api = Api(self.valkey.url, self.folder, script, **settings)
        self._stack.callback(api.close)
        self.apis.append(api)
        return api

    def work(self, *lanes: str, **settings: str) -> None:
        """Starts a worker process of each of these lanes; returns once all are there."""
        told = {"redis_url": self.valkey.url, "base_url": self.simulator.url, "api_key": KEY, "log_format": "json"}
        for lane in lanes:
            process = Process(["-m", "worker", "--lane", lane], self.folder, log_level="debug", **told, **settings)
            self._stack.callback(process.close)
        wait_for(
            lambda: {lane for worker in live_workers(self.redis) for lane in worker.lanes} >= set(lanes),
            PATIENCE_S,
            f"workers of {lanes}",
        )

    def token(self, scopes: Sequence[str] = tokens.SCOPES, rpm: int | None = None, tenant: str | None = None) -> str:
        """A new token."""
        text = tokens.create(self.redis, f"t{next(_numbers)}", scopes, rpm, tenant)
        self.secrets.append(text.split("_", 2)[2])
        return text

    def http(self, token: str | None = None, api: Api | None = None) -> httpx.Client:
        """A client of an API process (the first one), as this token's holder, of a new tenant unless given."""
        client = httpx.Client(
            base_url=(api or self.apis[0]).url,
            headers={"Authorization": f"Bearer {token or self.token()}"},
            trust_env=False,
            timeout=HANGS_S,
        )
        return self._stack.enter_context(client)

    def kept_secrets(self) -> None:
        """Raises AssertionError if a process has logged a prompt, an answer, a token or a key."""
        logs = list(self.folder.glob("*.log"))
        assert logs
        for log in logs:
            text = log.read_text(errors="replace")
            for secret in self.secrets:
                assert secret not in text, f"{log.name} holds what nobody may see"


@contextmanager
def api_stand(folder: Path, *, durable: bool = False, **simulator: Any) -> Iterator[ApiStand]:
    """A stand without processes yet; all that it starts ends with it."""
    with ExitStack() as stack:
        valkey = Valkey(durable)
        stack.callback(valkey.stop)
        upstream = stack.enter_context(running_simulator(key=KEY, **simulator))
        yield ApiStand(valkey, upstream, folder, stack)


@asynccontextmanager
async def core_standing(store_url: str, **settings: Any) -> AsyncIterator[tuple[Core, httpx.AsyncClient]]:
    """A core that lives in this loop, and a client that calls its routes without a socket; nobody needs a token."""
    settings = {"api_auth": False, "redis_url": store_url, **settings}
    core = Core(load_settings(**settings))
    app = make_app(core)
    transport = httpx.ASGITransport(guarded(app, core))
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=HANGS_S) as client,
    ):
        yield core, client
        core.stop()
