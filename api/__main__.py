"""`mimoq api`: one process that serves HTTP.

What goes wrong: told to stop (SIGTERM, SIGINT), it takes no more requests, answers those that wait as things stand, and
ends. A store that is away at the start is waited for, as producers do; later, requests are answered 503.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import uvicorn
import uvloop

from jobs import logs
from jobs.errors import MimoqError, UsageError
from jobs.processes import end_when_stdin_closes
from jobs.settings import Settings, load_settings
from producers.serve import check_auth

#: Seconds that requests get to end once the process has been told to stop.
STOP_S = 10.0
#: Connections that wait to be accepted.
BACKLOG = 4096


def main(argv: list[str] | None = None) -> int:
    """Serves until told to stop; returns the exit status."""
    parser = argparse.ArgumentParser(prog="mimoq api", description="Serve the HTTP API.")
    parser.add_argument("--host", help="address to listen on (MIMOQ_API_HOST)")
    parser.add_argument("--port", type=int, help="port; 0: a free one (MIMOQ_API_PORT)")
    parser.add_argument("--data-dir", help="folder of the embedded Valkey (MIMOQ_DATA_DIR)")
    parser.add_argument("--exit-with-stdin", action="store_true", help="end when standard input is closed")
    args = parser.parse_args(argv)
    try:
        settings = load_settings(api_host=args.host, api_port=args.port, data_dir=args.data_dir)
        logs.configure(settings.log_level, settings.log_format)
        return serve(settings, args.exit_with_stdin)
    except MimoqError as error:
        print(f"mimoq api: {error}", file=sys.stderr)
        return error.exit_code


def serve(settings: Settings, exit_with_stdin: bool) -> int:
    """Serves with these settings. Raises `MimoqError` where it can't."""
    check_auth(settings)
    _raise_file_limit()
    listener = _listen(settings.api_host, settings.api_port)
    from api.app import guarded, make_app
    from api.core import Core
    from api.wire import Wire

    core = Core(settings)
    app = make_app(core)
    config = uvicorn.Config(
        guarded(app, core),
        http=Wire,
        ws="none",
        loop="none",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=True,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=int(STOP_S),
        backlog=BACKLOG,
    )
    if exit_with_stdin:
        end_when_stdin_closes(lambda: signal.raise_signal(signal.SIGTERM))
    server = Server(config, core)
    gc.freeze()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(server.serve(sockets=[listener]))
    return 1 if core.died or not server.started else 0


class Server(uvicorn.Server):
    """uvicorn's server, which says where it listens, and lets nobody wait once it is told to stop."""

    def __init__(self, config: uvicorn.Config, core: Any) -> None:
        super().__init__(config)
        self._core = core
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Says so on stdout, for whoever has started it."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets=sockets)
        if self.started and sockets:
            host, port = sockets[0].getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            with contextlib.suppress(OSError):
                print(f"listening on http://{shown}:{port}", flush=True)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end it, with status 0."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first begins the end, the second hurries it."""
        super().handle_exit(sig, frame)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._core.stop)


def _raise_file_limit() -> None:
    """Every request that waits holds a socket: as many as the system lets this process have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS names a limit that it does not grant
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        raise UsageError(
            f"can't listen on {host}:{port}: {error.strerror or error}; choose another --port or --host"
        ) from None
    listener.setblocking(False)
    return listener


if __name__ == "__main__":
    sys.exit(main())
