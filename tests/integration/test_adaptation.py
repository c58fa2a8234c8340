"""What outcomes teach the limiter: the table of adapt.lua by itself, then window, gates and rate through the scripts."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from jobs import keys
from jobs.connections import connect
from jobs.gates import open_gate
from jobs.scripts import source
from tests.integration.limiter_stand import MODEL, Driven
from worker.limiter import Reservation, Settlement

DOCS = Path(__file__).parents[2] / "docs" / "limits.md"
GLUE = """
local rec = cjson.decode(ARGV[1])
for _, outcome in ipairs(cjson.decode(ARGV[2])) do
  local account = next_account({}, outcome)
  if account then next_account(rec, outcome) else next_record(rec, outcome) end
end
return cjson.encode(rec)
"""
ROWS = """
local rows = {}
for _, table_ in ipairs({NEXT, ACCOUNT}) do
  for _, row in ipairs(table_) do rows[#rows + 1] = {row[1], row[2], row[3]} end
end
return cjson.encode(rows)
"""


class Table:
    """adapt.lua, without scripts, clock or keys."""

    def __init__(self, url: str) -> None:
        self._client: Any = connect(url)

    def next(self, record: dict[str, Any], *outcomes: dict[str, Any]) -> dict[str, Any]:
        """The record after these outcomes, each at 1,000 s, of a call of 999 s, one of 16 in flight, unless it says so."""
        usual = {"at": 999, "now": 1000, "flying": 16, "left": 15, "status": "", "given": False, "minute": 0}
        given = json.dumps([usual | outcome for outcome in outcomes])
        after = self._client.eval(source("worker", "adapt") + GLUE, 0, json.dumps(record), given)
        found: dict[str, Any] = json.loads(after)
        return found

    def rows(self) -> list[list[str]]:
        found: list[list[str]] = json.loads(self._client.eval(source("worker", "adapt") + ROWS, 0))
        return found

    def close(self) -> None:
        self._client.close()


@pytest.fixture
def table(store_url: str) -> Any:
    table = Table(store_url)
    yield table
    table.close()


SHUT = {
    "window": 40,
    "gate_reason": "outage",
    "gate_status": "503",
    "gate_since": 990,
    "gate_until": 1001,
    "gate_step_s": 2,
}


def test_the_docs_hold_the_table(table: Table) -> None:
    lines = [line for line in DOCS.read_text().splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    for row in table.rows():
        assert row in rows


@pytest.mark.parametrize(
    ("record", "outcome", "after"),
    [
        # clean
        ({}, {"what": "clean"}, {"window": 17}),
        ({"window": 40}, {"what": "clean"}, {"window": 40}),  # hardly used
        ({"window": 20, "thresh": 20}, {"what": "clean"}, {"window": 20.005}),
        ({"window": 20, "thresh": 21}, {"what": "clean"}, {"window": 21}),
        ({"fails": 9}, {"what": "clean"}, {"fails": 0}),
        ({"cut_at": 990, "repeats": 2}, {"what": "clean"}, {"repeats": 0}),
        ({"cut_at": 999.5, "repeats": 2}, {"what": "clean"}, {"repeats": 2}),
        # refused, and the round's size is known
        # By chance perhaps, while nothing is known; not the second one, nor where a limit was met before.
        ({"window": 16}, {"what": "refused"}, {"window": 14, "thresh": None, "cut_at": 1000, "repeats": 1}),
        ({"window": 16, "thresh": 16}, {"what": "refused"}, {"window": 14, "thresh": 15, "cut_at": 1000, "repeats": 1}),
        (
            {"window": 98, "cut_at": 999.5, "cut_n": 100, "cut_r": 1, "cut_w": 1, "repeats": 1},
            {"what": "refused"},
            {"window": 97, "thresh": None},
        ),
        (
            {"window": 97, "cut_at": 999.5, "cut_n": 100, "cut_r": 2, "cut_w": 1, "repeats": 1},
            {"what": "refused"},
            {"window": 96, "thresh": 97},
        ),
        ({"window": 64}, {"what": "refused"}, {"window": 64, "thresh": None, "repeats": 1}),  # not what met a limit
        (
            {"window": 13, "cut_at": 999.5, "cut_n": 16, "cut_r": 2, "cut_w": 1, "repeats": 1},
            {"what": "refused"},
            {"window": 12, "cut_r": 3, "repeats": 1},
        ),
        ({"window": 1}, {"what": "refused", "flying": 1}, {"window": 1}),
        (
            {"window": 8, "cut_at": 990, "repeats": 2},
            {"what": "refused"},
            {"gate_reason": "refused", "gate_until": 1001},
        ),
        (
            {"window": 13, "cut_at": 999.5, "cut_n": 9, "cut_r": 4, "cut_w": 1, "repeats": 1},
            {"what": "refused"},
            {"gate_reason": "refused", "gate_step_s": 2},
        ),
        # Retry-After
        ({}, {"what": "failed", "asked": 7.5, "status": "503"}, {"gate_reason": "retry_after", "gate_until": 1007.5}),
        ({}, {"what": "refused", "asked": 3}, {"gate_until": 1003, "window": 14}),
        (SHUT, {"what": "failed", "asked": 0.5}, {"gate_reason": "outage", "gate_until": 1001}),
        (SHUT, {"what": "failed", "asked": 60}, {"gate_reason": "retry_after", "gate_until": 1060, "gate_since": 990}),
        (SHUT, {"what": "refused", "asked": 60, "at": 980}, {"gate_until": 1060}),  # from before the gate shut, too
        ({}, {"what": "clean", "asked": 60}, {"gate_reason": None}),
        ({**SHUT, "gate_reason": "retry_after"}, {"what": "clean"}, {"gate_reason": "retry_after", "gate_until": 1001}),
        ({}, {"what": "refused", "asked": 3, "flying": 1}, {"window": 16, "thresh": None}),  # nothing was carried
        (
            {"window": 1, "former": 40, "ramp": 1},
            {"what": "refused", "flying": 1},
            {"window": 1, "former": 40, "ramp": 1},
        ),
        ({"window": 2.02, "thresh": 1}, {"what": "clean", "flying": 1}, {"window": 2.02 + 0.1 / 2.02}),
        # outage
        ({"fails": 8}, {"what": "failed"}, {"fails": 9, "gate_reason": None}),
        (
            {"fails": 9},
            {"what": "failed", "status": "503"},
            {"gate_reason": "outage", "gate_status": "503", "gate_until": 1001},
        ),
        ({"fails": 9}, {"what": "failed again"}, {"fails": 9, "gate_reason": None}),
        ({"fails": 9}, {"what": "unreachable"}, {"gate_reason": "outage"}),
        ({"fails": 9, "opened_at": 999.5}, {"what": "failed"}, {"fails": 9}),  # called before the gate opened
        (SHUT, {"what": "failed"}, SHUT),
        (SHUT, {"what": "refused"}, SHUT),
        (SHUT, {"what": "unreachable"}, SHUT),
        # and its end
        (SHUT, {"what": "clean", "at": 980}, SHUT),
        (SHUT, {"what": "clean", "left": 0}, {"gate_reason": None, "window": 1, "former": 40, "opened_at": 1000}),
        (SHUT, {"what": "clean", "left": 30}, {"window": 31, "former": 40}),
        ({"window": 3, "former": 4, "ramp": 1, "ramp_at": 999.9}, {"what": "clean"}, {"window": 4, "former": None}),
        # the account's
        (
            {},
            {"what": "key_refused", "status": "401"},
            {"gate_reason": "key_refused", "gate_until": 1000.5, "gate_refused_at": 1000},
        ),
        ({}, {"what": "payment_required", "asked": 30}, {"gate_reason": "payment_required", "gate_until": 1030}),
        (
            SHUT,
            {"what": "forbidden", "status": "403"},
            {"gate_reason": "forbidden", "gate_status": "403", "gate_until": 1001},
        ),
        # the rate
        (
            {"met_at": 900, "met_n": 98, "met_same": 1},
            {"what": "refused", "asked": 9, "minute": 100},
            {"rate": 1.5, "ceiling": 100 / 60},
        ),
        (
            {"met_at": 900, "met_n": 90, "met_same": 1},
            {"what": "refused", "asked": 9, "minute": 100},
            {"rate": None, "met_n": 100},
        ),
        (
            {"met_at": 995, "met_n": 98, "met_same": 1},
            {"what": "refused", "asked": 9, "minute": 100},
            {"rate": None, "met_at": 995},
        ),
        (
            {"met_at": 900, "met_n": 98, "met_same": 1},
            {"what": "refused", "asked": 9, "minute": 100, "given": True},
            {"rate": None},
        ),
        ({"met_at": 900, "met_n": 98, "met_same": 1}, {"what": "failed", "asked": 9, "minute": 100}, {"rate": None}),
        ({"rate": 1.5, "ceiling": 2, "grown_at": 999}, {"what": "clean"}, {"rate": 1.5 * 2 ** (1 / 60)}),
        ({"rate": 1.9, "ceiling": 2, "grown_at": 999.5}, {"what": "clean"}, {"rate": 1.9 * 1.05 ** (0.5 / 60)}),
    ],
)
def test_the_table(table: Table, record: dict[str, Any], outcome: dict[str, Any], after: dict[str, Any]) -> None:
    found = table.next(record, outcome)
    for name, value in after.items():
        got = found.get(name)
        assert got == (pytest.approx(value, rel=1e-3) if isinstance(value, float) else value), name


# -- the window


def round_of(driven: Driven, limit: int, latency: float = 1.0) -> tuple[int, int]:
    """A round against an upstream that carries so many calls: how many went, how many were refused."""
    went = driven.reserve(*[1] * 500).reservations
    driven.now += 0.01
    driven.settle_all(went[limit:], "refused")
    driven.now += latency
    driven.settle_all(went[:limit])
    return len(went), max(0, len(went) - limit)


def test_the_window_starts_at_16_and_doubles_each_clean_round(store_url: str) -> None:
    with Driven(store_url) as driven:
        sizes = []
        for _ in range(4):
            sizes.append(round_of(driven, 10_000)[0])
        assert sizes == [16, 32, 64, 128]


@pytest.mark.parametrize("after", [None, 1.0])
def test_a_refusal_by_chance_does_not_end_the_first_doubling(store_url: str, after: float | None) -> None:
    with Driven(store_url) as driven:
        first, *others = driven.reserve(*[1] * 500).reservations
        driven.settle_all([first], "refused", after=after)
        driven.settle_all(others)
        began = driven.now
        while driven.window() < 400 and driven.now - began < 60:
            driven.now += 0.2
            driven.settle_all(driven.reserve(*[1] * 500))
        assert driven.now - began < 5


def test_doubling_back_meets_a_small_limit_with_no_more_than_twice_as_many(store_url: str) -> None:
    """Answers and the time that passes count for one doubling, not for two."""
    with Driven(store_url) as driven:
        round_of(driven, 3)
        assert driven.record()["gate_reason"] == "refused"
        rounds = [round_of(driven, 3) for _ in range(10)]
        assert max(went for went, _ in rounds) <= 6
        assert sum(went - refused for went, refused in rounds[5:]) > 5 * 2


def test_a_window_that_is_not_used_does_not_grow(store_url: str) -> None:
    with Driven(store_url) as driven:
        for _ in range(50):
            driven.settle_all(driven.reserve(1))
        assert driven.window() == 16


@pytest.mark.parametrize("limit", [37, 3, 63, 200])
def test_an_unpublished_limit_of_calls_in_flight_is_learned(store_url: str, limit: int) -> None:
    with Driven(store_url) as driven:
        for _ in range(10):
            round_of(driven, limit)
        went = refused = 0
        for _ in range(300):
            more, lost = round_of(driven, limit)
            went, refused = went + more, refused + lost
        assert went / 300 >= 0.9 * limit if limit > 10 else went / 300 >= limit - 2
        assert refused / went < 0.01 if limit > 10 else refused < 40


@pytest.mark.parametrize("latencies", [(1.0, 3.0), (2.0, 9.0)])
def test_such_a_limit_is_learned_too_where_calls_end_one_by_one_and_refusals_come_at_once(
    store_url: str, latencies: tuple[float, float]
) -> None:
    """The window, one wider with each answer, meets the limit with a single call, time and again."""
    limit, rng = 37, random.Random(7)
    served: list[int] = []
    shut = 0
    with Driven(store_url) as driven:
        calls: list[tuple[float, str, Reservation]] = []
        began = driven.now
        while driven.now < began + 160:
            over = [call for call in calls if call[0] <= driven.now]
            calls = [call for call in calls if call[0] > driven.now]
            for what in ("clean", "refused"):
                if ended := [item for _, came, item in over if came == what]:
                    driven.settle_all(ended, what)
            flying = sum(came == "clean" for _, came, _ in calls)
            for item in driven.reserve(*[1] * 100).reservations:
                flying += (good := flying < limit)
                ends = driven.now + (rng.uniform(*latencies) if good else 0.004)
                calls.append((ends, "clean" if good else "refused", item))
            if driven.now > began + 80:
                served.append(flying)
                shut += "gate_reason" in driven.record()
            driven.now += min(min((end for end, _, _ in calls), default=9e9) - driven.now, 0.1) + 1e-6
        assert sum(served) / len(served) >= 0.95 * limit
        assert not shut


# -- gates


def test_retry_after_shuts_the_model_for_everybody_and_one_call_goes_first(store_url: str) -> None:
    with Driven(store_url) as driven:
        for _ in range(2):
            driven.settle_all(driven.reserve(*[1] * 500))
        before = driven.window()
        first, second, third = driven.reserve(1, 1, 1).reservations
        driven.settle(Settlement(first, "failed", 0, 7.5, 503))
        driven.settle(Settlement(second, "failed", 0, 2.0, 503), Settlement(third, "clean", 0))
        for _ in range(3):
            shut = driven.reserve(1, who="another")
            assert (shut.reservations, shut.bound, shut.shut) == ([], "retry_after", "model")
            driven.now += 2
        assert shut.ask_again_s == pytest.approx(3.5, abs=0.01)
        driven.now += shut.ask_again_s - 2 + 0.001
        probe = driven.reserve(*[1] * 500, lane="interactive")
        assert len(probe.reservations) == 1
        # The answer may take long; that no refusal came is worth as much.
        sizes = []
        for _ in range(6):
            driven.now += 1.01
            sizes.append(len(driven.reserve(*[1] * 500, lane="interactive").reservations))
        assert sizes == [1, 2, 4, 8, 16, 32]
        assert driven.window() == before == 64


def test_what_was_asked_for_holds_even_when_its_reservation_has_run_out(store_url: str) -> None:
    with Driven(store_url) as driven:
        item = driven.reserve(1).reservations[0]
        driven.now += 20
        driven.reserve()
        driven.settle(Settlement(item, "refused", 0, 30.0, 429))
        assert driven.reserve(1).bound == "retry_after"


@pytest.mark.parametrize(("status", "reason"), [(401, "key_refused"), (402, "payment_required"), (403, "forbidden")])
def test_a_refused_account_is_probed_one_call_a_step(store_url: str, status: int, reason: str) -> None:
    with Driven(store_url) as driven:
        grant = driven.reserve(*[1] * 5)
        last = grant.reservations.pop()
        driven.settle(*(Settlement(item, reason, 0, None, status) for item in grant.reservations))
        assert (driven.gate()["reason"], driven.gate()["status"]) == (reason, str(status))
        steps = []
        for _ in range(8):
            shut = driven.reserve(1, 1)
            assert (shut.reservations, shut.bound, shut.shut) == ([], reason, "account")
            steps.append(round(shut.ask_again_s, 1))
            driven.now += shut.ask_again_s - 0.01
            assert driven.reserve(1).shut == "account"
            driven.now += 0.02
            probe = driven.reserve(1, 1, 1)
            assert [item.probe for item in probe.reservations] == [True]
            driven.settle(Settlement(probe.reservations[0], reason, 0, None, status))
        assert steps == [0.5, 1, 2, 4, 8, 16, 32, 60]
        driven.settle(Settlement(last, "clean", 0))
        assert driven.reserve(1).shut == "account", "an answer to a call from before says nothing"
        assert not driven.reserve(1, model="another").reservations, "the gate is the account's"
        open_gate(driven.client, "account")
        probe = driven.reserve(1, 1)
        assert [item.probe for item in probe.reservations] == [True], "opened by hand: one call goes"
        driven.now += 0.5
        driven.settle(Settlement(probe.reservations[0], "clean", 0, None, 200))
        assert len(driven.reserve(1, 1).reservations) == 2, "a clean answer opens the account"
        assert not driven.gate()


def test_a_pause_that_was_asked_for_with_a_402_is_kept(store_url: str) -> None:
    with Driven(store_url) as driven:
        first, other = driven.reserve(1, 1).reservations
        driven.now += 0.05
        late = driven.reserve(1).reservations[0]
        driven.settle(Settlement(first, "payment_required", 0, 30.0, 402))
        driven.now += 0.01
        driven.settle(Settlement(other, "clean", 0, None, 200), Settlement(late, "clean", 0, None, 200))
        open_gate(driven.client, "account")
        shut = driven.reserve(1)
        assert shut.bound == "payment_required"
        assert shut.ask_again_s == pytest.approx(29.99, abs=0.01)
        driven.now += 30
        assert driven.reserve(1).reservations


def test_a_minute_that_is_used_up_leaves_the_window_as_it_was(store_url: str) -> None:
    with Driven(store_url) as driven:
        for _ in range(3):
            round_of(driven, 1000)
        before = driven.window()
        for _ in range(2):
            driven.settle_all(driven.reserve(*[1] * 500), "refused", after=1.0)
            driven.now += 1.1
        for _ in range(20):
            round_of(driven, 1000, 0.2)
        assert driven.window() >= before


def test_a_call_let_through_ahead_does_not_end_a_pause_that_was_asked_for(store_url: str) -> None:
    with Driven(store_url, rpm=6000) as driven:
        driven.open_window()
        grant = driven.reserve(*[1] * 20)
        ahead = next(item for item in driven.reserve(*[1] * 60, who="another").reservations if item.delay_s > 0.05)
        driven.now += 0.02
        driven.settle(Settlement(grant.reservations[0], "refused", 0, 30.0, 429))
        driven.now += 0.1
        driven.settle(Settlement(ahead, "clean", 0))
        assert driven.reserve(1).bound == "retry_after"


def test_a_probe_that_could_not_be_granted_is_not_lost(store_url: str) -> None:
    with Driven(store_url, max_in_flight=1) as driven:
        item = driven.reserve(1).reservations[0]
        driven.settle(Settlement(item, "key_refused", 0, None, 401))
        driven.now += 0.51
        driven.client.zadd(keys.flight("interactive", "account", MODEL), {"i.other.1": driven.now + 9})
        assert driven.reserve(1).bound == "concurrency"
        driven.client.delete(keys.flight("interactive", "account", MODEL))
        assert len(driven.reserve(1).reservations) == 1, "the probe waited for its place"
        assert driven.reserve(1).shut == "account"


def test_an_outage_lets_a_call_through_at_times_until_one_is_answered(store_url: str) -> None:
    with Driven(store_url) as driven:
        for _ in range(3):
            driven.settle_all(driven.reserve(*[1] * 500))
        held = driven.reserve(*[1] * 500).reservations
        driven.now += 0.1
        driven.settle(*(Settlement(item, "failed", 0, None, 503) for item in held))
        calls, began = 0, driven.now
        while driven.now < began + 60:
            grant = driven.reserve(*[1] * 50)
            calls += len(grant.reservations)
            driven.now += max(0.01, min(grant.ask_again_s, 0.25))
            driven.settle_all(grant, "unreachable")
        assert grant.bound == "outage"
        assert 10 < calls < 20
        while not (probe := driven.reserve(1)).reservations:
            driven.now += probe.ask_again_s
        driven.settle_all(probe)
        rounds = 0
        while driven.window() < 117:
            driven.now += 0.2
            driven.settle_all(driven.reserve(*[1] * 500))
            rounds += 1
        assert rounds <= 8, "it doubles back to its former size"


def test_a_jobs_own_failures_are_no_outage(store_url: str) -> None:
    with Driven(store_url) as driven:
        for _ in range(30):
            driven.settle_all(driven.reserve(1), "failed again")
        assert driven.reserve(1).shut == ""


def test_an_upstream_that_refuses_all_is_left_alone(store_url: str) -> None:
    with Driven(store_url) as driven:
        calls, began = 0, driven.now
        while driven.now < began + 600:
            grant = driven.reserve(*[1] * 50)
            calls += len(grant.reservations)
            driven.now += max(0.01, min(grant.ask_again_s, 1))
            driven.settle_all(grant, "refused")
        assert grant.bound == "refused"
        assert calls < 15 + 3 + 20


# -- the rate


def test_a_rate_limit_that_nobody_told_is_learned(store_url: str) -> None:
    limit, latency = 120, 0.2
    with Driven(store_url) as driven:
        admitted: list[float] = []
        refused: list[float] = []
        began = driven.now
        while driven.now < began + 900:
            grant = driven.reserve(*[1] * 50)
            good: list[Reservation] = []
            bad: list[Reservation] = []
            for item in grant.reservations:
                at = item.at_ms / 1000
                admitted = [before for before in admitted if before > at - 60]
                (good if len(admitted) < limit else bad).append(item)
                if len(admitted) < limit:
                    admitted.append(at)
                else:
                    refused.append(at)
            wait = round(admitted[0] + 60 - driven.now, 3) if bad else 0
            driven.settle_all(bad, "refused", after=wait)
            driven.now += max(latency, min(grant.ask_again_s, 1))
            driven.settle_all(good)
            if driven.now > began + 840:
                assert len(admitted) > 0.8 * limit
        late = [at for at in refused if at > began + 300]
        assert len(late) <= 12, "in ten minutes"
        assert 0.8 * limit / 60 < float(driven.record()["rate"]) < 1.2 * limit / 60


def test_limits_that_headers_tell_are_kept(store_url: str) -> None:
    with Driven(store_url) as driven:
        first = driven.reserve(1)
        at_ms = first.reservations[0].at_ms
        driven.settle(Settlement(first.reservations[0], "clean", 0), told=f"{at_ms},120,119,0.5,10000,9000,1")
        count, began = 0, driven.now
        while driven.now < began + 60:
            grant = driven.reserve(*[1] * 50)
            count += len(grant.reservations)
            driven.settle_all(grant)
            driven.now += max(0.01, min(grant.ask_again_s, 1))
        assert 0.97 * 120 <= count <= 120
        item = driven.reserve(1).reservations or [first.reservations[0]]
        driven.settle(Settlement(item[0], "clean", 0), told=f"{round(driven.now * 1000)},120,0,20,10000,9000,1")
        held = driven.reserve(1)
        assert held.bound == "requests"
        assert held.ask_again_s == pytest.approx(20, abs=0.2)


@pytest.mark.parametrize("tokens", [50, 5_000])
def test_a_token_limit_that_headers_tell_is_kept(store_url: str, tokens: int) -> None:
    with Driven(store_url) as driven:
        first = driven.reserve(1)
        at_ms = first.reservations[0].at_ms
        driven.settle(Settlement(first.reservations[0], "clean", 0), told=f"{at_ms},,,,10000,,")
        used, began = 0, driven.now
        while driven.now < began + 60:
            grant = driven.reserve(*[tokens] * 5)
            used += tokens * len(grant.reservations)
            driven.settle_all(grant)
            driven.now += max(0.01, min(grant.ask_again_s, 1))
        assert (9_000 if tokens < 100 else 5_000) <= used <= 10_000
