"""`mimoq run` as people use it: real processes, the embedded Valkey, an upstream that keeps a ledger."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from jobs import identity, keys
from jobs.connections import connect
from jobs.states import BatchState
from jobs.store import Store
from ops.simulator import RunningSimulator, running_simulator
from tests.integration.commands import Box, Command, opened
from tests.integration.store_model import redis_time
from tests.integration.submission_stand import durable
from tests.waiting import wait_for

KEY = "sk-not-for-your-eyes"


@pytest.fixture
def sim() -> Iterator[RunningSimulator]:
    with running_simulator(key=KEY) as simulator:
        yield simulator


@pytest.fixture
def box(tmp_path: Path, sim: RunningSimulator) -> Iterator[Box]:
    with opened(tmp_path, base_url=sim.url, api_key=KEY) as found:
        yield found
        for path in tmp_path.rglob("*"):
            if path.is_file():
                assert KEY.encode() not in path.read_bytes(), f"the key stands in {path}"


def paid(sim: RunningSimulator) -> tuple[int, int]:
    """Answers paid for, and how many of them for a request that was paid before."""
    totals = sim.totals()
    return totals["paid"], totals["paid_again"]


# -- from the first call to the last row


def test_a_file_of_every_kind_of_line_and_what_comes_after(box: Box, sim: RunningSimulator) -> None:
    """Answers, failures and retries; then again, and again with each of the files gone."""
    question = [{"role": "user", "content": "hello"}]
    message = {"max_tokens": 50, "messages": question}
    chat = {"model": "m2", "messages": [*question, *question], "stream": True}
    lines = [
        {"custom_id": "chat", "method": "POST", "url": "/v1/chat/completions", "body": chat},
        {"custom_id": "message", "method": "POST", "url": "/v1/messages", "body": message},
        {"messages": question},
        {"prompt": "a prompt"},
        {"custom_id": "filtered", "prompt": "filter me"},
        {"custom_id": "refused", "prompt": "refuse me"},
        *({"custom_id": f"more-{i}", "prompt": f"more {i}"} for i in range(60)),
    ]
    source = box.write("in.jsonl", lines)
    source.write_bytes(b"\xef\xbb\xbf" + source.read_bytes().replace(b"\n", b"\r\n"))
    output, errors = box.folder / "in.out.jsonl", box.folder / "in.out.errors.jsonl"
    sim.configure(triggers={"filter me": "421", "refuse me": "400"}, script=["500", "reset", None, "429"])

    ended = box.run("run", "in.jsonl", "--json", status=1)
    told = ended.summary()
    assert (told["total"], told["succeeded"], told["failed"], told["attempts"]) == (66, 64, 2, 69)
    rows = {row["custom_id"]: row for row in box.rows()}
    bodies = [row["response"]["body"] for row in rows.values()]
    assert len(rows) == 64
    assert {"chat", "message", "line-3", "line-4", "more-0", "more-59"} <= set(rows)
    assert {row["response"]["status_code"] for row in rows.values()} == {200}
    assert {row["error"] for row in rows.values()} == {None}
    assert all(row["id"].startswith(f"batch_req_{told['batch']}-") for row in rows.values())
    assert all(row["response"]["request_id"] for row in rows.values())
    # The stream was joined into what an answer in one piece looks like, and kept its reasoning.
    joined = rows["chat"]["response"]["body"]
    assert (joined["object"], joined["model"]) == ("chat.completion", "m2")
    assert joined["choices"][0]["message"]["content"]
    assert joined["choices"][0]["message"]["reasoning_content"]
    assert rows["message"]["response"]["body"]["type"] == "message"
    spent = [body["usage"] for body in bodies]
    assert told["usage"]["prompt_tokens"] == sum(u.get("prompt_tokens", u.get("input_tokens")) for u in spent)
    assert told["usage"]["completion_tokens"] == sum(u.get("completion_tokens", u.get("output_tokens")) for u in spent)
    assert told["usage"]["reasoning_tokens"] > 0
    failed = {row["custom_id"]: row["response"] for row in box.rows(errors.name)}
    assert {name: response["status_code"] for name, response in failed.items()} == {"filtered": 421, "refused": 400}
    assert failed["filtered"]["body"]["error"]["type"] == "content_filter"
    assert "64 of 66 succeeded, 2 failed" in ended.err
    assert paid(sim) == (64, 0)
    box.empty()

    # Again: nothing is called, nothing is written.
    calls, before = sim.totals()["calls"], (output.read_bytes(), errors.read_bytes())
    again = box.run("run", "in.jsonl", "--json", status=1).summary()
    assert {**again, "elapsed_s": 0} == {**told, "elapsed_s": 0}
    assert (output.read_bytes(), errors.read_bytes()) == before

    # Without the output: written again from the store, to wherever one likes.
    output.unlink()
    box.run("run", "in.jsonl", "--quiet", "-o", "other.jsonl", "--errors", "other.errors", status=1)
    assert sorted((box.folder / "other.jsonl").read_bytes().splitlines()) == sorted(before[0].splitlines())
    assert sim.totals()["calls"] == calls

    # Without the data folder: the output is the truth, but for the row that was cut in the middle.
    box.forget()
    output.write_bytes(before[0][:-30])
    told = box.run("run", "in.jsonl", "--json", status=1).summary()
    assert (told["total"], told["succeeded"], told["failed"], told["attempts"]) == (66, 64, 2, 1)
    assert sim.totals()["calls"] == calls + 1
    assert box.ids() == sorted(rows)
    assert sorted(failed) == box.ids(errors.name)

    # The failed ones only, now that they would succeed.
    sim.configure(triggers={})
    told = box.run("run", "in.jsonl", "--json", "--retry-failed").summary()
    assert (told["succeeded"], told["failed"]) == (66, 0)
    assert sim.totals()["calls"] == calls + 3
    assert box.ids() == sorted([*rows, "filtered", "refused"])
    assert errors.read_bytes() == b""

    # All anew.
    sim.reset()
    told = box.run("run", "in.jsonl", "--json", "--fresh").summary()
    assert (told["succeeded"], told["attempts"]) == (66, 66)
    assert sim.totals()["calls"] == 66
    assert len(box.ids()) == 66
    box.empty()


def test_standard_input_bad_lines_and_the_simulator(box: Box) -> None:
    lines = [
        "nonsense",
        json.dumps({"prompt": "x", "temperature": 9}),
        *(json.dumps({"prompt": str(i)}) for i in range(9)),
    ]
    data = "\n".join(lines).encode()
    args = ("run", "-", "-o", "out.jsonl", "--simulate", "--skip-invalid", "--json", "--quiet")
    for _ in range(2):
        # No key, and an address that leads nowhere: neither is used.
        ended = box.run(*args, status=1, stdin=data, api_key="", base_url="http://127.0.0.1:9")
        told = ended.summary()
        assert (told["total"], told["succeeded"], told["failed"]) == (11, 9, 2)
        assert "simulating" in ended.err
        assert len(set(box.ids("out.jsonl"))) == len(box.rows("out.jsonl")) == 9
        codes = {row["custom_id"]: row["error"]["code"] for row in box.rows("out.errors.jsonl")}
        assert codes == {"line-1": "invalid_request", "line-2": "invalid_request"}
        assert len(box.rows("out.errors.jsonl")) == 2
    # The same input for the real upstream is another batch, so the simulator's answers are not taken for its own.
    box.run("run", "-", "-o", "out.jsonl", "--skip-invalid", status=2, stdin=data)
    box.empty()


def test_a_per_model_address_can_be_simulated(box: Box) -> None:
    box.prompts(3)
    box.run("run", "in.jsonl", "--simulate", endpoint_path="my-endpoint")
    assert len(box.ids()) == 3


def test_a_full_disk_ends_the_run_and_the_next_goes_on(box: Box, sim: RunningSimulator) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("only Linux has a device that is always full")
    box.prompts(20)
    ended = box.run("run", "in.jsonl", "-o", "/dev/full", "--errors", "errors.jsonl", "--json", status=1)
    assert ended.summary()["total"] == 20
    assert "/dev/full can't be written (No space left on device)" in ended.err.splitlines()[-1]
    box.run("run", "in.jsonl")
    assert len(box.ids()) == 20
    assert paid(sim) == (20, 0)


def test_a_refused_key_ends_the_run_and_fails_no_job(box: Box, sim: RunningSimulator) -> None:
    box.prompts(120)
    ended = box.run("run", "in.jsonl", "--json", status=3, api_key="sk-wrong")
    told = ended.summary()
    assert (told["total"], told["succeeded"], told["failed"]) == (120, 0, 0)
    assert "refuses the API key (401)" in ended.err.splitlines()[-1]
    assert "sk-wrong" not in ended.err
    refused = sim.totals()
    assert refused["by_status"] == {"401": refused["calls"]}
    assert refused["calls"] <= 100
    assert box.rows("in.out.jsonl") == [] if (box.folder / "in.out.jsonl").exists() else True
    told = box.run("run", "in.jsonl", "--json").summary()
    assert (told["succeeded"], told["failed"]) == (120, 0)
    assert paid(sim) == (120, 0)


def test_two_runs_share_a_data_folder(box: Box, sim: RunningSimulator) -> None:
    box.prompts(80, "one.jsonl", "one")
    box.prompts(80, "two.jsonl", "two")
    runs = [box.start("run", f"{name}.jsonl", "--json") for name in ("one", "two")]
    for run in runs:
        assert run.wait(0).summary()["succeeded"] == 80
    for name in ("one", "two"):
        assert box.ids(f"{name}.out.jsonl") == sorted(f"{name}-{i}" for i in range(80))
    assert paid(sim) == (160, 0)
    box.empty()


# -- ends that were not planned


def written(box: Box, rows: int) -> None:
    wait_for(lambda: box.lines() >= rows, what=f"{rows} rows")


def middle(box: Box, sim: RunningSimulator, count: int, *args: str) -> Command:
    """A run that has written some rows and has calls in flight, whose answers are held."""
    box.prompts(count)
    sim.configure(latency=0.02)
    run = box.start("run", "in.jsonl", "--json", "--max-in-flight", "8", *args)
    written(box, 10)
    sim.configure(hold=True)
    sim.wait_until(lambda totals: totals.in_flight == 8)
    return run


def finished(box: Box, sim: RunningSimulator, count: int, again: int = 0) -> None:
    """Every row once, and nothing paid for twice but what was in flight at the kill."""
    assert box.ids() == sorted(f"prompt-{i}" for i in range(count))
    total, twice = paid(sim)
    assert total == count + twice
    assert twice <= again
    box.empty()


def to_command(run: Command) -> None:
    run.signal(signal.SIGINT)


def to_group(run: Command) -> None:
    os.killpg(run.pid, signal.SIGINT)


def to_end(run: Command) -> None:
    run.signal(signal.SIGTERM)


def test_told_to_stop_a_run_ends_its_calls_and_goes_on_later(box: Box, sim: RunningSimulator) -> None:
    count = 500
    done = 0
    ways: list[tuple[Callable[[Command], None], int]] = [(to_command, 130), (to_group, 130), (to_end, 143)]
    for place, (send, status) in enumerate(ways, 1):
        sim.configure(hold=False, latency=0.02)
        if place == 1:
            run = middle(box, sim, count)
        else:
            run = box.start("run", "in.jsonl", "--json", "--max-in-flight", "8")
            written(box, done + 10)
            sim.configure(hold=True)
            sim.wait_until(lambda totals: totals.in_flight == 8)
        send(run)
        run.heard("stopping")
        arrived = sim.totals()["arrived"]
        sim.configure(hold=False)
        told = run.wait(status).summary()
        # What was in flight is written, and nothing was started after.
        assert sim.totals()["arrived"] == arrived == paid(sim)[0]
        assert len(box.rows()) == told["succeeded"] == arrived < count
        done = arrived
        box.empty()
    assert box.run("run", "in.jsonl", "--json").summary()["attempts"] == count
    finished(box, sim, count)


def test_the_command_is_killed(box: Box, sim: RunningSimulator) -> None:
    run = middle(box, sim, 300)
    run.process.kill()
    run.process.wait()
    sim.configure(hold=False)
    # Its worker ends by itself, and keeps what came.
    box.empty()
    with (box.folder / "in.out.jsonl").open("ab") as file:
        file.write(b'{"id":"batch_req_')  # as if cut in the middle of a row
    box.run("run", "in.jsonl")
    finished(box, sim, 300)


@pytest.mark.parametrize("kind", ["valkey-server", "jobs.guard"])
def test_the_store_is_killed(box: Box, sim: RunningSimulator, kind: str) -> None:
    run = middle(box, sim, 300)
    box.kill(kind)
    sim.configure(hold=False)
    assert run.wait(0).summary()["succeeded"] == 300
    finished(box, sim, 300)


def test_leases_of_the_dead_run_out(tmp_path: Path) -> None:
    """Three ends after which somebody must wait for a lease: at the same time, since each takes its ten seconds."""
    with ExitStack() as stack:

        def place(name: str) -> tuple[Box, RunningSimulator]:
            sim = stack.enter_context(running_simulator(key=KEY))
            return stack.enter_context(opened(tmp_path / name, base_url=sim.url, api_key=KEY)), sim

        box, sim = worker_gone = place("worker")
        worker_run = middle(box, sim, 300)
        box.kill("-m worker")
        sim.configure(hold=False)

        box, sim = all_gone = place("all")
        middle(box, sim, 300)
        for process in box.processes():
            process.kill()
        box.empty()
        sim.configure(hold=False)
        all_run = box.start("run", "in.jsonl", "--json")

        box, sim = left = place("left")
        run = middle(box, sim, 300)
        to_command(run)
        run.heard("stopping")
        to_command(run)
        # Its calls are still held: it leaves without them.
        assert run.wait(130).summary()["total"] == 300
        box.empty()
        sim.configure(hold=False)
        left_run = box.start("run", "in.jsonl", "--json")

        for (box, sim), run in ((worker_gone, worker_run), (all_gone, all_run), (left, left_run)):
            assert run.wait(0).summary()["succeeded"] == 300
            finished(box, sim, 300, again=8)


# -- with a Redis of one's own


def test_ctrl_c_ends_a_wait_for_the_store(box: Box) -> None:
    box.prompts(3)
    away = f"unix://{box.folder}/none.sock"
    for args in (("run", "in.jsonl"), ("submit", "in.jsonl"), ("status",), ("results", "b", "--follow")):
        command = box.start(*args, redis_url=away)
        command.heard("waiting for the store: Redis does not answer (ConnectionError): check MIMOQ_REDIS_URL")
        to_command(command)
        assert command.wait(130).out == ""
        assert command.err.count("waiting") == 1


def test_a_run_whose_store_goes_away_waits_and_can_be_stopped(box: Box, sim: RunningSimulator, tmp_path: Path) -> None:
    box.prompts(30)
    with durable(tmp_path / "durable") as server:
        here: dict[str, Any] = {"redis_url": server.url}
        run = box.start("run", "in.jsonl", "--json", **here)
        run.heard("no live worker")
        server.kill()
        run.heard("waiting for the store")
        to_command(run)
        assert run.wait(130).summary()["total"] == 30
        # Again, and this time the store comes back.
        server.start()
        run = box.start("run", "in.jsonl", "--json", **here)
        run.heard("no live worker")
        server.kill()
        run.heard("waiting for the store")
        server.start()
        run.heard("the store answers again")
        worker = box.start("worker", "--lane", "bulk", **here)
        assert run.wait(0).summary()["succeeded"] == 30
        # A store that stays away ends the run, with one line for each.
        box.prompts(31, "more.jsonl")
        worker.signal(signal.SIGTERM)
        worker.wait(0)
        run = box.start("run", "more.jsonl", "--json", store_patience_s="0.3", **here)
        run.heard("no live worker")
        server.kill()
        run.wait(1)
        assert run.err.count("Redis does not answer") == 2
        assert "mimoq: Redis does not answer" in run.err.splitlines()[-1]
    assert paid(sim) == (30, 0)


def test_commands_around_a_worker_of_ones_own(box: Box, sim: RunningSimulator, store_url: str) -> None:
    box.prompts(60)
    sim.configure(triggers={'prompt 7"': "421"})
    here: dict[str, Any] = {"redis_url": store_url}

    # A run starts neither a server nor a worker, and says that there is none.
    run = box.start("run", "in.jsonl", "--json", **here)
    run.heard("no live worker: start one with `mimoq worker`")
    assert [process.pid for process in box.processes()] == [run.pid]
    worker = box.start("worker", "--lane", "bulk", **here)
    told = run.wait(1).summary()
    assert (told["succeeded"], told["failed"]) == (59, 1)
    assert len(box.ids()) == 59

    submitted = box.run("submit", "in.jsonl", **here)
    (batch,) = submitted.out.splitlines()
    followed = box.run("results", batch, "--follow", **here)
    rows = [json.loads(line) for line in followed.out.splitlines()]
    assert sorted(row["custom_id"] for row in rows) == sorted(f"prompt-{i}" for i in range(60))
    assert [row["response"]["status_code"] for row in rows if row["custom_id"] == "prompt-7"] == [421]
    status = json.loads(box.run("status", batch, "--json", **here).out)
    assert (status["state"], status["succeeded"], status["failed"]) == ("finished", 59, 1)
    shown = box.run("status", **here).out
    assert f"{batch}  finished" in shown
    assert "1 live worker" in shown

    # While calls are in flight: results so far, and what cancelling makes of the rest.
    sim.configure(hold=True, triggers={})
    (held,) = box.run("submit", "in.jsonl", **here).out.splitlines()
    sim.wait_until(lambda totals: totals.in_flight > 0)
    assert box.run("results", held, **here).out == ""
    following = box.start("results", held, "--follow", **here)
    cancelled = box.run("cancel", held, **here)
    assert f"batch {held}: " in cancelled.err
    assert following.wait(0).out.count("batch_cancelled") == 60

    sim.configure(hold=False)
    worker.signal(signal.SIGTERM)
    worker.wait(0)
    assert "0 live workers" in box.run("status", **here).out


# -- what stops a batch as a whole

WHY = "the first 20 jobs all failed alike: http_404"
SEE = f"mimoq: {WHY}; see in.out.errors.jsonl, then run the same command again (with --retry-failed to call these again too)"


def test_a_batch_that_fails_alike_stops_until_what_is_wrong_is_mended(
    box: Box, sim: RunningSimulator, store_url: str
) -> None:
    """With a worker of the run's own, then with somebody else's."""
    box.prompts(100)
    sim.configure(faults={"404": 1.0})
    here: dict[str, Any] = {"redis_url": store_url, "worker_max_in_flight": "4", "slice_size": "10"}
    client: Any = connect(store_url)

    def stopped(run: Command, failed_before: int) -> int:
        told = run.wait(1).summary()
        assert run.err.splitlines()[-1] == SEE
        # What was in flight ended and is written; nothing is started any more.
        status = Store(client).status(told["batch"])
        assert (status.state, status.reason, status.running) == (BatchState.PAUSED, WHY, 0)
        assert (told["succeeded"], told["failed"]) == (0, status.failed)
        assert failed_before + 20 <= status.failed < 100
        assert len(box.ids("in.out.errors.jsonl")) == status.failed == sim.totals()["calls"]
        return status.failed

    failed = stopped(box.start("run", "in.jsonl", "--json", "--workers", "1", **here), 0)
    worker = box.start("worker", "--lane", "bulk", **here)
    # The same command, and nothing was mended: it stops again.
    stopped(box.start("run", "in.jsonl", "--json", **here), failed)

    # Mended, and tried at once even where an earlier run had found the key refused.
    sim.configure(faults={})
    gate, now = keys.gate(identity.account(KEY)), redis_time(client)
    shut: dict[Any, Any] = {"reason": "key_refused", "status": 401, "since": now, "until": now + 99, "step_s": 60}
    client.hset(gate, mapping={**shut, "refused_at": now})
    told = box.run("run", "in.jsonl", "--json", "--retry-failed", **here).summary()
    assert (told["succeeded"], told["failed"]) == (100, 0)
    assert paid(sim) == (100, 0)
    assert box.rows("in.out.errors.jsonl") == []
    assert not client.exists(gate)
    client.close()
    worker.signal(signal.SIGTERM)
    worker.wait(0)
