"""What Celery sees of a `mimoq.complete` message, what its arguments mean, and what a ring tells."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import Ignore, InvalidTaskError, Reject
from celery.worker import state

from jobs.errors import InvalidRequest, NoRoom
from jobs.requests import CHAT, MESSAGES
from jobs.settings import load_settings
from jobs.singles import Enlisted
from tests.waiting import wait_for
from worker import complete
from worker.complete import NAME, Entry, ShownRequest, asked, batch_of_task, register, shown
from worker.tasks import TOLD_CHARS, RingRequest, told

PROMPT = "a prompt nobody may see"


def message(name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """One as kombu hands it over."""
    headers = {"id": "t1", "task": name, "argsrepr": repr(args), "kwargsrepr": repr(kwargs)}
    return SimpleNamespace(
        headers=headers,
        body=b"",
        payload=(args, kwargs, {}),
        properties={},
        delivery_info={"routing_key": "mimoq.bulk"},
        content_type="application/json",
        content_encoding="utf-8",
    )


@pytest.fixture
def app() -> Celery:
    return Celery("none", set_as_current=False)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ([{"prompt": PROMPT, "model": "m"}], {}),
        ([], {"request": {"prompt": PROMPT, "model": "m"}, "endpoint": MESSAGES}),
        ([PROMPT], {"endpoint": PROMPT}),
        ([{"model": PROMPT}], {PROMPT: 1}),
        ([], {}),
    ],
)
def test_nothing_that_celery_shows_of_a_message_holds_its_prompt(
    app: Celery, args: list[Any], kwargs: dict[str, Any]
) -> None:
    given = message(NAME, args, kwargs)
    request = ShownRequest(given, app=app, task=SimpleNamespace(ignore_result=False))
    seen = [repr(request), str(request), request.info(), request.info(safe=True), request.argsrepr, request.kwargsrepr]
    seen += [request.request_dict["argsrepr"], request.request_dict["kwargsrepr"]]
    assert PROMPT not in str(seen)
    assert f"job='{batch_of_task('t1')}-0'" in request.kwargsrepr
    assert request.kwargs == kwargs, "the task itself gets them"


def test_what_is_shown_tells_endpoint_and_model() -> None:
    assert shown("t", [{"model": "m"}], {}).startswith(f"endpoint='{CHAT}', model='m', job='")


def test_a_ring_shows_its_batch_and_lane(app: Celery) -> None:
    request = RingRequest(message("mimoq.ring", ["abc"], {}), app=app, task=SimpleNamespace(ignore_result=True))
    assert request.argsrepr == "batch abc, bulk"


def test_a_ring_tells_what_it_has_claimed() -> None:
    places = [("a", n) for n in (2, 0, 1, 7)] + [("b", 5)]
    assert told("bulk", places) == "bulk a: 0-2, 7; b: 5"
    assert told("interactive", []) == "interactive nothing"
    assert len(told("bulk", [("a", 2 * n) for n in range(500)])) == TOLD_CHARS


def test_a_request_may_come_by_place_or_by_name() -> None:
    by_place = asked([{"prompt": "p"}, MESSAGES], {"max_attempts": 2, "deadline_s": 5}, "m")
    by_name = asked([], {"request": {"prompt": "p"}, "endpoint": MESSAGES, "max_attempts": 2, "deadline_s": 5}, "m")
    assert by_place == by_name
    assert (by_place.request.endpoint, by_place.max_attempts, by_place.deadline_s) == (MESSAGES, 2, 5)
    assert asked(["p"], {"custom_id": "c"}, "m").request.custom_id == "c"


@pytest.mark.parametrize(
    "kwargs",
    [{"deadline_s": float("nan")}, {"deadline_s": "1"}, {"max_attempts": 0}, {"custom_id": 7}, {"endpoint": []}],
)
def test_an_argument_that_can_not_be_meant_is_refused(kwargs: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        asked([{"prompt": "p"}], kwargs, "m")
    with pytest.raises(InvalidRequest):
        asked([{"prompt": "p"}, CHAT, None, None, None, None], {}, "m")


def test_a_task_has_the_same_batch_wherever_its_message_comes() -> None:
    assert batch_of_task("t1") == batch_of_task("t1") != batch_of_task("t2")
    assert len(batch_of_task("t1")) == 24


@pytest.mark.parametrize(
    "payload",
    [({"request": PROMPT}, {}, {}), (PROMPT, {}, {}), ([], [], {}), ([], None, {}), ([], {}, 5), (None, {}, {})],
)
def test_arguments_that_are_none_are_no_request(app: Celery, payload: Any) -> None:
    given = message(NAME, [], {})
    given.payload = payload
    with pytest.raises(InvalidTaskError) as caught:
        ShownRequest(given, app=app, task=SimpleNamespace(ignore_result=False))
    assert PROMPT not in str(caught.value)


class Desk:
    """An entry whose store takes everything."""

    def __init__(self) -> None:
        self.cancelled: list[str] = []

    def single(self, *_: Any) -> Any:
        return None

    def enlist(self, _: Any) -> bool:
        return True

    def cancel(self, task_id: str) -> None:
        self.cancelled.append(task_id)


def test_a_task_revoked_while_it_waits_to_be_written_down_is_cancelled_then(app: Celery) -> None:
    desk = Desk()
    task = register(app, lambda: desk)  # type: ignore[arg-type,return-value]  # as much of one as it asks for
    state.revoked.add("revoked while it waits")
    for name in ("another", "revoked while it waits"):
        task.push_request(id=name)
        with pytest.raises(Ignore):
            task.run()
        task.pop_request()
    assert desk.cancelled == ["revoked while it waits"]


def entry(rings: list[int], stopping: bool = False) -> Entry:
    """One whose store is left to the test."""
    store: Any = SimpleNamespace(client=None, backend=None)
    return Entry(store, load_settings(), lambda: rings.append(1), lambda: stopping)


def test_what_comes_while_the_store_is_asked_is_written_down_together(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go = threading.Event(), threading.Event()
    asked_for: list[list[Any]] = []

    def enlist(_: Any, singles: list[Any], *__: Any) -> list[Any]:
        asked_for.append(singles)
        begun.set()
        assert go.wait(20)
        return [Enlisted(single, single != "again", 0.0) for single in singles]

    monkeypatch.setattr(complete, "enlist", enlist)
    rings: list[int] = []
    desk = entry(rings)
    created: dict[Any, bool] = {}

    def come(single: Any) -> None:
        created[single] = desk.enlist(single)

    threads = [threading.Thread(target=come, args=(single,)) for single in ("first", "second", "again", "fourth")]
    threads[0].start()
    assert begun.wait(20)
    for thread in threads[1:]:
        thread.start()
    wait_for(lambda: len(desk._waiting) == 4, what="all of them")
    go.set()
    for thread in threads:
        thread.join(20)
    assert [len(singles) for singles in asked_for] == [1, 3]
    assert created == {"first": True, "second": True, "again": False, "fourth": True}
    assert len(rings) == 2
    assert not desk._waiting


def test_a_store_without_room_is_asked_again_and_what_it_takes_is_rung_for(monkeypatch: pytest.MonkeyPatch) -> None:
    replies: list[Any] = [NoRoom("no"), Enlisted("b", True, 0.0)]
    monkeypatch.setattr(complete, "enlist", lambda *_: [replies.pop(0)])
    monkeypatch.setattr(complete, "RETRY_S", 0.0)
    rings: list[int] = []
    single: Any = "one"
    assert entry(rings).enlist(single)
    assert rings == [1]
    stopped = entry(rings, stopping=True)
    with pytest.raises(Reject):
        stopped.enlist(single)
    assert not stopped._waiting, "nobody else writes down what goes back to the broker"
