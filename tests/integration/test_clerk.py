"""The clerk: inputs are validated and files measured once, whoever dies, stops, cancels or deletes in between."""

from __future__ import annotations

import asyncio
import io
import json
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from api.openai import clerk
from api.openai.clerk import AT_ONCE, OF_ONE
from api.openai.lines import InputLines
from api.output_rows import openai_block
from api.threads import StoreThreads
from jobs import files, keys, leases, openai_batches, tokens
from jobs.connections import connect
from jobs.errors import StoreUnavailable
from jobs.identity import SIMULATED
from jobs.openai_batches import Due
from jobs.requests import CHAT
from jobs.room import MARGIN
from jobs.scripts import Script
from ops.simulator import digest
from tests.components import Valkey
from tests.integration.api_stand import ApiStand, api_stand, core_standing, line, lines
from tests.integration.openai_stand import Played, content, ended, submit
from tests.integration.outbox_stand import until
from tests.integration.store_model import redis_time, run, wait_until
from tests.waiting import wait_for

ENDED = ("completed", "failed", "expired", "cancelled")

_sweep = Script("sweep")


class Standstill:
    """Validations stand still behind their first request, until `go` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        self.begun = 0
        judge = InputLines.requests

        def requests(judged: InputLines, stream: Any) -> Iterator[Any]:
            for number, request in enumerate(judge(judged, stream)):
                if number == 0:
                    self.begun += 1
                    assert self.go.wait(30)
                yield request

        monkeypatch.setattr(InputLines, "requests", requests)


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> Iterator[Standstill]:
    standstill = Standstill(monkeypatch)
    yield standstill
    standstill.go.set()


@pytest.fixture
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases are short, and renewed as often."""
    monkeypatch.setattr(clerk, "RENEW_S", 0.05)
    monkeypatch.setattr(clerk, "AGAIN_S", 0.1)
    take, renew = openai_batches.take, openai_batches.renew
    monkeypatch.setattr(openai_batches, "take", lambda client, **more: take(client, 0.5, **more))
    monkeypatch.setattr(openai_batches, "renew", lambda client, batch_id, seconds=0.5: renew(client, batch_id, seconds))


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set once a process that ends has told all that it works on so, and waits for its threads."""
    told = threading.Event()
    close = StoreThreads.close

    def closing(threads: StoreThreads) -> None:
        told.set()
        close(threads)

    monkeypatch.setattr(StoreThreads, "close", closing)
    return told


@pytest.fixture
def client(store_url: str) -> Iterator[Any]:
    with connect(store_url) as client:
        yield client


def standing(
    store_url: str, folder: Path, main: Callable[[httpx.AsyncClient], Awaitable[None]], **settings: Any
) -> None:
    """Runs a test beside one process's clerk, whose files lie in `folder`."""

    async def go() -> None:
        async with core_standing(store_url, files_dir=folder, **settings) as (_, http), asyncio.timeout(60):
            await main(http)

    asyncio.run(go())


async def new(http: httpx.AsyncClient, data: bytes, **body: Any) -> str:
    """A batch of these lines, on the lane that nobody serves."""
    made = await http.post("/v1/files", files={"file": ("in.jsonl", data)}, data={"purpose": "batch"})
    told = {"endpoint": CHAT, "completion_window": "24h", "lane": "interactive", **body}
    response = await http.post("/v1/batches", json={**told, "input_file_id": made.json()["id"]})
    assert response.status_code == 200, response.text
    batch: str = response.json()["id"]
    return batch


async def look(http: httpx.AsyncClient, batch: str) -> dict[str, Any]:
    """A look at a batch."""
    found: dict[str, Any] = (await http.get(f"/v1/batches/{batch}")).json()
    return found


async def become(http: httpx.AsyncClient, batch: str, *statuses: str) -> dict[str, Any]:
    """The batch once it has one of these."""

    async def there() -> dict[str, Any] | None:
        found = await look(http, batch)
        return found if found["status"] in statuses else None

    found: dict[str, Any] = await until(there)
    return found


async def act(http: httpx.AsyncClient, batch: str, what: str) -> dict[str, Any]:
    """The batch after a change."""
    response = await http.post(f"/v1/batches/{batch}/{what}")
    assert response.status_code == 200, response.text
    changed: dict[str, Any] = response.json()
    return changed


