"""Output and error files of batches as they are read: which rows, in which order, and what each says."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest

from api.output_rows import Part, message_block, openai_block, rows, size, stream
from jobs import keys, leases
from jobs.backends import RedisResults
from jobs.connections import connect, connect_async
from jobs.leases import Job
from jobs.requests import CHAT, Request
from jobs.scripts import Script
from jobs.states import BatchState, job_id
from jobs.store import READ_JOBS, NewBatch, Store
from producers import follow
from producers.follow import Follower
from tests.integration.api_stand import core_standing
from tests.integration.engine_stand import in_loop
from tests.integration.store_model import ending, redis_time, requests, run, wait_until
from worker.outside import Outside

PARTS: tuple[Part, ...] = ("output", "error", "all")


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    client = connect(store_url)
    yield Store(client)
    client.close()


class Batch:
    """A batch whose jobs the test ends, in any order."""

    def __init__(self, store: Store, url: str, asked: int | list[Request], **new: Any) -> None:
        asked = requests(asked) if isinstance(asked, int) else asked
        self.store = store
        self.url = url
        self.id = store.submit(asked, NewBatch(**new)).batch_id
        self._jobs: dict[int, Job] = {}

    def claim(self, most: int = 1_000) -> None:
        """Its jobs that are ready are held by a worker from now on."""
        found = run(lambda client: leases.claim(client, "w", "bulk", [""], most, 600.0), self.url)
        self._jobs.update({job.index: job for job in found})

    def end(self, letter: str, *indexes: int, note: str = "") -> None:
        """Ends these, which must have been claimed, one after the other."""
        ends = [ending(self._jobs[index], letter, note) for index in indexes]
        words = run(lambda client: leases.finish(client, self.id, ends), self.url)
        assert words == ["ended"] * len(ends)

    def give_back(self, *indexes: int) -> None:
        """The worker lets go of these."""
        backs = [leases.Back(self._jobs[index]) for index in indexes]
        run(lambda client: leases.give_back(client, self.id, backs), self.url)

    def rows(self, part: Part) -> list[int]:
        return list(rows(self.store, self.id, part))

    def openai(self, part: Part) -> list[Any]:
        """Lines of an OpenAI file."""
        status = self.store.status(self.id)
        return [
            json.loads(line) for line in openai_block(self.store, status, rows(self.store, self.id, part)).splitlines()
        ]

    def messages(self) -> dict[str, str]:
        """Types of Anthropic's results, by custom id."""
        status = self.store.status(self.id)
        found = [json.loads(line) for line in message_block(self.store, status, self.rows("all")).splitlines()]
        assert len({item["custom_id"] for item in found}) == len(found)
        return {item["custom_id"]: item["result"]["type"] for item in found}

    def codes(self) -> dict[str, str]:
        """Codes of the error file, by custom id; those of HTTP errors are their statuses."""
        return {
            item["custom_id"]: item["error"]["code"] if item["error"] else str(item["response"]["status_code"])
            for item in self.openai("error")
        }


def test_rows_stand_in_the_order_of_their_ends(store: Store, store_url: str) -> None:
    batch = Batch(store, store_url, 8)
    assert [batch.rows(part) for part in PARTS] == [[], [], []]
    batch.claim()
    batch.end("s", 5, 2)
    batch.end("f", 7, 0)
    batch.end("s", 1)
    assert [batch.rows(part) for part in PARTS] == [[5, 2, 1], [7, 0], [5, 2, 7, 0, 1]]
    batch.end("f", 6)
    batch.end("s", 3, 4)
    assert [batch.rows(part) for part in PARTS] == [[5, 2, 1, 3, 4], [7, 0, 6], [5, 2, 7, 0, 1, 6, 3, 4]]


