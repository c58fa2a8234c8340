"""What tests of the store share: jobs and ends to write, and a model of what a batch may be."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import msgspec

from jobs import keys, leases
from jobs.connections import connect_async
from jobs.leases import End, Job
from jobs.requests import CHAT, Request
from jobs.results import About, Failure, Usage, failure_payload, success_payload
from jobs.states import TERMINAL, BatchState, JobState
from jobs.store import Store
from jobs.workers import WorkerInfo

USAGE = Usage(3, 2, 1, 0, 5)
#: Failures alike, of the jobs that end first, that pause a batch.
ALIKE = 20


def run(work: Callable[[Any], Coroutine[Any, Any, Any]], url: str) -> Any:
    """What `work` returns, given an async client of the store."""

    async def main() -> Any:
        client = connect_async(url)
        try:
            return await work(client)
        finally:
            await client.connection_pool.aclose()

    return asyncio.run(main())


def requests(count: int) -> list[Request]:
    """Requests that tell their own index."""
    return [Request(CHAT, b'{"messages":[],"n":%d}' % n, f"c{n}") for n in range(count)]


def ending(
    job: Job, letter: str, note: str = "", calls: int = 1, compress: bool = False, code: str = "bad_request"
) -> End:
    """An end of the job with `USAGE`; another `note` makes it another payload. `code` is a failure's."""
    if letter == "s":
        about = About(job.request.custom_id, CHAT, USAGE, [], 200, model="m")
        return End(job, "s", success_payload(job.job_id, b'{"a":"%s"}' % note.encode(), about, compress), calls, USAGE)
    about = About(job.request.custom_id, CHAT, USAGE, [], 400, error=Failure(code, note, 400))
    return End(job, "f", failure_payload(job.job_id, about, compress), calls, USAGE, code)


async def renew(client: Any, tokens: list[str], lease_s: float = leases.LEASE_S) -> leases.Beat:
    """A heartbeat of a worker that holds these leases."""
    return await leases.beat(client, "w", b"{}", "a", tokens, {}, 10.0, lease_s)


def live_worker(client: Any, account: str = "a", label: str = "") -> None:
    """A worker that has said something of itself just now."""
    said = WorkerInfo("w", "here", 1, ["bulk"], label, "http://127.0.0.1:9", account, 0, 0, [], False, 0.0)
    client.zadd(keys.WORKERS, {said.id: redis_time(client)})
    client.set(keys.worker(said.id), msgspec.json.encode(said))


def redis_time(client: Any) -> float:
    """The server's clock."""
    seconds, microseconds = client.time()
    return float(seconds + microseconds / 1e6)


def wait_until(client: Any, then: float) -> None:
    """Returns once the server's clock is past `then`."""
    while redis_time(client) <= then:
        time.sleep(0.001)


def leftovers(client: Any) -> set[str]:
    """Keys that must be gone when every batch is over."""
    gone = ("lease:", "leases", "open", "due", "deadlines", "closing", "lane:", "staged:", "quarantine")
    parts = (":ready", ":claims", ":retries", ":history", ":quarantine", ":suspects")
    names = {name.decode().removeprefix(keys.PREFIX) for name in client.keys(keys.PREFIX + "*")}
    return {name for name in names if name.startswith(gone) or name.endswith(parts)}