async def rows(http: httpx.AsyncClient, file_id: str) -> list[dict[str, Any]]:
    """Lines of a file."""
    response = await http.get(f"/v1/files/{file_id}/content")
    assert response.status_code == 200
    return [json.loads(text) for text in response.text.splitlines()]


def due(client: Any) -> Mapping[str, float]:
    """What is due of all tenants, and when."""
    tenants = [raw.decode() for raw in client.zrange(keys.OPENAI_DUE, 0, -1)]
    found = [client.zrange(keys.tenant_due(tenant), 0, -1, withscores=True) for tenant in tenants]
    return {raw.decode(): at for some in found for raw, at in some}


def events(client: Any, batch: str) -> list[str]:
    """Types of the events of a batch."""
    found = [
        client.hmget(raw, "subject", "type") for raw in client.keys(keys.event(f"evt_{batch.removeprefix('batch_')}_*"))
    ]
    assert all(subject.decode() == batch for subject, _ in found)
    return [kind.decode() for _, kind in found]


def test_a_batch_is_for_the_upstream_of_the_api_that_took_it_in(store_url: str, client: Any, tmp_path: Path) -> None:
    async def main(http: httpx.AsyncClient) -> None:
        made = (await look(http, await new(http, lines(line()))))["input_file_id"]
        simulated = openai_batches.NewOpenAIBatch("5" * 24, "", CHAT, made, "24h", 86_400.0, "c", label=SIMULATED)
        openai_batches.create(client, simulated)  # as by the API of `mimoq serve --simulate` on the same store
        await until(lambda: client.exists(keys.batch("5" * 24)))
        assert client.hget(keys.batch("5" * 24), "label").decode() == SIMULATED

    standing(store_url, tmp_path, main)


# -- changed while it is validated


def test_cancelled_while_its_validation_goes_on(still: Standstill, store_url: str, client: Any, tmp_path: Path) -> None:
    async def main(http: httpx.AsyncClient) -> None:
        batch = await new(http, lines(line(), line()))
        await until(lambda: still.begun == 1)
        cancelling = await act(http, batch, "cancel")
        assert cancelling["status"] == "cancelling"
        assert cancelling["cancelling_at"] >= cancelling["created_at"]
        assert (await act(http, batch, "cancel"))["cancelling_at"] == cancelling["cancelling_at"]
        still.go.set()
        cancelled = await become(http, batch, *ENDED)
        assert cancelled["status"] == "cancelled"
        never_was(client, cancelled)

    standing(store_url, tmp_path, main)


def never_was(client: Any, batch: dict[str, Any]) -> None:
    """It has ended without ever having been a batch: nothing was called for it, and nothing is left to do."""
    assert batch["request_counts"] == {"total": 0, "completed": 0, "failed": 0}
    assert batch["cancelled_at"] >= batch["cancelling_at"]
    assert [batch[name] for name in ("in_progress_at", "output_file_id", "error_file_id", "errors")] == [None] * 4
    assert due(client) == {}
    assert 0 < client.ttl(keys.openai(batch["id"][6:])) <= 30 * 86_400
    assert not client.exists(keys.batch(batch["id"][6:]))
    assert not client.keys("mimoq:staged:*")


@pytest.mark.usefixtures("brisk")
def test_a_long_validation_stops_once_nobody_wants_it(
    still: Standstill, store_url: str, client: Any, tmp_path: Path
) -> None:
    async def main(http: httpx.AsyncClient) -> None:
        batch = await new(http, lines(*(line(metadata={"filler": "x" * 2_000}) for _ in range(1_000))))
        await until(lambda: still.begun == 1)
        await act(http, batch, "cancel")
        before = due(client)
        await until(lambda: due(client) != before)  # whoever validates it has seen it by now
        still.go.set()
        cancelled = await become(http, batch, *ENDED)
        assert cancelled["status"] == "cancelled"
        never_was(client, cancelled)

    standing(store_url, tmp_path, main)