def test_lines_made_in_the_quick_way_are_those_made_in_the_slow_one(store: Store, store_url: str) -> None:
    """Answers among all that is none: results that are gone, failures, jobs that no worker ever ended."""
    batch = Batch(store, store_url, 9)
    batch.claim(8)
    batch.end("s", 0, 1, 2, note="\u2028")
    batch.end("f", 3, 4)
    batch.end("s", 5)
    batch.give_back(6, 7)
    store.backend.delete([job_id(batch.id, 1), job_id(batch.id, 4)])
    store.cancel(batch.id)
    slowly = [ended.line() for ended in Follower(store, batch.id).all_ready()]
    assert b"".join(Follower(store, batch.id).lines()) == b"".join(slowly)
    assert openai_block(store, store.status(batch.id), rows(store, batch.id, "all")) == b"".join(slowly)
    assert [json.loads(line)["custom_id"] for line in slowly] == [f"c{n}" for n in (0, 1, 2, 3, 4, 5, 6, 7, 8)]


@pytest.mark.parametrize(("block_bytes", "asked"), [(1, [2, 1, 1]), (1 << 20, [2, 500])])
def test_of_large_answers_fewer_are_read_at_once(
    store: Store, store_url: str, monkeypatch: pytest.MonkeyPatch, block_bytes: int, asked: list[int]
) -> None:
    batch = Batch(store, store_url, 4)
    batch.claim()
    batch.end("s", 0, 1, 2, 3)
    monkeypatch.setattr(follow, "FIRST_JOBS", 2)
    monkeypatch.setattr(follow, "BLOCK_BYTES", block_bytes)
    limits: list[int] = []

    def done(batch_id: str, start: int, limit: int) -> list[int]:
        limits.append(limit)
        return Store.done(store, batch_id, start, limit)

    monkeypatch.setattr(store, "done", done)
    assert b"".join(Follower(store, batch.id).lines()).count(b"\n") == 4
    assert len(list(Follower(store, batch.id).all_ready())) == 4
    half = len(limits) // 2
    assert limits[:half] == limits[half:]
    assert limits[: len(asked)] == asked


def test_what_lines_say(store: Store, store_url: str) -> None:
    batch = Batch(store, store_url, 3)
    batch.claim()
    batch.end("s", 2, note="hi")
    batch.end("f", 0, note="no")
    assert batch.openai("output") == [
        {
            "id": f"batch_req_{job_id(batch.id, 2)}",
            "custom_id": "c2",
            "response": {"status_code": 200, "request_id": None, "body": {"a": "hi"}},
            "error": None,
        }
    ]
    assert batch.openai("error") == [
        {
            "id": f"batch_req_{job_id(batch.id, 0)}",
            "custom_id": "c0",
            "response": None,
            "error": {"code": "bad_request", "message": "no"},
        }
    ]
    assert batch.messages() == {"c2": "succeeded", "c0": "errored"}


def test_a_job_that_is_queued_again_stands_where_it_ended_last(store: Store, store_url: str) -> None:
    batch = Batch(store, store_url, 6)
    batch.claim()
    batch.end("f", 0)
    batch.end("s", 1)
    batch.end("f", 2, 3, 4)
    assert batch.rows("error") == [0, 2, 3, 4]
    assert store.requeue_failed(batch.id) == 4
    # They have not ended any more, whatever has been written down of their first end.
    assert [batch.rows(part) for part in PARTS] == [[1], [], [1]]
    batch.claim()
    batch.end("s", 3)
    batch.end("f", 2)
    assert [batch.rows(part) for part in PARTS] == [[1, 3], [2], [1, 3, 2]]
    assert store.requeue_failed(batch.id) == 1
    batch.claim()
    batch.end("s", 5, 0)
    batch.end("f", 2)
    batch.end("s", 4)
    assert [batch.rows(part) for part in PARTS] == [[1, 3, 5, 0, 4], [2], [1, 3, 5, 0, 2, 4]]
    assert store.status(batch.id).state is BatchState.FINISHED
    assert len(store.done(batch.id, 0)) == 11


