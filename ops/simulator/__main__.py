"""`python -m ops.simulator`: a simulator as a process of its own.

Its one line on stdout is `listening on http://127.0.0.1:PORT`. It ends on SIGTERM or SIGINT, and with
`--exit-with-parent` when its standard input does.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any, NoReturn

from ops.simulator.config import Config, ConfigError, configure
from ops.simulator.faults import FAULTS
from ops.simulator.running import runner
from ops.simulator.server import serve

KEY_VARIABLE = "MIMOQ_SIMULATOR_KEY"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")  # one line, without the usage


def _parser() -> argparse.ArgumentParser:
    kinds = ", ".join(FAULTS)
    parser = _Parser(prog="simulator", description="A simulated MiMo API on loopback.", allow_abbrev=False)
    # Defaults stand in Config alone: what is not given is not passed on.
    parser.set_defaults(exit_with_parent=False)

    def add(flag: str, kind: type = str, **more: Any) -> None:
        parser.add_argument(flag, type=kind, default=argparse.SUPPRESS, **more)

    add("--host", help="loopback address to listen on (127.0.0.1)")
    add("--port", int, help="port; 0 is any free one (0)")
    add("--key", help=f"the only key that is accepted; better set {KEY_VARIABLE} (any key)")
    add("--seed", int, help="seed of answers, latencies and faults (0)")
    add("--latency", float, metavar="S", help="seconds a call takes (0.2)")
    add(
        "--latency-p99",
        float,
        metavar="S",
        help="makes latencies log-normal with this 99th percentile",
    )
    add("--answer-bytes", int, metavar="N", help="size of a response, roughly (1700)")
    add("--text", metavar="FILE", help="cut answers from this text (they are made of a few phrases)")
    add("--stream-events", int, metavar="N", help="pieces of text in a streamed answer (40)")
    add("--rpm", int, metavar="N", help="calls in any minute, per key and model (no limit)")
    add("--tpm", int, metavar="N", help="tokens in any minute, per key and model (no limit)")
    add("--concurrency", int, metavar="N", help="calls in flight, per key and model (no limit)")
    add("--retry-after", float, metavar="S", help="send Retry-After with 429, 503 and 529 (not sent)")
    parser.add_argument("--limit-headers", action="store_true", default=argparse.SUPPRESS, help="send x-ratelimit-*")
    add("--fault", action="append", metavar="KIND=RATE", help=f"share of calls that meet a fault, repeatable: {kinds}")
    add("--trigger", action="append", metavar="TEXT=KIND", help="fault of calls whose body holds a text, repeatable")
    add("--ledger", metavar="FILE", help="append one JSON line a call")
    parser.add_argument("--exit-with-parent", action="store_true", help="end when standard input ends")
    return parser


def _config(given: dict[str, Any]) -> Config:
    """The configuration of parsed arguments. Raises `ConfigError`."""
    if not given.get("key"):
        given["key"] = os.environ.get(KEY_VARIABLE) or None
    faults: dict[str, float] = {}
    for text in given.pop("fault", []):
        kind, _, rate = text.partition("=")
        try:
            faults[kind] = float(rate)
        except ValueError:
            raise ConfigError("--fault needs KIND=RATE, such as 500=0.05") from None
    triggers: dict[str, str] = {}
    for text in given.pop("trigger", []):
        needle, equals, kind = text.rpartition("=")
        if not equals:
            raise ConfigError("--trigger needs TEXT=KIND, such as poison=421")
        triggers[needle] = kind
    return configure({**given, "faults": faults, "triggers": triggers})


async def _live(config: Config, *, exit_with_parent: bool) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with serve(config) as simulator:
        if exit_with_parent:
            threading.Thread(target=_watch_stdin, args=(loop, stop), daemon=True).start()
        print(f"listening on {simulator.url}", flush=True)
        await stop.wait()


def _watch_stdin(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    # os.read: a thread inside sys.stdin would hold its lock when the interpreter ends.
    while os.read(0, 65_536):
        pass
    loop.call_soon_threadsafe(stop.set)


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    given = vars(parser.parse_args(argv))
    exit_with_parent = given.pop("exit_with_parent")
    try:
        config = _config(given)
    except ConfigError as error:
        parser.error(str(error))
    try:
        with runner() as loop_runner:
            loop_runner.run(_live(config, exit_with_parent=exit_with_parent))
    except OSError as error:
        print(f"simulator: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