def test_cancelled_before_anybody_has_looked_at_it(
    monkeypatch: pytest.MonkeyPatch, store_url: str, client: Any, tmp_path: Path
) -> None:
    take = openai_batches.take
    monkeypatch.setattr(openai_batches, "take", lambda *_, **__: None)

    async def main(http: httpx.AsyncClient) -> None:
        batch = await new(http, b"not even JSON\n")
        assert (await act(http, batch, "cancel"))["status"] == "cancelling"
        monkeypatch.setattr(openai_batches, "take", take)
        assert (await become(http, batch, *ENDED))["status"] == "cancelled"

    standing(store_url, tmp_path, main)


@pytest.mark.parametrize("resumed", [False, True])
def test_paused_while_it_is_validated(still: Standstill, store_url: str, tmp_path: Path, resumed: bool) -> None:
    async def main(http: httpx.AsyncClient) -> None:
        batch = await new(http, lines(line()))
        await until(lambda: still.begun == 1)
        assert (await act(http, batch, "pause"))["status"] == "validating"
        if resumed:
            assert (await act(http, batch, "resume"))["status"] == "validating"
        still.go.set()
        await become(http, batch, "in_progress")
        native = f"/v1/job-batches/{batch.removeprefix('batch_')}"

        async def settled() -> bool:
            return bool((await http.get(native)).json()["state"] == ("running" if resumed else "paused"))

        await until(settled)
        if not resumed:
            claimed = await asyncio.to_thread(
                run, lambda client: leases.claim(client, "w", "interactive", [""], 10, 600.0), store_url
            )
            assert claimed == []
            await act(http, batch, "resume")
        await asyncio.to_thread(Played(store_url, batch).end, "s", 0)
        assert (await become(http, batch, *ENDED))["status"] == "completed"

    standing(store_url, tmp_path, main)


# -- its input


@pytest.mark.parametrize("before", [True, False])
def test_an_input_that_is_deleted(
    monkeypatch: pytest.MonkeyPatch, still: Standstill, store_url: str, tmp_path: Path, before: bool
) -> None:
    """Before it is validated that is its end; while it is validated it matters no more."""
    take = openai_batches.take
    if before:
        monkeypatch.setattr(openai_batches, "take", lambda *_, **__: None)

    async def main(http: httpx.AsyncClient) -> None:
        batch = await new(http, lines(line()))
        if not before:
            await until(lambda: still.begun == 1)
        file = (await look(http, batch))["input_file_id"]
        assert (await http.delete(f"/v1/files/{file}")).status_code == 200
        monkeypatch.setattr(openai_batches, "take", take)
        still.go.set()
        if not before:
            await become(http, batch, "in_progress")
            return
        failed = await become(http, batch, *ENDED)
        assert failed["status"] == "failed"
        ((error),) = failed["errors"]["data"]
        assert (error["code"], error["line"], error["param"]) == ("file_not_found", None, "input_file_id")
        assert failed["input_file_id"] == file

    standing(store_url, tmp_path, main)


@pytest.mark.usefixtures("brisk")
def test_an_input_on_another_machines_disk_waits_for_who_has_it(store_url: str, client: Any, tmp_path: Path) -> None:
    file = files.new_id()
    files.add(client, file, "", "batch", "in.jsonl", 5, None)

    async def main(http: httpx.AsyncClient) -> None:
        told = {"endpoint": CHAT, "completion_window": "24h", "lane": "interactive", "input_file_id": file}
        batch = (await http.post("/v1/batches", json=told)).json()["id"]
        for _ in range(2):
            before = due(client)
            await until(lambda: due(client) != before)  # noqa: B023  waited for at once
        assert (await look(http, batch))["status"] == "validating"
        # Whole at once, as a file that was uploaded comes: of half of it something would be wrong.
        tmp_path.joinpath("coming").write_bytes(lines(line()))
        tmp_path.joinpath("coming").rename(tmp_path / file)
        await become(http, batch, "in_progress")

    standing(store_url, tmp_path, main)


def test_no_room_for_the_answers_is_an_error_of_the_batch(store_url: str, client: Any, tmp_path: Path) -> None:
    async def main(http: httpx.AsyncClient) -> None:
        used = int(client.info("memory")["used_memory"])
        client.config_set("maxmemory", int((used + 1_000_000) / (1 - MARGIN)))
        try:
            batch = await new(http, lines(*(line() for _ in range(3_000))))
            failed = await become(http, batch, *ENDED)
        finally:
            client.config_set("maxmemory", 0)
        assert failed["status"] == "failed"
        ((error),) = failed["errors"]["data"]
        assert (error["code"], error["line"]) == ("no_room", None)
        assert "beside" not in error["message"]

    standing(store_url, tmp_path, main)


