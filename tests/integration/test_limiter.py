"""The limiter's scripts against a real Valkey: rates, concurrency, lanes, reservations of the dead."""

from __future__ import annotations

import asyncio
import math
import random
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from jobs import keys, leases
from jobs.connections import connect_async
from jobs.settings import Settings
from tests.integration.limiter_stand import MODEL, Driven, most_in_a_minute
from worker.limiter import RESERVATION_S, SETTLE, Limiter, Reservation, Settlement

relaxed = settings(
    max_examples=12,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],  # to shrink a walk of minutes takes minutes
    suppress_health_check=list(HealthCheck),
)
#: Seconds that a call may be late, and is started all the same.
LATE_S = 0.5


def starts_of(reservations: list[Reservation], amount: int = 1) -> list[tuple[float, int]]:
    return [(item.at_ms / 1000, amount) for item in reservations]


# -- requests a minute


@pytest.mark.parametrize("rpm", [1, 2, 10, 100, 900])
def test_no_sliding_minute_holds_more_than_the_limit(store_url: str, rpm: int) -> None:
    @relaxed
    @given(data=st.data())
    def walk(data: st.DataObject) -> None:
        with Driven(store_url, rpm=rpm) as driven:
            driven.open_window()
            starts: list[tuple[float, int]] = []
            for _ in range(data.draw(st.integers(1, 60))):
                grant = driven.reserve(*[1] * data.draw(st.integers(1, max(2, rpm // 4))))
                used = grant.reservations
                if data.draw(st.booleans()):
                    unused = used[data.draw(st.integers(0, len(used))) :]
                    driven.settle_all(unused, "unused")
                    used = used[: len(used) - len(unused)]
                late = data.draw(st.floats(0, LATE_S - 0.01))
                starts += [(at + late, 1) for at, _ in starts_of(used)]
                driven.settle_all(used)
                step = data.draw(
                    st.one_of(st.just(grant.ask_again_s), st.floats(0.0005, 2.0), st.floats(0, 90.0 / math.sqrt(rpm)))
                )
                driven.now += max(step, 0.0005)
            assert most_in_a_minute(starts) <= rpm

    walk()


@pytest.mark.parametrize("rpm", [1, 2, 10, 100, 900])
def test_a_busy_queue_uses_the_limit_and_never_more(store_url: str, rpm: int) -> None:
    with Driven(store_url, rpm=rpm) as driven:
        driven.open_window()
        starts: list[tuple[float, int]] = []
        start = driven.now
        seconds = 150 if rpm > 100 else 300
        while driven.now < start + seconds:
            grant = driven.reserve(*[1] * 20)
            starts += starts_of(grant.reservations)
            driven.settle_all(grant)
            driven.now += max(grant.ask_again_s, 0.001) + (0.05 if rpm > 100 else 0)
            if grant.bound:
                assert grant.bound == "requests"
        assert most_in_a_minute(starts) <= rpm
        assert len(starts) >= 0.98 * rpm * seconds / 60


def test_nothing_is_granted_further_ahead_than_100_ms(store_url: str) -> None:
    with Driven(store_url, rpm=900) as driven:
        driven.open_window()
        grant = driven.reserve(*[1] * 50)
        delays = [item.delay_s for item in grant.reservations]
        assert delays == sorted(delays)
        assert delays[-1] <= 0.101
        assert len(delays) < 50
        assert grant.ask_again_s > 0
        driven.now += grant.ask_again_s
        assert driven.reserve(1).reservations, "asked again when it was told to"


def test_an_unused_reservation_gives_its_request_and_tokens_back(store_url: str) -> None:
    with Driven(store_url, rpm=1, tpm=100_000) as driven:
        first = driven.reserve(700)
        assert not driven.reserve(1).reservations
        assert driven.settle_all(first, "unused", 700) == 1
        assert driven.flying() == 0
        assert driven.reserve(1000).reservations


# -- tokens a minute


@pytest.mark.parametrize("size", [100, 2_000, 30_000])
def test_tokens_of_any_sliding_minute_stay_within_the_limit_and_use_it(store_url: str, size: int) -> None:
    with Driven(store_url, tpm=90_000) as driven:
        driven.open_window()
        starts: list[tuple[float, int]] = []
        start, index = driven.now, 0
        seconds = 130 if size < 1000 else 300
        while driven.now < start + seconds:
            index += 1
            actual = size // 2 + index * 37 % size
            grant = driven.reserve(round(1.2 * size))
            for item in grant.reservations:
                starts.append((item.at_ms / 1000, actual))
                driven.settle(Settlement(item, "clean", round(1.2 * size) - actual))
            driven.now += max(min(grant.ask_again_s, 1), 0.001)
        # An estimate that was too low can't be taken back: by so much it may be over for a moment.
        assert most_in_a_minute(starts) <= 90_000 + 0.3 * size
        assert (
            sum(amount for _, amount in starts)
            >= (0.97 if size < 1000 else 0.93 if size < 10_000 else 0.5) * 1500 * seconds
        )


def test_actual_usage_corrects_the_token_bucket(store_url: str) -> None:
    with Driven(store_url, tpm=60_000) as driven:
        dear = driven.reserve(500)
        driven.settle(Settlement(dear.reservations[0], "clean", -5_000))
        owing = driven.reserve(100)
        assert (owing.reservations, owing.bound) == ([], "tokens")
        assert owing.ask_again_s == pytest.approx(5_000 / 1000 - 0.1, rel=0.02)
        driven.now += owing.ask_again_s + 0.2
        cheap = driven.reserve(100)
        driven.settle(Settlement(cheap.reservations[0], "clean", 600))
        driven.now += 0.001
        assert driven.reserve(600).reservations, "what was not used is there again"


def test_a_request_larger_than_a_minute_goes_alone(store_url: str) -> None:
    with Driven(store_url, tpm=10_000) as driven:
        driven.open_window()
        starts = starts_of(driven.reserve(90).reservations)
        waited = driven.now
        for _ in range(1000):
            grant = driven.reserve(50_000, who="giant")
            if grant.reservations:
                break
            assert grant.bound == "tokens"
            assert not driven.reserve(90, who="small").reservations, "nobody overtakes it"
            driven.now += min(grant.ask_again_s, 1)
        assert grant.reservations
        assert driven.now - waited < 65
        at = grant.reservations[0].at_ms / 1000
        assert all(at - before > 60 for before, _ in starts)
        for _ in range(1000):
            later = driven.reserve(90, who="small")
            if later.reservations:
                break
            driven.now += min(later.ask_again_s, 1)
        assert 60 < later.reservations[0].at_ms / 1000 - at < 63, "and nothing goes beside it"


def test_the_place_of_one_that_saved_up_and_died_is_free_soon(store_url: str) -> None:
    with Driven(store_url, tpm=10_000) as driven:
        assert not driven.reserve(9_000, who="dead").reservations
        assert not driven.reserve(50, who="living").reservations
        driven.now += 2.1
        assert driven.reserve(50, who="living").reservations


# -- concurrency, window


@relaxed
@given(data=st.data(), cap=st.one_of(st.none(), st.integers(1, 40)))
def _concurrency(url: str, data: st.DataObject, cap: int | None) -> None:
    with Driven(url, **({} if cap is None else {"max_in_flight": cap})) as driven:
        flying: dict[str, list[Reservation]] = {"bulk": [], "interactive": []}
        refused: set[str] = set()
        window = 16
        answering = data.draw(st.booleans())
        if answering:
            driven.answering()
        for _ in range(data.draw(st.integers(1, 30))):
            lane = data.draw(st.sampled_from(["bulk", "bulk", "interactive"]))
            grant = driven.reserve(*[1] * data.draw(st.integers(1, 30)), lane=lane)
            flying[lane] += grant.reservations
            most = min(window, cap or 10**9)
            bulks = max(1, most - max(1, most // 20)) if answering else most
            assert all(len(items) == driven.flying(lane) for lane, items in flying.items())
            if grant.reservations and not grant.reservations[0].probe:
                assert sum(map(len, flying.values())) <= most
                assert lane == "interactive" or len(flying["bulk"]) <= bulks
            if grant.bound in ("window", "concurrency"):
                left_free = (
                    lane == "bulk" and "interactive" in refused
                )  # one, for who waits; interactive leaves bulk none
                full = sum(map(len, flying.values())) >= most - left_free
                assert full or (lane == "bulk" and len(flying["bulk"]) >= bulks - left_free)
                refused.add(lane)
            else:
                refused.discard(lane)
            everyone = flying["bulk"] + flying["interactive"]
            done = data.draw(st.lists(st.sampled_from(everyone), unique_by=id)) if everyone else []
            what = data.draw(st.sampled_from(["clean", "clean", "refused", "failed again", "unused", "gone"]))
            assert driven.settle(*(Settlement(item, what, 0) for item in done)) == len(done)
            flying = {lane: [item for item in items if item not in done] for lane, items in flying.items()}
            driven.now += data.draw(st.floats(0.001, 1.0)) / 10
            driven.reserve()  # nobody: brings the record up to now
            window = math.floor(driven.window())
            assert window >= 1


def test_calls_in_flight_never_exceed_window_or_cap(store_url: str) -> None:
    _concurrency(store_url)


def test_reservations_of_the_dead_end_by_themselves(store_url: str) -> None:
    with Driven(store_url, max_in_flight=4) as driven:
        assert len(driven.reserve(1, 1, 1, 1).reservations) == 4
        driven.now += RESERVATION_S - 0.01
        assert not driven.reserve(1).reservations
        driven.now += 0.02
        assert len(driven.reserve(1, 1, 1, 1).reservations) == 4


def test_settling_twice_changes_nothing(store_url: str) -> None:
    with Driven(store_url, rpm=100, tpm=100_000) as driven:
        item = driven.reserve(500).reservations[0]
        assert driven.settle(Settlement(item, "clean", 100)) == 1
        before = driven.record()
        for what in ("clean", "refused", "key_refused", "unused", "unreachable"):
            assert driven.settle(Settlement(item, what, 100, None, 401)) == 0
        assert driven.record() == before
        assert not driven.gate()
        assert driven.settle(Settlement(Reservation("b.of.nobody", 0, 0, False), "clean", 5)) == 0


# -- lanes


def test_an_interactive_job_starts_within_two_seconds_while_bulk_takes_all_it_can(store_url: str) -> None:
    with Driven(store_url, rpm=100) as driven:
        driven.open_window()
        starts: list[tuple[float, int]] = []
        waits: list[float] = []
        asked: float | None = None
        start = driven.now
        while driven.now < start + 90:
            for who in ("w1", "w2"):
                grant = driven.reserve(*[1] * 20, who=who)
                starts += starts_of(grant.reservations)
                driven.settle_all(grant)
            if asked is None and int(driven.now - start) % 20 == 7 and len(waits) < (driven.now - start) / 20:
                asked = driven.now
            if asked is not None:
                grant = driven.reserve(1, lane="interactive", who="i")
                if grant.reservations:
                    at = grant.reservations[0].at_ms / 1000
                    waits.append(at - asked)
                    starts.append((at, 1))
                    driven.settle_all(grant)
                    asked = None
            driven.now += 0.08
        assert len(waits) >= 4
        assert max(waits) < 2
        assert most_in_a_minute(starts) <= 100
        assert len(starts) >= 0.97 * 150, "what interactive jobs do not use is bulk's"


@pytest.mark.parametrize("limits", [{"rpm": 120}, {"tpm": 12_000}])
def test_each_lane_has_its_share_when_both_want_all(store_url: str, limits: dict[str, int]) -> None:
    with Driven(store_url, **limits) as driven:
        driven.open_window()
        counts = {"bulk": 0, "interactive": 0}
        start = driven.now
        while driven.now < start + 180:
            for lane in counts:
                grant = driven.reserve(*[100] * 10, lane=lane, who=lane)
                counts[lane] += len(grant.reservations)
                driven.settle_all(grant)
            driven.now += 0.1
        whole = sum(counts.values())
        assert whole >= 0.95 * 360
        # A minute's share may be used at once when it has been saved up, so it is a little more than 20%.
        assert 0.18 * whole < counts["interactive"] < 0.29 * whole


@pytest.mark.parametrize(
    ("limits", "need"), [({"rpm": 4}, 1), ({"rpm": 10, "interactive_share": 0.05}, 1), ({"tpm": 9_000}, 2_500)]
)
def test_an_interactive_call_beyond_its_lanes_share_starts_too(
    store_url: str, limits: dict[str, Any], need: int
) -> None:
    with Driven(store_url, **limits) as driven:
        driven.open_window()
        started, start = 0, driven.now
        while driven.now < start + 150:
            driven.settle_all(driven.reserve(*[100] * 5, who="b"))
            grant = driven.reserve(need, lane="interactive", who="i")
            started += len(grant.reservations)
            driven.settle_all(grant)
            driven.now += 0.2
        assert started >= 1


def test_time_behind_a_gate_works_off_a_debt(store_url: str) -> None:
    with Driven(store_url, tpm=60_000) as driven:
        dear, other = driven.reserve(300, 300).reservations
        driven.settle(Settlement(dear, "clean", -30_000), Settlement(other, "refused", 0, 40.0, 429))
        for _ in range(39):
            driven.now += 1
            assert driven.reserve(100).bound == "retry_after"
        driven.now += 1.1
        assert driven.reserve(100).reservations


def test_calls_in_flight_count_after_the_store_was_away(store_url: str) -> None:
    with Driven(store_url, max_in_flight=4) as driven:
        held = driven.reserve(1, 1, 1, 1)
        driven.now += RESERVATION_S + 5
        assert not driven.reserve(1, who="another").reservations, "its holder could not renew"
        for name, ids in driven.limiter().flights((MODEL, item.id) for item in held.reservations).items():
            driven.client.zadd(name, dict.fromkeys(ids, driven.now + RESERVATION_S), xx=True)
        driven.now += RESERVATION_S - 1
        assert not driven.reserve(1, who="another").reservations
        driven.now += 2
        assert driven.reserve(1, who="another").reservations, "and it died after all"


def test_interactive_jobs_may_have_all_that_bulk_leaves(store_url: str) -> None:
    with Driven(store_url, rpm=120) as driven:
        count, start = 0, driven.now
        while driven.now < start + 120:
            grant = driven.reserve(*[1] * 10, lane="interactive")
            count += len(grant.reservations)
            driven.settle_all(grant)
            driven.now += 0.05
        assert count >= 0.97 * 240


def test_interactive_jobs_keep_a_place_in_flight(store_url: str) -> None:
    with Driven(store_url, max_in_flight=40) as driven:
        driven.open_window()
        driven.answering()
        assert len(driven.reserve(*[1] * 60).reservations) == 38
        assert driven.reserve(1).bound == "concurrency"
        assert len(driven.reserve(*[1] * 60, lane="interactive").reservations) == 2
    with Driven(store_url, max_in_flight=1) as driven:
        driven.answering()
        held = driven.reserve(1, 1)
        assert len(held.reservations) == 1, "of one place nothing can be kept"
        assert not driven.reserve(1, lane="interactive").reservations
        driven.settle_all(held)
        assert driven.reserve(1).bound == "interactive", "but who waits for it goes first"
        assert driven.reserve(1, lane="interactive").reservations


def test_no_place_is_kept_that_nobody_could_use(store_url: str) -> None:
    with Driven(store_url, max_in_flight=40) as driven:
        driven.open_window()
        held = driven.reserve(*[1] * 60).reservations
        assert len(held) == 40
        # A worker comes, before its heartbeat or after: it gets the next places, up to its share.
        for place in range(2):
            assert driven.reserve(1, lane="interactive").bound == "concurrency"
            driven.settle_all([held.pop()])
            assert not driven.reserve(1).reservations
            assert driven.reserve(1, lane="interactive").reservations
            if not place:
                driven.answering()
        driven.settle_all([held.pop()])
        assert driven.reserve(1).reservations, "38 are bulk's"


class Worker:
    """One that asks for twice as many places as calls end, in the same step, and ten times a second besides."""

    def __init__(self, driven: Driven, who: str, rng: random.Random, lane: str = "bulk", most: int = 10**9) -> None:
        self.driven, self.who, self.rng, self.lane, self.most = driven, who, rng, lane, most
        self.calls: list[tuple[float, Reservation]] = []
        self.looks_at = 0.0
        self.done = 0

    def step(self) -> None:
        ended = [item for end, item in self.calls if end <= self.driven.now]
        if not ended and self.driven.now < self.looks_at:
            return
        self.calls = [(end, item) for end, item in self.calls if end > self.driven.now]
        self.driven.settle_all(ended)
        self.done += len(ended)
        wanted = min(max(2 * len(ended), 10), self.most - len(self.calls))
        grant = self.driven.reserve(*[1] * wanted, who=self.who, lane=self.lane)
        self.calls += [(self.driven.now + self.rng.uniform(0.2, 1.0), item) for item in grant.reservations]
        self.looks_at = self.driven.now + 0.1


def test_who_joins_while_others_have_all_places_gets_its_part(store_url: str) -> None:
    with Driven(store_url, max_in_flight=40) as driven:
        driven.open_window()
        rng = random.Random(7)
        first, second, third = (Worker(driven, who, rng) for who in "abc")

        def work(seconds: float, *workers: Worker) -> list[int]:
            flying, end = [], driven.now + seconds
            while driven.now < end:
                for worker in workers:
                    worker.step()
                driven.now += 0.005
                flying.append(driven.flying())
            return flying

        work(2, first)
        assert len(first.calls) == 40
        work(10, first, second)
        assert abs(len(first.calls) - len(second.calls)) <= 6
        work(10, first, second, third)
        assert all(10 <= len(worker.calls) <= 17 for worker in (first, second, third))
        flying = work(5, first, second, third)
        assert sum(flying) / len(flying) >= 39.5, "and hardly a place is left free for it"
        # The third has no more jobs; what it waited for is no one's.
        third.calls = [(driven.now, item) for _, item in third.calls]
        driven.settle_all([item for _, item in third.calls])
        flying = work(5, first, second)[200:]
        assert sum(flying) / len(flying) >= 39.5


def test_bulk_takes_no_place_from_interactive_jobs(store_url: str) -> None:
    with Driven(store_url, max_in_flight=40) as driven:
        driven.open_window()
        driven.answering()
        rng = random.Random(7)
        answering = Worker(driven, "i", rng, "interactive", most=20)
        bulk = [Worker(driven, who, rng) for who in "abcdefgh"]
        for step in range(1_200):
            answering.step()
            for worker in bulk if step > 200 else ():
                worker.step()
            driven.now += 0.005
            if step > 400:
                assert len(answering.calls) >= 17, "those that have just ended are asked for again"
        assert sum(len(worker.calls) for worker in bulk) >= 17


def test_the_kept_place_is_left_free_for_nobody_of_bulk(store_url: str) -> None:
    with Driven(store_url, max_in_flight=8) as driven:
        driven.open_window()
        driven.answering()
        assert len(driven.reserve(*[1] * 20, who="a").reservations) == 7
        for _ in range(30):
            assert not driven.reserve(1, who="b").reservations
            driven.now += 0.1
        assert driven.reserve(1, who="i", lane="interactive").reservations


def test_of_a_single_place_nobody_is_kept_out_for_long(store_url: str) -> None:
    with Driven(store_url, max_in_flight=1) as driven:
        rng = random.Random(7)
        first, second = Worker(driven, "a", rng), Worker(driven, "b", rng)
        for _ in range(6_000):
            first.step()
            second.step()
            driven.now += 0.005
        assert min(first.done, second.done) >= 0.3 * (first.done + second.done)
        assert first.done + second.done >= 0.9 * 30 / 0.6


# -- anything at all


class Cluster:
    """Workers that reserve, call late or never, settle or die, under a clock that may be set back."""

    def __init__(self, data: st.DataObject, driven: Driven) -> None:
        self.data = data
        self.driven = driven
        self.starts: list[tuple[float, int]] = []
        self.real = driven.now  # seconds that have really passed; the server's clock may have been set back

    def step(self) -> None:
        draw, driven = self.data.draw, self.driven
        lane = draw(st.sampled_from(["bulk", "interactive"]))
        sizes = draw(st.lists(st.sampled_from([1, 10, 100, 700, 2_500]), min_size=1, max_size=8))
        offset = self.real - driven.now
        grant = driven.reserve(*sizes, lane=lane, who=draw(st.sampled_from(["a", "b"])) + lane)
        for item, size in zip(grant.reservations, sizes, strict=False):
            fate = draw(
                st.sampled_from(["clean", "clean", "clean", "failed again", "unused", "dies", "called and dies"])
            )
            if fate not in ("unused", "dies"):
                late = draw(st.floats(0, LATE_S - 0.01))
                self.starts.append((item.at_ms / 1000 + offset + late, size))
            if fate == "unused":
                driven.settle(Settlement(item, "unused", size))
            elif "dies" not in fate:
                driven.settle(Settlement(item, fate, 0))
        passed = draw(st.one_of(st.just(grant.ask_again_s), st.floats(0.001, 1.5), st.floats(1, 70)))
        self.real += max(passed, 0.001)
        driven.now += max(passed, 0.001)
        if draw(st.integers(0, 19)) == 0:
            driven.now -= draw(st.floats(1.5, 5_000))


def test_whatever_happens_no_minute_exceeds_the_limits_and_nothing_leaks(store_url: str) -> None:
    @relaxed
    @given(data=st.data(), rpm=st.sampled_from([5, 60, None]), tpm=st.sampled_from([2_000, 10_000, None]))
    def walk(data: st.DataObject, rpm: int | None, tpm: int | None) -> None:
        limits = {name: value for name, value in (("rpm", rpm), ("tpm", tpm)) if value is not None}
        with Driven(store_url, **limits) as driven:
            driven.open_window()
            cluster = Cluster(data, driven)
            for _ in range(data.draw(st.integers(5, 40))):
                cluster.step()
            if rpm is not None:
                assert most_in_a_minute([(at, 1) for at, _ in cluster.starts]) <= rpm
            if tpm is not None:
                # One larger than a whole minute goes alone: it is as much as fits.
                assert most_in_a_minute([(at, min(size, tpm)) for at, size in cluster.starts]) <= tpm
            # Whatever happened, after two minutes all is as at the start: nothing waits for ever, nothing has leaked.
            driven.reserve()
            driven.now += 125
            driven.reserve()
            for lane in ("bulk", "interactive"):
                driven.now += 13
                assert driven.reserve(1, lane=lane, who=f"after {lane}").reservations, driven.record()
                assert driven.flying(lane) == 1
            assert float(driven.record().get("sum_r", 0)) == 2
            assert float(driven.record().get("sum_t", 0)) == 2

    walk()


# -- the class, on the real clock


def test_the_limiter_itself(store_url: str) -> None:
    async def main() -> None:
        client: Any = connect_async(store_url)
        try:
            limiter = Limiter(client, Settings(rpm=60_000, max_in_flight=4), "account", "w")
            await client.set(keys.answering("account"), "i")
            grant = await limiter.reserve(MODEL, "bulk", limiter.ids("bulk"), [5, 5, 5, 5])
            ids = [item.id for item in grant.reservations]
            assert ids == ["b.w.1.1", "b.w.1.2", "b.w.1.3"]
            assert (grant.bound, grant.ask_again_s, grant.shut) == ("concurrency", 0.1, "")
            (other,) = (await limiter.reserve(MODEL, "interactive", limiter.ids("interactive"), [5])).reservations
            assert other.id == "i.w.2.1"
            flights = limiter.flights((MODEL, id) for id in ("b.w.1.1", "i.w.2.1", "b.gone"))
            found = await leases.beat(client, "w", b"{}", "account", [], flights, 100.0)
            for lane, id in (("bulk", "b.w.1.1"), ("interactive", "i.w.2.1")):
                assert await client.zscore(keys.flight(lane, "account", MODEL), id) == found.now + 100
            assert await client.zscore(keys.flight("bulk", "account", MODEL), "b.gone") is None
            items = [Settlement(item, "clean", 0, None, 200) for item in [*grant.reservations, other]]
            assert await SETTLE(client, limiter.keys(MODEL), limiter.settle_args(items)) == 4
            assert await client.zrange(keys.LIMITS, 0, -1) == [f"account:{MODEL}".encode()]
        finally:
            await client.connection_pool.aclose()

    asyncio.run(main())