def test_the_output_of_a_running_batch_only_grows(store: Store, store_url: str) -> None:
    batch = Batch(store, store_url, 60)
    status, before = store.status(batch.id), b""
    for step in range(6):
        batch.claim()
        ready = [index for index in range(60) if index not in batch.rows("all")]
        batch.end("f", *ready[::7])
        batch.end("s", *[index for index in ready[1::3] if index not in ready[::7]])
        text = openai_block(store, status, rows(store, batch.id, "output"))
        assert text.startswith(before)
        assert len(text) > len(before)
        before = text
        if step % 2:
            assert store.requeue_failed(batch.id)


def test_cancelled_at_half(store: Store, store_url: str) -> None:
    batch = Batch(store, store_url, 120)
    batch.claim(60)
    batch.end("s", *range(0, 40, 2))
    batch.end("f", 1, 3)
    assert store.cancel(batch.id).cancelled == 60  # the others are held by a worker
    assert batch.rows("error") == [1, 3, *range(60, 120)]
    batch.end("s", 5)  # an answer that came meanwhile has been paid for
    batch.give_back(*[index for index in range(60) if index not in batch.rows("all")])
    status = store.status(batch.id)
    assert (status.state, status.succeeded, status.failed, status.cancelled) == (BatchState.FINISHED, 21, 2, 97)
    assert [len(batch.rows(part)) for part in PARTS] == [21, 99, 120]
    answered = {f"c{index}" for index in [*range(0, 40, 2), 5]}
    assert {item["custom_id"] for item in batch.openai("output")} == answered
    codes = batch.codes()
    assert {name for name, code in codes.items() if code == "bad_request"} == {"c1", "c3"}
    assert [code for code in codes.values() if code != "bad_request"] == ["batch_cancelled"] * 97
    assert answered | codes.keys() == {f"c{index}" for index in range(120)}
    kinds = list(batch.messages().values())
    assert [kinds.count(kind) for kind in ("succeeded", "errored", "canceled")] == [21, 2, 97]


def test_expired(store: Store, store_url: str) -> None:
    batch = Batch(store, store_url, 10, deadline_s=0.05)
    batch.claim()
    batch.end("s", 4)
    batch.give_back(*[index for index in range(10) if index != 4])
    wait_until(store.client, redis_time(store.client) + 0.05)
    run(leases.reap, store_url)
    Script("sweep")(store.client, [keys.PREFIX], [batch.id, 100])
    assert store.status(batch.id).expired == 9
    assert batch.rows("output") == [4]
    assert set(batch.codes().values()) == {"batch_expired"}
    assert batch.codes().keys() == {f"c{index}" for index in range(10)} - {"c4"}
    assert batch.messages() == {"c4": "succeeded"} | {f"c{index}": "expired" for index in range(10) if index != 4}


def test_a_cancelled_job_that_had_calls_has_its_name(store: Store, store_url: str) -> None:
    batch = Batch(store, store_url, [Request(CHAT, b'{"text":"%s"}' % (b"x" * 100_000), "large"), *requests(1)])
    client = store.client
    calls = '[{"at":1.0,"latency_s":1.0,"verdict":"timeout"}]'
    client.hset(keys.batch(batch.id) + ":history", mapping={"0": calls, "1": calls})
    store.cancel(batch.id)
    assert batch.codes() == {"large": "batch_cancelled", "c0": "batch_cancelled"}


def test_results_that_are_gone(store: Store, store_url: str) -> None:
    batch = Batch(store, store_url, 4)
    batch.claim()
    batch.end("s", 3, 1)
    batch.end("f", 0)
    store.client.delete(*(keys.result(job_id(batch.id, index)) for index in (3, 0)))
    assert [(item["custom_id"], item["error"] and item["error"]["code"]) for item in batch.openai("output")] == [
        ("c3", "result_expired"),
        ("c1", None),
    ]
    assert batch.messages() == {"c3": "errored", "c1": "succeeded", "c0": "errored"}
    store.client.delete(keys.requests(batch.id))  # nobody knows its name any more
    assert [item["custom_id"] for item in batch.openai("output")] == [None, "c1"]


def test_nothing_is_kept_of_it(store: Store, store_url: str) -> None:
    batch = Batch(store, store_url, 2)
    batch.claim()
    batch.end("s", 0, 1)
    status = store.status(batch.id)
    store.client.flushdb()
    assert batch.rows("all") == []
    assert openai_block(store, status, [0, 1]) == b""


