"""The simulator's HTTP server: life, outages, and the `/_sim/` addresses that watch and steer it.

There is one handler on aiohttp's low-level server; routing and middlewares would cost more than the answers.

| address | does |
|---|---|
| `GET /_sim/ledger[?only=totals]` | what was asked and paid, see `ledger.Ledger.view` |
| `GET /_sim/config` | the effective configuration, without the key |
| `POST /_sim/config` | changes it, see `config.Config`; a bad value is 400 and changes nothing |
| `POST /_sim/reset` | empties the ledger and the limits' memory |

With `down: "refuse"` nobody can connect, so neither to `/_sim/`: give `down_s` too, or keep the connection that asked.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from aiohttp import web

from ops.simulator.config import Config, ConfigError, configure
from ops.simulator.gateway import JSON, Gateway
from ops.simulator.ledger import Ledger
from ops.simulator.wire import encode, error_body

MAX_BODY_BYTES = 64 << 20
BACKLOG = 4096


class Simulator:
    """A provider on a loopback port. Use it from its own event loop; `running_simulator` is for other threads."""

    def __init__(self, config: Config, clock: Callable[[], float] = time.monotonic) -> None:
        self.ledger = Ledger(config.ledger, config.keep_calls)
        self.gateway = Gateway(config, self.ledger, clock)
        self.port = config.port  # the real one once it listens
        self._server: web.Server | None = None
        self._listener: asyncio.Server | None = None
        self._outage_end: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        host = self.gateway.config.host
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    async def start(self) -> None:
        """Listens. Raises OSError when the port is taken."""
        loop = asyncio.get_running_loop()

        def request(message: Any, payload: Any, protocol: Any, writer: Any, task: Any) -> web.BaseRequest:
            return web.BaseRequest(message, payload, protocol, writer, task, loop, client_max_size=MAX_BODY_BYTES)

        self._server = web.Server(self._handle, request_factory=request, handler_cancellation=True, access_log=None)
        await self._listen()
        await self._obey()

    async def stop(self) -> None:
        """Stops listening and cuts every connection."""
        self._plan_outage_end(None)
        self._close_listener()
        if self._server is not None:
            self._cut_connections()
            await self._server.shutdown(timeout=1)
        self.ledger.close()

    async def configure(self, changes: Mapping[str, Any], asked_by: object = None) -> None:
        """Changes the configuration now. Raises `ConfigError`, and then nothing has changed.

        `asked_by` is the connection that outlives a `down: "refuse"`.
        """
        self.gateway.config = configure(changes, self.gateway.config)
        if "script" in changes:
            self.gateway.dice.load(self.gateway.config.script)
        await self._obey(asked_by)

    def reset(self) -> None:
        """Empties the ledger and the limits' memory; the configuration stays."""
        self.ledger.reset()
        self.gateway.reset()

    def view(self, *, whole: bool = True) -> dict[str, Any]:
        """The ledger, see `Ledger.view`, with the busiest minute of any account and model."""
        minutes = self.gateway.minutes()
        totals = self.ledger.totals
        totals.max_minute_asked = max((m.most_asked for m in minutes), default=0)
        totals.max_minute_admitted = max((m.most_admitted for m in minutes), default=0)
        totals.max_minute_tokens = max((m.most_tokens for m in minutes), default=0)
        return self.ledger.view(whole=whole)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        return await (self._admin if request.path.startswith("/_sim/") else self.gateway.handle)(request)

    async def _admin(self, request: web.BaseRequest) -> web.StreamResponse:
        match request.method, request.path:
            case "GET", "/_sim/ledger":
                return _json(self.view(whole=request.query.get("only") != "totals"))
            case "POST", "/_sim/reset":
                self.reset()
            case "POST", "/_sim/config":
                try:
                    changes = msgspec.json.decode(await request.read(), type=dict[str, Any])
                    await self.configure(changes, asked_by=request.protocol)
                except (ConfigError, msgspec.DecodeError) as error:
                    return web.Response(status=400, body=error_body(400, str(error), "config"), content_type=JSON)
            case "GET", "/_sim/config":
                pass
            case _:
                return web.Response(status=404, body=error_body(404, "Not found", "not_found"), content_type=JSON)
        return _json(self.gateway.config.public())

    async def _listen(self) -> None:
        assert self._server is not None
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(self._server, self.gateway.config.host, self.port, backlog=BACKLOG)
        self.port = self._listener.sockets[0].getsockname()[1]

    def _close_listener(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def _cut_connections(self, but: object = None) -> None:
        assert self._server is not None
        for connection in self._server.connections:
            if connection is not but:
                connection.force_close()

    async def _obey(self, asked_by: object = None) -> None:
        config = self.gateway.config
        if config.hold:
            self.gateway.released.clear()
        else:
            self.gateway.released.set()
        if config.down == "refuse":
            self._close_listener()
            self._cut_connections(but=asked_by)
        elif self._listener is None:
            await self._listen()
        self._plan_outage_end(config.down_s if config.down else None)

    def _plan_outage_end(self, seconds: float | None) -> None:
        if self._outage_end is not None and self._outage_end is not asyncio.current_task():
            self._outage_end.cancel()
        self._outage_end = None if seconds is None else asyncio.create_task(self._end_outage(seconds))

    async def _end_outage(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await self.configure({"down": None, "down_s": None})


def _json(value: object) -> web.Response:
    return web.Response(body=encode(value), content_type=JSON)


@asynccontextmanager
async def serve(config: Config) -> AsyncIterator[Simulator]:
    """A listening simulator in this event loop; its `url` is where."""
    simulator = Simulator(config)
    try:
        await simulator.start()
        yield simulator
    finally:
        await simulator.stop()
