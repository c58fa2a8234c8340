"""`make bench-batches`: what large batches cost by both protocols, in time and in memory of the API process.

Everything runs on this machine and is called by loopback alone: the simulator (200 ms a call), an embedded Valkey
(append-only), one API process with auth on, and one worker where jobs are called. Requests have 2 KB (of message
batches 2.5 KB) of English words by chance, so that compression has something to do. The protocol's batch and a native one
of the same requests take turns, and their ratio tells more than the figures of one machine.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import psutil

from jobs import openai_batches, tokens
from jobs.errors import MimoqError
from jobs.openai_batches import OpenAIBatch
from ops.bench.limits.report import Row, all_of, table
from ops.bench.limits.stand import Broken, Stand
from ops.bench.peak import Peak, now_mb
from ops.simulator.asks import DEFAULT_MODEL
from producers.service import Service

LINES, LINE_BYTES = 50_000, 2_000
BAD_LINES = 500
MESSAGES, MESSAGE_BYTES = 100_000, 2_500
#: Requests of one turn of the comparison, and turns.
COMPARED, TURNS = 10_000, 3
#: Megabytes that the API process may have, whatever is sent.
MOST_MB = 300
LOOPBACK = ("127.0.0.1", "::1")
CHUNK_BYTES = 1 << 18
BOUNDARY = "mimoq-bench"
#: Seconds between two looks at the memory, and that anything may take.
PATIENCE_S = 900.0
SEED = 7
ENDS = ("completed", "failed", "expired", "cancelled")


def main() -> int:
    """Runs all parts and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m ops.bench.batches", description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="part of the usual number of requests, to try it")
    args = parser.parse_args()
    for variable in [name for name in os.environ if name.startswith("MIMOQ_")]:
        del os.environ[variable]  # the settings are the benchmark's own
    try:
        with Stand() as stand, _serving(stand) as bench:
            rows = _all(bench, args.scale)
    except (Broken, MimoqError, OSError, http.client.HTTPException) as error:
        print(f"could not be run to its end: {error}", file=sys.stderr)
        return 1
    print(table("batches", rows))
    return 0


class Text:
    """A stretch of words by chance, of which requests are cut: no two alike, and cheap to make."""

    def __init__(self) -> None:
        self._random = random.Random(SEED)  # not for secrets
        words = ["".join(self._random.choices("etaoinshrdlu", k=self._random.randint(2, 9))) for _ in range(4_000)]
        self._text = " ".join(self._random.choices(words, k=200_000))

    def cut(self, size: int) -> str:
        """So many characters of it."""
        start = self._random.randrange(len(self._text) - size)
        return self._text[start : start + size]