def test_a_job_queued_again_while_its_file_is_read_has_no_line(store: Store, store_url: str) -> None:
    batch = Batch(store, store_url, 3)
    batch.claim()
    batch.end("f", 0)
    batch.end("s", 1)
    status, indexes = store.status(batch.id), batch.rows("all")
    assert store.requeue_failed(batch.id) == 1
    for block in (openai_block, message_block):
        (line,) = block(store, status, indexes).splitlines()
        assert json.loads(line)["custom_id"] == "c1"


@in_loop
async def test_results_elsewhere(store_url: str) -> None:
    elsewhere = f"{store_url}?db=3"
    client, results = connect_async(store_url), RedisResults(connect(elsewhere))
    outside = Outside(client, results)
    await outside.mark()
    store = Store(connect(store_url), results)
    batch_id = store.submit(requests(4), NewBatch()).batch_id
    jobs = await leases.claim(client, "w", "bulk", [""], 2)
    ends = [ending(jobs[0], "s"), ending(jobs[1], "f")]
    assert await leases.finish(client, batch_id, await outside.write(ends), stored_elsewhere=True) == ["ended"] * 2
    store.cancel(batch_id)
    status, indexes = store.status(batch_id), rows(store, batch_id, "all")
    # Revoked results are told to the other Redis later: until then the states say it.
    early = [block(store, status, indexes) for block in (openai_block, message_block)]
    assert store.results(batch_id, [2, 3]) == [None, None]
    await outside.write_revoked()
    assert None not in store.results(batch_id, [2, 3])
    assert [block(store, status, indexes) for block in (openai_block, message_block)] == early
    told = [json.loads(line) for line in early[1].splitlines()]
    assert [(item["custom_id"], item["result"]["type"]) for item in told] == [
        ("c0", "succeeded"),
        ("c1", "errored"),
        ("c2", "canceled"),
        ("c3", "canceled"),
    ]
    await client.aclose(close_connection_pool=True)
    store.client.close()
    outside.close()


def test_a_million_jobs(store: Store, store_url: str) -> None:
    batch = Batch(store, store_url, 1)
    total = 1_000_000
    states = bytearray(b"s" * total)
    states[1::3] = b"f" * len(states[1::3])
    ends = list(range(total - 1, -1, -1))
    again = list(range(1, 30_000, 3))  # ended twice
    store.client.set(keys.states(batch.id), bytes(states))
    store.client.set(keys.done(batch.id), struct.pack(f"<{total + len(again)}I", *ends, *again))
    assert [len(rows(store, batch.id, part)) for part in PARTS] == [666_667, 333_333, total]
    tracemalloc.start()
    try:
        found = rows(store, batch.id, "all")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(found) == total
    assert found[0] == total - 1
    assert list(found[-3:]) == again[-3:]
    assert peak < 50_000_000


@in_loop
async def test_a_file_comes_in_pieces_and_its_size_is_known(store_url: str) -> None:
    async with core_standing(store_url) as (core, _):
        store = Store(connect(store_url))
        batch_id = store.submit(requests(2 * READ_JOBS + 1), NewBatch(slice_size=7)).batch_id
        store.cancel(batch_id)
        status, indexes = store.status(batch_id), rows(store, batch_id, "all")
        for block in (openai_block, message_block):
            pieces = [piece async for piece in stream(core, status, indexes, block)]
            assert [piece.count(b"\n") for piece in pieces] == [READ_JOBS, READ_JOBS, 1]
            whole = b"".join(pieces)
            assert whole == block(store, status, indexes)
            assert size(store, status, indexes, block) == len(whole)
            names = [json.loads(line)["custom_id"] for line in whole.splitlines()]
            assert names == [f"c{index}" for index in range(2 * READ_JOBS + 1)]
        assert [piece async for piece in stream(core, status, [], openai_block)] == []
        assert size(store, status, [], openai_block) == 0
        store.client.close()
