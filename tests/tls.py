"""TLS for servers of the tests: an authority of this session's own, and a door that speaks TLS before a unix socket."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import shutil
import ssl
import tempfile
import threading
from functools import cache
from pathlib import Path

import trustme


@cache
def authority() -> tuple[str, str]:
    """Files of its certificate, and of what it gave to servers on loopback, key and all."""
    folder = Path(tempfile.mkdtemp(prefix="mimoq-test-", dir="/tmp"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    signer = trustme.CA()
    signer.cert_pem.write_to_path(str(folder / "ca.pem"))
    signer.issue_cert("127.0.0.1", "localhost").private_key_and_cert_chain_pem.write_to_path(str(folder / "server.pem"))
    return str(folder / "ca.pem"), str(folder / "server.pem")


class Door:
    """Takes TLS connections on a port of loopback, each of which it joins to a unix socket: the wheel's Valkey has no TLS.

    While nobody is behind it, it closes them.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(authority()[1])
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tls-door", daemon=True)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._open(), self._loop).result(10)
        self.port: int = self._server.sockets[0].getsockname()[1]

    async def _open(self) -> asyncio.Server:
        return await asyncio.start_server(self._join, "127.0.0.1", 0, ssl=self._context)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers = [writer]
        try:
            behind, to_behind = await asyncio.open_unix_connection(self._path)
            writers.append(to_behind)
            ways = [asyncio.create_task(_pass_on(*way)) for way in ((reader, to_behind), (behind, writer))]
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass  # nobody is behind it, or it is being shut
        finally:
            for each in writers:
                each.transport.abort()

    def close(self) -> None:
        """Ends it and its connections."""
        asyncio.run_coroutine_threadsafe(self._shut(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _shut(self) -> None:
        self._server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for _ in range(3):  # rounds of the loop in which what was aborted is closed
            await asyncio.sleep(0)


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while read := await reader.read(65_536):
            writer.write(read)
            await writer.drain()