class Bench:
    """The stand with an API process and a token."""

    def __init__(self, stand: Stand, url: str, token: str) -> None:
        for address in (url, stand.url):
            if urlsplit(address).hostname not in LOOPBACK:
                raise Broken(f"{address} is not on this machine")
        self.stand = stand
        self.text = Text()
        self.api = next(child for child in psutil.Process().children() if child.cmdline()[2:4] == ["-m", "api"])
        self._netloc = urlsplit(url).netloc
        self._token = token
        (known,) = tokens.all_tokens(stand.client)
        self._tenant = known.tenant

    @contextlib.contextmanager
    def answered(self, method: str, path: str, body: Any = None, **headers: str) -> Iterator[http.client.HTTPResponse]:
        """An answer, to be read. Raises `Broken` where it is no success."""
        connection = http.client.HTTPConnection(self._netloc, timeout=PATIENCE_S)
        with contextlib.closing(connection):
            told = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, {"Authorization": f"Bearer {self._token}", **told})
            with connection.getresponse() as response:
                if response.status not in (200, 202):
                    raise Broken(f"{method} {path} was answered {response.status}: {response.read(300)!r}")
                yield response

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> dict[str, Any]:
        """What an answer holds."""
        with self.answered(method, path, body, **headers) as response:
            found: dict[str, Any] = json.loads(response.read())
            return found

    def upload(self, path: Path) -> str:
        """The id of this file as the input of a batch, sent as SDKs do."""
        part = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="'
        head = f'{part}purpose"\r\n\r\nbatch\r\n{part}file"; filename="in.jsonl"\r\n\r\n'.encode()
        tail = f"\r\n--{BOUNDARY}--\r\n".encode()
        size = str(len(head) + path.stat().st_size + len(tail))
        kind = f"multipart/form-data; boundary={BOUNDARY}"
        body = _around(head, path, tail)
        return str(self.ask("POST", "/v1/files", body, Content_Type=kind, Content_Length=size)["id"])

    def create(self, file_id: str) -> str:
        """The id of a new batch, as the store knows it."""
        body = {"input_file_id": file_id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        return str(self.ask("POST", "/v1/batches", json.dumps(body))["id"]).removeprefix("batch_")

    def over(self, batch_id: str) -> OpenAIBatch:
        """The batch at its end, as the protocol shows that it is. Raises `Broken`."""

        def look() -> bool:
            return self.ask("GET", f"/v1/batches/batch_{batch_id}")["status"] in ENDS

        self.stand.need(look, PATIENCE_S, "the end of a batch")
        return openai_batches.get(self.stand.client, self._tenant, batch_id)


@contextlib.contextmanager
def _serving(stand: Stand) -> Iterator[Bench]:
    settings = {"base_url": stand.url, "api_key": "bench", "data_dir": stand.folder / "data", "log_level": "warning"}
    variables = {f"MIMOQ_{name.upper()}": str(value) for name, value in settings.items()}
    token = tokens.create(stand.client, "bench")
    api = Service("the API", ["api", "--exit-with-stdin"], 0, stand.folder / "api.log", variables)
    with contextlib.ExitStack() as stack:
        stack.callback(api.stop)
        yield Bench(stand, api.wait(), token)


def _all(bench: Bench, scale: float) -> list[Row]:
    lines, bad, messages, compared = (max(int(count * scale), 100) for count in (LINES, BAD_LINES, MESSAGES, COMPARED))
    (worker,) = bench.stand.workers("bulk", 1)
    rows = _large(bench, lines) + _compared(bench, compared)
    bench.stand.dismiss(worker)
    worker.wait()
    return rows + _bad(bench, lines, min(bad, lines)) + _messages(bench, messages)


# -- a large file


def _large(bench: Bench, count: int) -> list[Row]:
    """From the upload to the last line of the output."""
    path = _written(bench.stand.folder / "large.jsonl", (_line(bench.text, n) for n in range(count)))
    mb = path.stat().st_size / 1e6
    before_mb = now_mb(bench.api)
    with Peak(bench.api, now_mb) as peak:
        began = time.monotonic()
        file_id = bench.upload(path)
        uploaded_s = time.monotonic() - began
        batch = bench.over(bench.create(file_id))
        began = time.monotonic()
        lines, read = _read(bench, f"file-{batch.batch_id}-output")
        read_s = time.monotonic() - began
    made, finalized_at = batch.made, batch.finalized_at
    if made is None or made.finished_at is None or finalized_at is None:
        raise Broken(f"the batch is {batch.status}")
    what = f"{count:,} lines, {mb:.0f} MB"
    return [
        Row(f"{what}: upload, MB a second", "", f"{mb / uploaded_s:,.0f}"),
        Row("created → validated and queued, s", "", f"{made.created_at - batch.created_at:.2f}"),
        Row("created → completed, s", "", f"{finalized_at - batch.created_at:.1f}"),
        Row("of that finalizing, s", "", f"{finalized_at - made.finished_at:.2f}"),
        all_of("lines of the output", lines, count),
        Row("the output read, MB a second", "", f"{read / 1e6 / read_s:,.0f} ({read / 1e6:.0f} MB)"),
        _memory(peak, before_mb),
    ]


def _read(bench: Bench, file_id: str) -> tuple[int, int]:
    """Lines and bytes of a file."""
    lines = size = 0
    with bench.answered("GET", f"/v1/files/{file_id}/content") as response:
        while chunk := response.read(CHUNK_BYTES):
            lines += chunk.count(b"\n")
            size += len(chunk)
    return lines, size


# -- beside a native batch


class Turn(NamedTuple):
    """Jobs a second: from the first byte sent to the batch's end, and while they were called."""

    whole: float
    calling: float


def _compared(bench: Bench, count: int) -> list[Row]:
    """The same requests as a file and a batch of it, and as a native batch of JSON lines, in turn."""
    path = _written(bench.stand.folder / "compared.jsonl", (_line(bench.text, n) for n in range(count)))
    pairs = [(_by_protocol(bench, path, count), _natively(bench, path, count)) for _ in range(TURNS)]
    ours, natives = zip(*pairs, strict=True)
    rows = []
    for name, what in (("whole", "from the first byte to the end"), ("calling", "while they are called")):
        mine, other = (statistics.median(getattr(turn, name) for turn in turns) for turns in (ours, natives))
        ratio = statistics.median(getattr(one, name) / getattr(two, name) for one, two in pairs)
        told = f"{mine:,.0f} / {other:,.0f} ({ratio:.2f})"
        rows.append(Row(f"{count:,} jobs, a second {what}, protocol / native, median of {TURNS}", "", told))
    return rows


def _by_protocol(bench: Bench, path: Path, count: int) -> Turn:
    began = time.monotonic()
    batch = bench.over(bench.create(bench.upload(path)))
    whole_s = time.monotonic() - began
    if batch.made is None or batch.made.succeeded != count:
        raise Broken(f"the batch is {batch.status}")
    return Turn(count / whole_s, count / _called_s(bench, batch.batch_id))


def _natively(bench: Bench, path: Path, count: int) -> Turn:
    began = time.monotonic()
    size = str(path.stat().st_size)
    body = _around(b"", path, b"")
    headers = {"Content_Type": "application/jsonl", "Content_Length": size}
    batch_id = bench.ask("POST", "/v1/job-batches", body, **headers)["id"]

    def look() -> bool:
        return bool(bench.ask("GET", f"/v1/job-batches/{batch_id}")["state"] == "finished")

    bench.stand.need(look, PATIENCE_S, "the end of a batch")
    whole_s = time.monotonic() - began
    return Turn(count / whole_s, count / _called_s(bench, batch_id))


def _called_s(bench: Bench, batch_id: str) -> float:
    """From the first claim to the last end."""
    status = bench.stand.producer.status(batch_id)
    if status.started_at is None or status.finished_at is None:
        raise Broken("the batch has not ended")
    return status.finished_at - status.started_at


# -- bad lines


def _bad(bench: Bench, count: int, bad: int) -> list[Row]:
    """A file in which some lines, by chance, break a rule each: those and no others are told."""
    numbers = sorted(random.Random(SEED).sample(range(count), bad))  # not for secrets
    breaks = (
        lambda line: line[: len(line) // 2] + "\n",
        lambda line: line.replace('"POST"', '"GET"', 1),
        lambda line: line.replace('"messages"', '"massages"', 1),
        lambda line: line.replace('"url": "/v1/chat/completions"', '"url": "/v1/messages"', 1),
        lambda line: line.replace('"body": {', '"body": {"stream": true, ', 1),
    )
    wrong = {number: breaks[place % len(breaks)] for place, number in enumerate(numbers)}
    found = (wrong.get(n, str)(_line(bench.text, n)) for n in range(count))
    file_id = bench.upload(_written(bench.stand.folder / "bad.jsonl", found))
    before_mb = now_mb(bench.api)
    with Peak(bench.api, now_mb) as peak:
        batch = bench.over(bench.create(file_id))
        shown = bench.ask("GET", f"/v1/batches/batch_{batch.batch_id}")
    told = [error["line"] for error in (shown["errors"] or {"data": []})["data"]]
    exact = told == [number + 1 for number in numbers]
    seconds = (batch.failed_at or float("inf")) - batch.created_at
    return [
        Row(
            f"{bad:,} bad lines of {count:,}: told with their numbers",
            "those exactly",
            f"{len(told):,}, {'those exactly' if exact else 'not those'}",
            exact,
        ),
        Row("created → failed, s", "", f"{seconds:.2f}"),
        _memory(peak, before_mb),
    ]


# -- a message batch


def _messages(bench: Bench, count: int) -> list[Row]:
    """Created while nobody calls; its body is read from the disk as it is sent."""
    found = (_message(bench.text, n) for n in range(count))
    parts = (("" if n == 0 else ",") + one for n, one in enumerate(found))
    path = _written(bench.stand.folder / "messages.json", _enclosed('{"requests":[', parts, "]}"))
    mb = path.stat().st_size / 1e6
    headers = {"Content_Type": "application/json", "Content_Length": str(path.stat().st_size)}
    before_mb = now_mb(bench.api)
    with Peak(bench.api, now_mb) as peak:
        began = time.monotonic()
        batch = bench.ask("POST", "/v1/messages/batches", _around(b"", path, b""), **headers)
        took_s = time.monotonic() - began
    return [
        all_of(f"message batch of {mb:.0f} MB: requests taken", batch["request_counts"]["processing"], count),
        Row("created, MB a second", "", f"{mb / took_s:,.0f} ({took_s:.1f} s)"),
        _memory(peak, before_mb),
    ]


# -- what is sent


def _line(text: Text, number: int) -> str:
    body = {"model": DEFAULT_MODEL, "messages": [{"role": "user", "content": ""}]}
    line = {"custom_id": f"row-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
    body["messages"] = [{"role": "user", "content": text.cut(LINE_BYTES - len(json.dumps(line)) - 1)}]
    return json.dumps(line) + "\n"


def _message(text: Text, number: int) -> str:
    params: dict[str, Any] = {"model": DEFAULT_MODEL, "max_tokens": 1024, "messages": []}
    one = {"custom_id": f"row-{number}", "params": params}
    params["messages"] = [{"role": "user", "content": text.cut(MESSAGE_BYTES - len(json.dumps(one)))}]
    return json.dumps(one)


def _written(path: Path, pieces: Iterable[str]) -> Path:
    with path.open("w", encoding="ascii") as file:
        file.writelines(pieces)
    return path


def _enclosed(head: str, pieces: Iterable[str], tail: str) -> Iterator[str]:
    yield head
    yield from pieces
    yield tail


def _around(head: bytes, path: Path, tail: bytes) -> Iterator[bytes]:
    """A body that is read while it is sent."""
    yield head
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk
    yield tail


def _memory(peak: Peak, before_mb: float) -> Row:
    told = f"{peak.most_mb:.0f}, {peak.most_mb - before_mb:.0f} more than before"
    return Row("memory of the API meanwhile, at most, MB", f"< {MOST_MB}", told, peak.most_mb < MOST_MB)


if __name__ == "__main__":
    sys.exit(main())