@pytest.mark.usefixtures("brisk")
def test_a_window_that_ends_before_the_validation(
    still: Standstill, store_url: str, client: Any, tmp_path: Path
) -> None:
    async def main(http: httpx.AsyncClient) -> None:
        batch = await new(http, lines(line(), line()), completion_window="1s")
        await until(lambda: still.begun == 1)
        end = float(client.hget(keys.openai(batch[6:]), "created_at")) + 1
        await asyncio.to_thread(wait_until, client, end)
        still.go.set()
        await until(lambda: client.exists(keys.batch(batch[6:])))
        assert float(client.hget(keys.batch(batch[6:]), "deadline_at")) == pytest.approx(end, abs=0.1)
        await asyncio.to_thread(run, leases.reap, store_url)  # as a worker does
        _sweep(client, [keys.PREFIX], [batch[6:], 10])
        expired = await become(http, batch, *ENDED)
        assert (expired["status"], expired["request_counts"]["failed"]) == ("expired", 2)
        assert expired["expires_at"] == pytest.approx(expired["created_at"] + 1, abs=1)
        assert {row["error"]["code"] for row in await rows(http, expired["error_file_id"])} == {"batch_expired"}

    standing(store_url, tmp_path, main)


# -- who does it


def test_one_tenants_inputs_keep_no_others_waiting(
    still: Standstill, store_url: str, client: Any, tmp_path: Path
) -> None:
    async def main() -> None:
        async with core_standing(store_url, files_dir=tmp_path, api_auth=True) as (_, http):
            one, two = ({"Authorization": f"Bearer {tokens.create(client, name)}"} for name in ("one", "two"))
            http.headers.update(one)
            batches = [await new(http, lines(line())) for _ in range(OF_ONE + 2)]
            await until(lambda: still.begun == OF_ONE)
            http.headers.update(two)
            await new(http, lines(line()))
            await until(lambda: still.begun == OF_ONE + 1)
            http.headers.update(one)
            assert [(await look(http, batch))["status"] for batch in batches] == ["validating"] * len(batches)
            assert still.begun <= AT_ONCE
            still.go.set()
            for batch in batches:
                await become(http, batch, "in_progress")
            await until(lambda: still.begun == len(batches) + 1)

    asyncio.run(main())


@pytest.mark.usefixtures("brisk")
def test_a_slow_validation_stays_with_who_does_it(
    still: Standstill, store_url: str, client: Any, tmp_path: Path
) -> None:
    async def main(http: httpx.AsyncClient) -> None:
        async with core_standing(store_url, files_dir=tmp_path):
            batch = await new(http, lines(line()))
            await until(lambda: still.begun == 1)
            first = due(client)[batch[6:]]
            await until(lambda: due(client)[batch[6:]] > first + 1.0)  # twice as long as a lease
            assert still.begun == 1
            still.go.set()
            await become(http, batch, "in_progress")
        assert still.begun == 1

    standing(store_url, tmp_path, main)


def test_what_a_stopped_process_validates_is_done_by_another_at_once(
    still: Standstill, stopping: threading.Event, store_url: str, client: Any, tmp_path: Path
) -> None:
    still.go = stopping

    async def first() -> str:
        async with core_standing(store_url, files_dir=tmp_path) as (_, http):
            # Longer than what is read at once: its reading can be stopped.
            batch = await new(http, lines(*(line(metadata={"filler": "x" * 2_000}) for _ in range(1_000))))
            await until(lambda: still.begun == 1)
            assert due(client)[batch[6:]] > redis_time(client)
        return batch

    batch = asyncio.run(first())
    assert not client.exists(keys.batch(batch[6:]))
    assert list(due(client)) == [batch[6:]]
    assert due(client)[batch[6:]] <= redis_time(client)
    assert not client.keys("mimoq:staged:*")

    async def main(http: httpx.AsyncClient) -> None:
        found = await become(http, batch, "in_progress")
        assert found["request_counts"]["total"] == 1_000

    standing(store_url, tmp_path, main)


