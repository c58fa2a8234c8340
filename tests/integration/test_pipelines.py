"""Celery pipelines: `mimoq.complete` called by an app that knows it by its name, with real workers of both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from celery import chain, chord, group
from celery.exceptions import ChordError, TaskRevokedError
from celery.result import GroupResult

from jobs.broker import Bell, make_app
from jobs.settings import load_settings
from jobs.submission import NewBatch
from ops.simulator import RunningSimulator, running_simulator
from tests.components import Valkey
from tests.integration.pipeline_stand import BULK, PROMPT, Pipelines, pipelines
from tests.integration.worker_stand import KEY, requests
from tests.waiting import wait_for

EXAMPLE = Path(__file__).parents[2] / "examples" / "celery_pipeline"
WAIT_S = 60.0
LONGEST = 20_000


def ask(text: str = "", **fields: Any) -> dict[str, Any]:
    """A request."""
    return {"model": "m", "messages": [{"role": "user", "content": f"{PROMPT} {text}"}], **fields}


@pytest.fixture(scope="module")
def simulator() -> Iterator[RunningSimulator]:
    with running_simulator(key=KEY) as simulator:
        yield simulator


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory, simulator: RunningSimulator) -> Iterator[Pipelines]:
    """A caller's worker and one of mimoq's, which sends events."""
    valkey = Valkey()
    try:
        with pipelines(tmp_path_factory.mktemp("pipelines"), valkey.url, simulator) as stand:
            stand.caller()
            worker = stand.worker(task_events="true", max_line_bytes=str(LONGEST))
            stand.log = worker.log  # type: ignore[attr-defined]  # for one test
            yield stand
    finally:
        valkey.stop()


@pytest.fixture(autouse=True)
def _as_it_was(request: pytest.FixtureRequest, simulator: RunningSimulator) -> Iterator[None]:
    simulator.reset()
    yield
    simulator.configure(hold=False)


def test_a_task_returns_the_whole_response(stand: Pipelines) -> None:
    kwargs = {"request": ask(), "endpoint": "/v1/chat/completions"}
    result = stand.app.send_task("mimoq.complete", kwargs=kwargs, queue="mimoq.complete")
    response = result.get(timeout=WAIT_S)
    assert response["choices"][0]["message"]["content"]
    assert response["usage"]["total_tokens"] > 0
    assert result.state == "SUCCESS"


def test_a_chain_goes_through_tasks_of_both(stand: Pipelines) -> None:
    done = chain(stand.mine("ask", PROMPT), stand.complete(), stand.mine("text")).apply_async()
    assert isinstance(done.get(timeout=WAIT_S), str)
    assert done.parent.get(timeout=WAIT_S)["object"] == "chat.completion"


def test_a_chord_of_200_calls_its_callback_once_with_all_the_answers(
    stand: Pipelines, simulator: RunningSimulator
) -> None:
    header = [stand.complete(ask(str(n))) for n in range(200)]
    count, tokens = chord(header)(stand.mine("gather")).get(timeout=WAIT_S)
    assert count == 200
    assert tokens == simulator.totals()["total_tokens"]
    assert simulator.totals()["paid"] == 200


def test_a_group_keeps_its_order_and_links_follow(stand: Pipelines) -> None:
    link = stand.mine("text").set(task_id="linked")
    result = group([stand.complete(ask("0")).set(link=link), stand.complete(ask("1"))]).apply_async()
    assert isinstance(result, GroupResult)
    first, second = result.get(timeout=WAIT_S)
    assert first["id"] != second["id"]
    assert stand.result("linked").get(timeout=WAIT_S) == first["choices"][0]["message"]["content"]


def test_a_failure_has_code_and_status_and_its_errback_hears(stand: Pipelines, simulator: RunningSimulator) -> None:
    simulator.configure(triggers={"refuse": "421"})
    errback = stand.mine("note").set(task_id="heard")
    result = stand.complete(ask("refuse")).set(link_error=errback).apply_async()
    with pytest.raises(RuntimeError) as caught:
        result.get(timeout=WAIT_S)
    assert type(caught.value) is RuntimeError
    assert caught.value.args[:2] == ("content_filter", 421)
    assert stand.result("heard").get(timeout=WAIT_S)[0] == result.id


def test_a_chord_fails_with_one_of_its_calls(stand: Pipelines, simulator: RunningSimulator) -> None:
    simulator.configure(triggers={"refuse": "421"})
    done = chord([stand.complete(ask("refuse")), stand.complete(ask("1"))])(stand.mine("gather"))
    with pytest.raises(ChordError, match="content_filter"):
        stand.result(done.id).get(timeout=WAIT_S)  # without its parents, which would raise first


@pytest.mark.parametrize(
    ("args", "kwargs", "said"),
    [
        ((), {"request": {"messages": PROMPT}}, "messages: must be a list"),
        ((), {"request": [PROMPT]}, "request: must be an object"),
        ((ask(), "/v1/embeddings"), {}, "endpoint: use"),
        ((ask(),), {"lane": "bulk"}, "no such argument: lane"),
        ((ask(),), {"request": ask()}, "an argument twice: request"),
        ((ask(),), {"deadline_s": 0}, "deadline_s: must be over 0"),
        ((ask(),), {"max_attempts": True}, "max_attempts: must be at least 1"),
        ((ask("x" * LONGEST),), {}, "request: is longer than 20,000 bytes"),
    ],
)
def test_an_invalid_request_fails_its_task_and_names_no_text_of_it(
    stand: Pipelines, args: tuple[Any, ...], kwargs: dict[str, Any], said: str
) -> None:
    result = stand.complete(*args, **kwargs).apply_async()
    with pytest.raises(RuntimeError) as caught:
        result.get(timeout=WAIT_S)
    code, status, message = caught.value.args
    assert (code, status) == ("invalid_request", 400)
    assert said in message
    assert PROMPT not in message


def test_what_no_task_takes_is_dropped_and_its_text_stays_out_of_the_log(stand: Pipelines) -> None:
    stand.app.send_task("mimoq.compleet", kwargs={"request": ask()}, queue="mimoq.complete")
    with stand.app.connection_for_write() as connection, connection.Producer() as producer:
        for body, headers in (
            (ask(), {}),
            (ask(), {"task": "mimoq.complete"}),
            ([PROMPT], {"task": "mimoq.ring", "id": 7}),
        ):
            producer.publish(body, routing_key="mimoq.complete", headers=headers, serializer="json")
        producer.publish(
            PROMPT.encode(),
            routing_key="mimoq.complete",
            content_type="application/x-nobody's",
            content_encoding="binary",
        )
    assert stand.complete(ask()).apply_async().get(timeout=WAIT_S)  # behind them
    log = stand.log.read_text()  # type: ignore[attr-defined]  # the fixture's
    assert log.count("a message that no task here takes was dropped") >= 4
    assert "mimoq.compleet" in log
    assert PROMPT not in log


def sent(stand: Pipelines, body: Any, headers: dict[str, Any], **options: Any) -> None:
    """A message as no Celery app would send it."""
    with stand.app.connection_for_write() as connection, connection.Producer() as producer:
        options = {"serializer": "json", **options}
        producer.publish(body, routing_key="mimoq.complete", headers={"task": "mimoq.complete", **headers}, **options)


@pytest.mark.parametrize(
    ("body", "headers", "options"),
    [
        (
            b"\x80",
            {},
            {"content_type": "application/x-python-serialize", "content_encoding": "binary", "serializer": None},
        ),
        (b"{", {}, {"content_type": "application/json", "content_encoding": "utf-8", "serializer": None}),
        ([[ask()], {}, {}], {"expires": "soon"}, {}),
        ([[ask()], {}, {}], {"eta": [1]}, {}),
        ([[], [["request", PROMPT]], {}], {}, {}),
        ([[ask()], None, {}], {}, {}),
        ([{"request": ask()}, {}, {}], {}, {}),
        ([PROMPT, {}, {}], {}, {}),
        ([[ask()], {}, 5], {}, {}),
        ([[ask()]], {}, {}),
    ],
    ids=["pickle", "cut", "expires", "eta", "kwargs", "none", "args", "text", "embed", "short"],
)
def test_a_message_that_can_not_be_read_fails_its_task(
    stand: Pipelines,
    simulator: RunningSimulator,
    body: Any,
    headers: dict[str, Any],
    options: dict[str, Any],
    request: pytest.FixtureRequest,
) -> None:
    task = request.node.callspec.id
    sent(stand, body, {"id": task, **headers}, **options)
    with pytest.raises(RuntimeError) as caught:
        stand.result(task).get(timeout=WAIT_S)
    assert caught.value.args == ("invalid_request", 400, "the message can't be read")
    assert simulator.totals()["calls"] == 0
    assert PROMPT not in stand.log.read_text()  # type: ignore[attr-defined]  # the fixture's


def test_errbacks_and_chords_hear_of_a_message_that_can_not_be_read(stand: Pipelines) -> None:
    part = stand.complete(ask()).set(task_id="unread part", headers={"expires": "soon"})
    part.link_error(stand.mine("note").set(task_id="heard of it"))
    done = chord([stand.mine("ask", "p"), part])(stand.mine("gather"))
    with pytest.raises(ChordError, match="can't be read"):
        stand.result(done.id).get(timeout=WAIT_S)
    assert stand.result("heard of it").get(timeout=WAIT_S)[0] == "unread part"


@pytest.mark.parametrize(
    ("embed", "headers", "said"),
    [
        ({"chain": "abc"}, {}, "chain"),
        ({"chain": [{"task": "t"}]}, {}, "chain"),
        ({"chord": {"x": 1}}, {"group": "g"}, "chord"),
        ({"callbacks": 5}, {}, "callbacks"),
        ({"errbacks": [{"subtask_type": "none", "task": "t", "options": {}}]}, {}, "errbacks"),
        ({}, {"group": 5}, "group"),
        ({}, {"timelimit": 5, "group_index": "first"}, "group_index"),
    ],
)
def test_a_task_whose_signature_can_not_be_meant_is_not_paid_for(
    stand: Pipelines, simulator: RunningSimulator, embed: dict[str, Any], headers: dict[str, Any], said: str
) -> None:
    task = f"signed {embed} {headers}"
    sent(stand, [[ask()], {}, embed], {"id": task, **headers})
    with pytest.raises(RuntimeError) as caught:
        stand.result(task).get(timeout=WAIT_S)
    assert caught.value.args == ("invalid_request", 400, f"the message's {said} can't be read")
    assert simulator.totals()["calls"] == 0


def test_a_ring_with_anything_in_it_is_a_ring(stand: Pipelines) -> None:
    sent(stand, [["b"], {PROMPT: 1, "batch_id": 2}, {}], {"id": "ring", "task": "mimoq.ring"})
    assert stand.complete(ask()).apply_async().get(timeout=WAIT_S)
    log = stand.log.read_text()  # type: ignore[attr-defined]  # the fixture's
    assert PROMPT not in log
    assert "TypeError" not in log


def test_a_message_that_comes_twice_is_paid_for_once(stand: Pipelines, simulator: RunningSimulator) -> None:
    simulator.configure(hold=True)
    for _ in range(2):
        stand.complete(ask()).set(task_id="twice").apply_async()
    simulator.wait_until(lambda totals: totals.in_flight == 1)
    simulator.configure(hold=False)
    response = stand.result("twice").get(timeout=WAIT_S)
    stand.complete(ask()).set(task_id="twice").apply_async()  # and once more behind its end
    assert stand.complete(ask("another")).apply_async().get(timeout=WAIT_S)["id"] != response["id"]
    assert simulator.totals()["paid"] == 2


def test_a_task_whose_job_is_cancelled_or_expires_is_revoked(stand: Pipelines, simulator: RunningSimulator) -> None:
    simulator.configure(hold=True)
    cancelled = stand.complete(ask("0")).apply_async()
    expired = stand.complete(ask("1")).apply_async(expires=1.5)
    simulator.wait_until(lambda totals: totals.in_flight >= 1)
    stand.store.cancel(stand.batch(cancelled.id))
    for result, why in ((cancelled, "cancelled"), (expired, "expired")):
        with pytest.raises(TaskRevokedError, match=why):
            result.get(timeout=WAIT_S)
        assert result.state == "REVOKED"


def test_to_revoke_a_task_that_is_written_down_is_to_cancel_its_job(
    stand: Pipelines, simulator: RunningSimulator
) -> None:
    simulator.configure(hold=True)
    heard = stand.mine("note").set(task_id="heard of revoking")
    parts = [stand.complete(ask(n)).set(task_id=f"chorus {n}") for n in "01"]
    done = chord([parts[0].set(link_error=heard), parts[1]])(stand.mine("gather"))
    simulator.wait_until(lambda totals: totals.in_flight == 2)
    stand.app.control.revoke(["chorus 0", "nobody's"], terminate=True)
    assert stand.result("heard of revoking").get(timeout=WAIT_S)[0] == "chorus 0"
    simulator.configure(hold=False)
    assert stand.result("chorus 1").get(timeout=WAIT_S)
    with pytest.raises(ChordError, match="cancelled"):
        stand.result(done.id).get(timeout=WAIT_S)
    stand.over()
    assert stand.result("chorus 0").state == "REVOKED"
    assert stand.store.status(stand.batch("chorus 0")).cancelled == 1


def test_an_ignored_result_is_not_stored_and_its_chain_goes_on(stand: Pipelines) -> None:
    first = stand.complete(ask()).set(ignore_result=True)
    done = chain(first, stand.mine("text")).apply_async()
    assert isinstance(done.get(timeout=WAIT_S), str)
    stand.over()
    assert stand.app.backend.get(f"celery-task-meta-{done.parent.id}") is None


@contextmanager
def events(stand: Pipelines) -> Iterator[list[dict[str, Any]]]:
    """Every event that anybody sends meanwhile."""
    found: list[dict[str, Any]] = []
    with stand.app.connection_for_read() as connection:
        receiver = stand.app.events.Receiver(connection, handlers={"*": found.append})
        ready = threading.Event()

        def listen() -> None:
            with receiver.consumer_context(wakeup=False):
                ready.set()
                for _ in receiver.consume(limit=None, timeout=None, safety_interval=0.2, wakeup=False):
                    pass

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        ready.wait(10)
        try:
            wait_for(lambda: found, what="a worker's heartbeat: what follows will be heard")
            yield found
        finally:
            receiver.should_stop = True
            thread.join()


def of(found: list[dict[str, Any]], kind: str, task_id: str) -> dict[str, Any]:
    """The event of this kind and task, once it has come."""
    return wait_for(
        lambda: next((event for event in list(found) if event["type"] == kind and event.get("uuid") == task_id), {}),
        what=f"{kind} among {[(event['type'], event.get('uuid')) for event in found]}",
    )


def test_no_event_log_or_remote_control_shows_a_prompt_or_an_answer(
    stand: Pipelines, simulator: RunningSimulator
) -> None:
    simulator.configure(hold=True, triggers={"refuse": "421"})
    with events(stand) as found:
        good = stand.complete(ask()).apply_async()
        bad = stand.complete(ask("refuse")).apply_async()
        wrong = stand.complete({"messages": [PROMPT]}).apply_async()
        simulator.wait_until(lambda totals: totals.in_flight == 1 and totals.calls == 1)
        inspect = stand.app.control.inspect(timeout=2.0)
        seen = [inspect.active(), inspect.reserved(), inspect.query_task(good.id)]
        simulator.configure(hold=False)
        answer = good.get(timeout=WAIT_S)
        received = of(found, "task-received", good.id)
        assert received["kwargs"] == f"endpoint='/v1/chat/completions', model='m', job='{stand.batch(good.id)}-0'"
        of(found, "task-started", good.id)
        succeeded = of(found, "task-succeeded", good.id)
        assert succeeded["result"] == f"{answer['usage']['total_tokens']:,} tokens"
        assert succeeded["runtime"] > 0
        assert of(found, "task-failed", bad.id)["exception"] == "RuntimeError('content_filter', 421)"
        assert "invalid_request" in of(found, "task-failed", wrong.id)["exception"]
    told = json.dumps(found + seen, default=str) + stand.log.read_text()  # type: ignore[attr-defined]  # the fixture's
    assert PROMPT not in told
    assert answer["choices"][0]["message"]["content"][:40] not in told


def test_flower_can_turn_events_on_and_rings_say_what_was_claimed(stand: Pipelines) -> None:
    process = stand.worker(BULK, "bulk")
    try:
        with events(stand) as found:
            assert all("ok" in reply for told in stand.app.control.enable_events(reply=True) for reply in told.values())
            batch_id = submitted(stand)
            wait_for(lambda: stand.store.status(batch_id).state == "finished", what="the end of the batch")
            received = wait_for(
                lambda: [e for e in list(found) if e["type"] == "task-received" and e.get("name") == "mimoq.ring"],
                what="a ring",
            )
            assert received[0]["args"] == f"batch {batch_id}, bulk"
            results = wait_for(
                lambda: [e["result"] for e in list(found) if e["type"] == "task-succeeded" and "bulk" in e["result"]],
                what="what a ring has claimed",
            )
            assert any(text.startswith(("'bulk", "bulk")) for text in results)
    finally:
        process.end()


def submitted(stand: Pipelines) -> str:
    batch_id = stand.store.submit(requests(120), NewBatch()).batch_id
    app = make_app(load_settings(broker_url=stand.broker), "unix:///nowhere")
    Bell(app).ring(batch_id, "bulk", "", 3)
    app.close()
    return batch_id


def test_the_example_runs(stand: Pipelines) -> None:
    variables = {"PIPELINE_BROKER_URL": stand.broker, "PIPELINE_RESULT_BACKEND": stand.backend}
    stand.caller("app", EXAMPLE, "pipeline", **variables)
    ran = subprocess.run(
        [sys.executable, "run.py"],
        cwd=EXAMPLE,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert ran.returncode == 0, ran.stderr
    assert [line.partition(":")[0] for line in ran.stdout.splitlines()] == ["chain", "group", "chord", "refused"]
    assert ran.stdout.splitlines()[-1] == "refused: invalid_request 400"
