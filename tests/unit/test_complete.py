"""What Celery sees of a `mimoq.complete` message, what its arguments mean, and what a ring tells."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery

from jobs.errors import InvalidRequest
from jobs.requests import CHAT, MESSAGES
from worker.complete import NAME, ShownRequest, asked, batch_of_task, shown
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