@dataclass
class Model:
    """What a batch must look like: per job its end, its holder and the times it ended."""

    batch_id: str
    lane: str
    label: str
    total: int
    deadline: bool
    ends: list[str] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    later: set[int] = field(default_factory=set)
    payloads: dict[int, bytes] = field(default_factory=dict)
    done: Counter[int] = field(default_factory=Counter)
    closing: str = ""
    paused: bool = False
    reason: str = ""
    codes: list[str] = field(default_factory=list)
    late: int = 0
    attempts: int = 0
    told: set[tuple[str, int]] = field(default_factory=set)  # what leases spent on jobs that did not end by them
    suspects: set[int] = field(default_factory=set)

    @property
    def over(self) -> bool:
        return all(self.ends)

    def ready(self) -> int:
        """Jobs that a claim must be able to get at once."""
        if self.closing or self.paused or self.deadline:
            return 0
        return sum(
            not end and not token and index not in self.later and index not in self.suspects
            for index, (end, token) in enumerate(zip(self.ends, self.tokens, strict=True))
        )

    def claim(self, job: Job) -> None:
        assert not self.closing
        assert not self.paused
        assert not self.ends[job.index], "an ended job was claimed"
        assert not self.tokens[job.index], "a job was claimed twice"
        assert job.request.custom_id == f"c{job.index}"
        self.tokens[job.index] = job.token
        self.later.discard(job.index)

    def end(self, index: int, letter: str) -> None:
        assert not self.ends[index]
        self.ends[index], self.tokens[index] = letter, ""
        self.later.discard(index)
        self.done[index] += 1

    def finish(self, end: End) -> str:
        """Takes in an end; the word that finish.lua must say."""
        index, success = end.job.index, end.letter == "s"
        if self.ends[index]:
            if self.payloads.get(index) == end.payload:
                return "again"
            self.late += success and (end.job.token, index) not in self.told
            self.tell(end.job.token, index, end.calls)
            return "late" if success else "fenced"
        if not success and self.tokens[index] != end.job.token:
            self.tell(end.job.token, index, end.calls)
            return "fenced"
        self.end(index, end.letter)
        self.payloads[index] = end.payload
        self.attempts += end.calls
        if not success:
            self.codes.append(end.code)
        return "ended"

    def tell(self, token: str, index: int, calls: int) -> None:
        """What a lease spent on a job that did not end by it counts once."""
        if calls and (token, index) not in self.told:
            self.told.add((token, index))
            self.attempts += calls

    def look(self) -> None:
        """After a block of ends: whether the first of them were failures alike."""
        first = self.codes[:ALIKE]
        if len(first) < ALIKE or len(set(first)) > 1 or "s" in self.ends:
            return
        if not self.over and not self.closing and not self.paused:
            self.paused, self.reason = True, f"the first {ALIKE} jobs all failed alike: {first[0]}"

    def pause(self, paused: bool) -> None:
        if self.paused and not paused and not self.over and not self.closing:
            self.reason = ""
            self.codes.clear()
        self.paused = paused

    def give_back(self, index: int, token: str, later: bool, calls: int = 0) -> bool:
        """Whether the job is ready at once."""
        self.tell(token, index, calls)
        if self.tokens[index] != token:
            return False
        self.tokens[index] = ""
        if self.closing:
            self.end(index, self.closing)
            return False
        if later:
            self.later.add(index)
        return not later

    def close(self, letter: str) -> None:
        if not self.over and not self.closing:
            self.closing = letter

    def sweep(self) -> None:
        if self.closing:
            for index in range(self.total):
                if not self.ends[index] and not self.tokens[index]:
                    self.end(index, self.closing)

    def requeue(self) -> int:
        if self.closing:
            return 0
        failed = [index for index, end in enumerate(self.ends) if end == "f"]
        if failed:
            self.codes.clear()
            if self.over:
                self.paused, self.reason = False, ""
        for index in failed:
            self.ends[index] = ""
            self.payloads.pop(index, None)
            self.suspects.discard(index)
        return len(failed)

    def check(self, store: Store) -> None:
        """The store agrees in everything it tells of this batch."""
        self.deadline = self.deadline and not self.over  # it ends with the batch, and is not renewed by a requeue
        status = store.status(self.batch_id)
        count = Counter(self.ends)
        assert status.total == self.total == status.queued + status.running + status.ended
        assert status.running == sum(map(bool, self.tokens))
        assert (status.succeeded, status.failed) == (count["s"], count["f"])
        assert (status.cancelled, status.expired) == (count["c"], count["x"])
        states = store.states(self.batch_id).ljust(self.total, b"\0").decode().replace("\0", " ")
        assert states == "".join(end or " " for end in self.ends)
        held = {int(index): token.decode() for index, token in store.client.hgetall(keys.claims(self.batch_id)).items()}
        assert held == {index: token for index, token in enumerate(self.tokens) if token}
        for token in held.values():
            assert store.client.zscore(keys.LEASES, token) is not None
            assert int(store.client.hget(keys.lease(token), "left")) == self.tokens.count(token)
        assert Counter(store.done(self.batch_id, 0, 10_000)) == +self.done
        assert status.late_answers == self.late
        if not self.over:
            self.suspects = {int(index) for index in store.client.hkeys(keys.suspects(self.batch_id))}
        assert status.attempts == self.attempts
        assert status.usage.total_tokens == 5 * sum(1 for _ in range(self.attempts))
        assert (status.state is BatchState.FINISHED) == self.over
        assert (status.state is BatchState.PAUSED) == (self.paused and not self.closing and not self.over)
        assert status.reason == self.reason
        for index, (end, token) in enumerate(zip(self.ends, self.tokens, strict=True)):
            state = store.job_state(self.batch_id, index)
            if end:
                assert state is TERMINAL[ord(end)]
            elif token:
                assert state is JobState.RUNNING
            else:
                assert state is (TERMINAL[ord(self.closing)] if self.closing else JobState.QUEUED)
        stored = store.results(self.batch_id, list(range(self.total)))
        words = {"s": "SUCCESS", "f": "FAILURE", "c": "REVOKED", "x": "REVOKED"}
        for index, result in enumerate(stored):
            if self.done[index] and self.ends[index]:
                assert result is not None
                assert result.status == words[self.ends[index]]
            else:
                assert result is None