def test_what_a_stopped_process_measures_is_done_by_another_at_once(
    monkeypatch: pytest.MonkeyPatch, stopping: threading.Event, store_url: str, client: Any, tmp_path: Path
) -> None:
    measured: list[list[int]] = []
    hooks = {"webhook_allow_http": True, "webhook_allow_private": True}

    def block(store: Any, status: Any, indexes: Any) -> bytes:
        measured.append(list(indexes))
        assert stopping.wait(30)
        return openai_block(store, status, indexes)

    monkeypatch.setattr(clerk, "openai_block", block)

    async def first() -> str:
        async with core_standing(store_url, files_dir=tmp_path, **hooks) as (_, http):
            batch = await new(http, lines(line(), line()), callback_url="http://127.0.0.1:9/nobody")
            await become(http, batch, "in_progress")
            played = Played(store_url, batch)
            await asyncio.to_thread(played.end, "s", 0)
            await asyncio.to_thread(played.end, "f", 1)
            await until(lambda: measured)
            assert due(client)[batch[6:]] > redis_time(client)
        return batch

    batch = asyncio.run(first())
    assert measured == [[0]]  # its errors are not measured any more
    assert due(client)[batch[6:]] <= redis_time(client)
    assert not client.hexists(keys.openai(batch[6:]), "finalized_at")
    assert not client.keys(keys.file("*-output"))
    assert events(client, batch) == []

    async def main(http: httpx.AsyncClient) -> None:
        found = await become(http, batch, *ENDED)
        assert found["request_counts"] == {"total": 2, "completed": 1, "failed": 1}
        assert len(await rows(http, found["output_file_id"])) == len(await rows(http, found["error_file_id"])) == 1
        assert events(client, batch) == ["batch.completed"]

    standing(store_url, tmp_path, main, **hooks)


@pytest.mark.usefixtures("brisk")
@pytest.mark.parametrize("over", [False, True])
def test_the_model_is_known_also_of_one_that_was_never_told_made(
    monkeypatch: pytest.MonkeyPatch, store_url: str, client: Any, tmp_path: Path, over: bool
) -> None:
    made, take = openai_batches.made, openai_batches.take
    lost = threading.Event()

    def lose(*_: Any) -> None:
        monkeypatch.setattr(openai_batches, "take", lambda *_, **__: None)
        lost.set()
        raise StoreUnavailable("away")

    monkeypatch.setattr(openai_batches, "made", lose)

    async def main(http: httpx.AsyncClient) -> None:
        batch = await new(http, lines(line(), line()))
        await until(lost.is_set)
        assert (await look(http, batch))["model"] is None
        if over:
            await asyncio.to_thread(Played(store_url, batch).end, "s", 0, 1)
        monkeypatch.setattr(openai_batches, "made", made)
        monkeypatch.setattr(openai_batches, "take", take)
        await until(lambda: due(client) == {})
        found = await look(http, batch)
        assert (found["status"], found["model"]) == ("completed" if over else "in_progress", "m")

    standing(store_url, tmp_path, main)


@pytest.mark.usefixtures("brisk")
def test_a_store_that_is_away_for_a_while(still: Standstill, tmp_path: Path) -> None:
    valkey = Valkey(durable=True)
    try:

        async def main(http: httpx.AsyncClient) -> None:
            batch = await new(http, lines(line()))
            await until(lambda: still.begun == 1)
            await asyncio.to_thread(valkey.written)
            valkey.kill()
            still.go.set()
            await asyncio.to_thread(valkey.start)
            await become(http, batch, "in_progress")
            await asyncio.to_thread(Played(valkey.url, batch).end, "s", 0)
            assert (await become(http, batch, *ENDED))["request_counts"] == {"total": 1, "completed": 1, "failed": 0}

        standing(valkey.url, tmp_path, main)
    finally:
        valkey.stop()


def test_what_fails_unforeseen_keeps_nobody_else_waiting(
    monkeypatch: pytest.MonkeyPatch, store_url: str, tmp_path: Path
) -> None:
    judge = InputLines.requests
    fell = 0

    def requests(judged: InputLines, stream: Any) -> Iterator[Any]:
        nonlocal fell
        data = stream.read()
        if data == b"{}\n":
            fell += 1
            raise RuntimeError("a fault of ours")
        return judge(judged, io.BytesIO(data))

    monkeypatch.setattr(InputLines, "requests", requests)

    async def main(http: httpx.AsyncClient) -> None:
        broken = [await new(http, b"{}\n") for _ in range(AT_ONCE + 1)]
        await become(http, await new(http, lines(line())), "in_progress")
        await until(lambda: fell == len(broken))
        assert {(await look(http, one))["status"] for one in broken} == {"validating"}

    standing(store_url, tmp_path, main)


# -- processes that die

#: What makes a process kill itself: over the files of a batch, in the middle of an input, and when the batch has been made:
#: that one is soon due again, to be finalized.
DEATHS = {
    "measured": """
import jobs.openai_batches, os
def finalize(*_):
    os.kill(os.getpid(), 9)
jobs.openai_batches.finalize = finalize
import sys
""",
    "reading": """
import api.openai.clerk, os
judge = api.openai.clerk.InputLines.requests
def requests(self, stream):
    for number, request in enumerate(judge(self, stream)):
        if number == 70:
            os.kill(os.getpid(), 9)
        yield request
api.openai.clerk.InputLines.requests = requests
import sys
""",
    "made": """
import jobs.openai_batches, os
def made(*_):
    os.kill(os.getpid(), 9)
jobs.openai_batches.made = made
import sys
""",
}


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiStand]:
    with api_stand(tmp_path_factory.mktemp("api")) as stand:
        stand.work("bulk", max_attempts="1")
        yield stand
        stand.kept_secrets()


def test_processes_that_die_double_nothing(stand: ApiStand) -> None:
    """Each dies by `kill -9` over another step, and one that lives does all that is left."""
    told = {
        "files_dir": str(stand.folder / "files"),
        "webhook_allow_http": "true",
        "webhook_allow_private": "true",
    }
    token = stand.token()
    victims: dict[str, str] = {}
    items = {how: [line(f"{how}-{n}") for n in range(120)] for how in DEATHS}
    for how, script in DEATHS.items():
        victim = stand.api(script, **told)
        http = stand.http(token, victim)
        victims[how] = submit(http, *items[how], callback_url="http://127.0.0.1:9/nobody")
        assert victim.process.wait(30) == -signal.SIGKILL, victim.text
        stand.apis.remove(victim)
    # Their leases end.
    assert set(due(stand.redis)) == {victims[how][6:] for how in ("measured", "reading", "made")}
    for batch in due(stand.redis):
        openai_batches.renew(stand.redis, batch, -1.0)
    healthy = stand.api(**told)
    http = stand.http(token, healthy)
    paid = stand.simulator.ledger()["paid"]
    for how, batch in victims.items():
        found = ended(http, batch)
        assert found["request_counts"] == {"total": 120, "completed": 120, "failed": 0}
        assert {row["custom_id"] for row in content(http, found["output_file_id"])} == {
            item["custom_id"] for item in items[how]
        }
        assert (found["model"], events(stand.redis, batch)) == ("m", ["batch.completed"]), how
    paid = stand.simulator.ledger()["paid"]
    assert [paid[digest(item["body"])] for how in DEATHS for item in items[how]] == [1] * 360
    assert stand.simulator.totals()["paid_again"] == 0
    assert due(stand.redis) == {}
    assert openai_batches.take(stand.redis) is None
    assert {batch["id"] for batch in http.get("/v1/batches").json()["data"]} == set(victims.values())
    stand.apis.remove(healthy)
    healthy.close()


def test_what_is_due_is_taken_by_one_of_many(client: Any) -> None:
    """Takers at the same time, as processes are."""
    made = set()
    for number in range(40):
        made.add(f"{number:024x}")
        new = openai_batches.NewOpenAIBatch(f"{number:024x}", "", CHAT, files.new_id(), "24h", 86_400.0, "c")
        openai_batches.create(client, new)
    taken: list[Due] = []

    def work(url: str) -> None:
        with connect(url) as own:
            while (found := openai_batches.take(own)) is not None:
                taken.append(found)

    url = client.connection_pool.connection_kwargs["path"]
    threads = [threading.Thread(target=work, args=(f"unix://{url}",)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(due.batch_id for due in taken) == sorted(made)
    assert {due.step for due in taken} == {"validate"}
    assert all(at > redis_time(client) + openai_batches.LEASE_S / 2 for at in due(client).values())
    wait_for(lambda: openai_batches.take(client) is None, what="nothing more that is due")
