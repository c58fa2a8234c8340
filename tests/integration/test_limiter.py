"""The limiter's scripts against a real Valkey, with a clock that the test drives where minutes have to pass."""

from __future__ import annotations

import asyncio
import math
from bisect import bisect_right
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from jobs import keys
from jobs.connections import connect, connect_async
from jobs.scripts import Script
from jobs.settings import Settings
from worker.limiter import FIRST_WINDOW, RESERVATION_S, SETTLE, Grant, Limiter, Settlement

MODEL = "m"
CLOCK = "test:clock"
CLOCK_LUA = "redis.call('TIME')"

relaxed = settings(max_examples=15, deadline=None, database=None, suppress_health_check=list(HealthCheck))


class Driven:
    """A limiter whose scripts read their time from a key; calls are made at `now`, in seconds."""

    def __init__(self, url: str, **limits: int) -> None:
        self.client: Any = connect(url)
        self.client.flushall()
        self.limiter = Limiter(None, Settings(**limits), "account", "w")  # type: ignore[arg-type] # limits are ints
        self.limits = [limits.get(name, "") for name in ("rpm", "tpm", "max_in_flight")]
        self.now = 1_000_000.0
        self.calls = 0
        fake = f"{{redis.call('HGET', '{CLOCK}', 's'), redis.call('HGET', '{CLOCK}', 'us')}}"
        self.reserve_script = Script("reserve", "worker")
        self.settle_script = Script("settle", "worker")
        for script in (self.reserve_script, self.settle_script):
            assert CLOCK_LUA in script.text
            script.text = script.text.replace(CLOCK_LUA, fake)
            script.sha = "0" * 40

    def __enter__(self) -> Driven:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def _tick(self) -> None:
        us = round(self.now * 1e6)
        self.client.hset(CLOCK, mapping={"s": us // 1_000_000, "us": us % 1_000_000})

    def reserve(self, *estimates: int) -> Grant:
        self._tick()
        self.calls += 1
        prefix = f"w.{self.calls}"
        delays, ask_ms, bound, detail = self.reserve_script(
            self.client,
            self.limiter.keys(MODEL),
            [*self.limits, FIRST_WINDOW, RESERVATION_S, prefix, *estimates],
        )
        reservations = [(f"{prefix}.{i}", delay / 1000) for i, delay in enumerate(delays, 1)]
        return Grant(reservations, ask_ms / 1000, bound.decode(), detail.decode())

    def settle(self, *settlements: Settlement) -> int:
        self._tick()
        return int(self.settle_script(self.client, self.limiter.keys(MODEL), Limiter.settle_args(settlements)))

    def settle_all(self, grant: Grant, what: str = "clean", tokens: int = 0) -> int:
        return self.settle(*(Settlement(name, what, tokens) for name, _ in grant.reservations))

    def flying(self) -> int:
        return int(self.client.zcard(keys.flight("account", MODEL)))

    def window(self) -> float:
        return float(self.client.hget(keys.limit("account", MODEL), "window"))

    def open_window(self) -> None:
        """Concurrency shall not be what bounds."""
        self.client.hset(keys.limit("account", MODEL), "window", 100_000)


def most_in_a_minute(times: list[float]) -> int:
    """The most of these in any half-open minute."""
    times = sorted(times)
    return max((bisect_right(times, start + 60 - 1e-9) - first for first, start in enumerate(times)), default=0)


# -- requests a minute


@pytest.mark.parametrize("rpm", [1, 2, 3, 10, 100, 900])
def test_no_sliding_minute_holds_more_than_the_limit(store_url: str, rpm: int) -> None:
    @relaxed
    @given(data=st.data())
    def walk(data: st.DataObject) -> None:
        with Driven(store_url, rpm=rpm) as driven:
            driven.open_window()
            times: list[float] = []
            for _ in range(data.draw(st.integers(1, 60))):
                grant = driven.reserve(*[1] * data.draw(st.integers(1, max(2, rpm // 4))))
                times += [driven.now + delay for _, delay in grant.reservations]
                driven.settle_all(grant)
                step = data.draw(
                    st.one_of(st.just(grant.ask_again_s), st.floats(0.0005, 2.0), st.floats(0, 90.0 / math.sqrt(rpm)))
                )
                driven.now += max(step, 0.0005)
            assert most_in_a_minute(times) <= rpm

    walk()


@pytest.mark.parametrize("rpm", [1, 2, 3, 10, 100, 900])
def test_a_busy_queue_uses_the_limit_and_never_more(store_url: str, rpm: int) -> None:
    with Driven(store_url, rpm=rpm) as driven:
        driven.open_window()
        times: list[float] = []
        start = driven.now
        while driven.now < start + 600:
            grant = driven.reserve(*[1] * 20)
            times += [driven.now + delay for _, delay in grant.reservations]
            driven.settle_all(grant)
            driven.now += max(grant.ask_again_s, 0.001) + (0.05 if rpm > 100 else 0)
            if grant.bound:
                assert grant.bound == "requests"
        assert most_in_a_minute(times) <= rpm
        assert len(times) >= (0.97 if rpm >= 100 else 0.89) * rpm * 10


def test_nothing_is_granted_further_ahead_than_100_ms(store_url: str) -> None:
    with Driven(store_url, rpm=900) as driven:
        driven.open_window()
        grant = driven.reserve(*[1] * 50)
        delays = [delay for _, delay in grant.reservations]
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


def test_the_token_bucket_owes_what_was_taken_beyond_it(store_url: str) -> None:
    with Driven(store_url, tpm=60_000) as driven:
        rate = (60_000 - 600 - 1) / 60
        big = driven.reserve(6_000)
        assert len(big.reservations) == 1, "larger than the bucket: it goes when the bucket is full"
        refused = driven.reserve(100)
        assert (refused.reservations, refused.bound) == ([], "tokens")
        assert refused.ask_again_s == pytest.approx((5_400 + 100) / rate - 0.1, abs=0.01)
        driven.now += refused.ask_again_s - 0.05
        assert not driven.reserve(100).reservations
        driven.now += 0.06
        assert driven.reserve(100).reservations


def test_actual_usage_corrects_the_token_bucket(store_url: str) -> None:
    with Driven(store_url, tpm=60_000) as driven:
        dear = driven.reserve(500)
        driven.settle(Settlement(dear.reservations[0][0], "clean", -5_000))
        owing = driven.reserve(100)
        assert owing.ask_again_s == pytest.approx(5_000 / 990, rel=0.02)
        driven.now += owing.ask_again_s + 0.2
        cheap = driven.reserve(100)
        driven.settle(Settlement(cheap.reservations[0][0], "clean", 600))
        driven.now += 0.001
        assert driven.reserve(600).reservations, "what was not used is there again"


def test_tokens_over_ten_minutes_stay_within_the_limit(store_url: str) -> None:
    with Driven(store_url, tpm=100_000) as driven:
        driven.open_window()
        start, taken, index = driven.now, 0, 0
        while driven.now < start + 600:
            index += 1
            actual = 200 + index * 37 % 900
            grant = driven.reserve(500)
            for name, _ in grant.reservations:
                driven.settle(Settlement(name, "clean", 500 - actual))
                taken += actual
            driven.now += max(grant.ask_again_s, 0.001)
        assert 0.97 * 1_000_000 <= taken <= 1_000_000 + 2_000


# -- concurrency, window


@relaxed
@given(data=st.data(), cap=st.one_of(st.none(), st.integers(1, 40)))
def _concurrency(url: str, data: st.DataObject, cap: int | None) -> None:
    with Driven(url, **({} if cap is None else {"max_in_flight": cap})) as driven:
        flying: list[str] = []
        window = float(FIRST_WINDOW)
        for _ in range(data.draw(st.integers(1, 30))):
            grant = driven.reserve(*[1] * data.draw(st.integers(1, 30)))
            flying += [name for name, _ in grant.reservations]
            most = min(math.floor(window + 1e-6), cap or 10**9)
            assert len(flying) == driven.flying()
            if grant.reservations:
                assert len(flying) <= most
            if grant.bound:
                assert grant.bound == (
                    "concurrency" if cap is not None and cap < math.floor(window + 1e-6) else "window"
                )
                assert len(flying) >= most
            done = data.draw(st.lists(st.sampled_from(flying), unique=True)) if flying else []
            what = data.draw(st.sampled_from(["clean", "clean", "refused", "other", "unused"]))
            assert driven.settle(*(Settlement(name, what, 0) for name in done)) == len(done)
            flying = [name for name in flying if name not in done]
            window = driven.window()
            assert window >= 1
            driven.now += data.draw(st.floats(0.001, 1.0)) / 10


def test_calls_in_flight_never_exceed_window_or_cap(store_url: str) -> None:
    _concurrency(store_url)


def test_the_window_starts_at_16_and_doubles_each_clean_round(store_url: str) -> None:
    with Driven(store_url) as driven:
        sizes = []
        for _ in range(4):
            grant = driven.reserve(*[1] * 500)
            sizes.append(len(grant.reservations))
            assert grant.bound == "window"
            driven.settle_all(grant)
            driven.now += 1
        assert sizes == [16, 32, 64, 128]


def test_a_window_that_is_not_used_does_not_grow(store_url: str) -> None:
    with Driven(store_url) as driven:
        for _ in range(50):
            driven.settle_all(driven.reserve(1))
        assert driven.window() == 16


def test_refusals_cut_the_window_once_a_round_and_then_it_grows_slowly(store_url: str) -> None:
    with Driven(store_url) as driven:
        for _ in range(3):
            driven.settle_all(driven.reserve(*[1] * 500))
            driven.now += 1
        grant = driven.reserve(*[1] * 500)
        assert len(grant.reservations) == 128
        driven.settle_all(grant, "refused")
        assert driven.window() == pytest.approx(0.7 * 128)
        driven.now += 2
        driven.settle_all(driven.reserve(*[1] * 500))
        assert 89.6 < driven.window() < 90, "past the cut it grows by one in ten rounds"


# -- reservations


def test_reservations_of_the_dead_end_by_themselves(store_url: str) -> None:
    with Driven(store_url, max_in_flight=3) as driven:
        assert len(driven.reserve(1, 1, 1, 1).reservations) == 3
        driven.now += RESERVATION_S - 0.01
        assert not driven.reserve(1).reservations
        driven.now += 0.02
        assert len(driven.reserve(1, 1, 1, 1).reservations) == 3


def test_settling_twice_changes_nothing(store_url: str) -> None:
    with Driven(store_url, rpm=100, tpm=100_000) as driven:
        grant = driven.reserve(500)
        name = grant.reservations[0][0]
        assert driven.settle(Settlement(name, "clean", 100)) == 1
        before = driven.client.hgetall(keys.limit("account", MODEL))
        for what in ("clean", "refused", "key", "unused"):
            assert driven.settle(Settlement(name, what, 100, 30.0 if what == "refused" else None, 401)) == 0
        assert driven.client.hgetall(keys.limit("account", MODEL)) == before
        assert not driven.client.exists(keys.gate("account"))
        assert driven.settle(Settlement("of nobody", "clean", 5)) == 0


# -- gates


def test_retry_after_shuts_the_model_for_everybody(store_url: str) -> None:
    with Driven(store_url) as driven:
        first, second = driven.reserve(1, 1).reservations
        driven.settle(Settlement(first[0], "refused", 0, 7.5, 429))
        driven.settle(Settlement(second[0], "refused", 0, 2.0, 429))
        for _ in range(3):
            shut = driven.reserve(1)
            assert (shut.reservations, shut.bound) == ([], "retry_after")
            driven.now += 2
        assert shut.ask_again_s == pytest.approx(3.5, abs=0.01)
        driven.now += shut.ask_again_s - 2 + 0.001
        assert driven.reserve(1).reservations
        assert driven.window() == 16, "the upstream said how long: that is no sign of too many calls"


@pytest.mark.parametrize(
    ("what", "status", "reason"),
    [("key", 401, "key_refused"), ("funds", 402, "payment_required"), ("forbidden", 403, "forbidden")],
)
def test_a_refused_account_is_probed_one_call_a_step(store_url: str, what: str, status: int, reason: str) -> None:
    with Driven(store_url) as driven:
        grant = driven.reserve(*[1] * 5)
        driven.settle(*(Settlement(name, what, 0, None, status) for name, _ in grant.reservations))
        gate = driven.client.hgetall(keys.gate("account"))
        assert (gate[b"reason"].decode(), int(gate[b"status"])) == (reason, status)
        steps = []
        for _ in range(6):
            shut = driven.reserve(1, 1)
            assert (shut.reservations, shut.bound, shut.detail) == ([], "gate", reason)
            steps.append(round(shut.ask_again_s))
            driven.now += shut.ask_again_s - 0.01
            assert driven.reserve(1).bound == "gate"
            driven.now += 0.02
            probe = driven.reserve(1, 1, 1)
            assert len(probe.reservations) == 1
            assert probe.detail == reason
            driven.settle(Settlement(probe.reservations[0][0], what, 0, None, status))
        assert steps == [5, 10, 20, 40, 60, 60]
        driven.now += 61
        probe = driven.reserve(1, 1)
        driven.settle(Settlement(probe.reservations[0][0], "clean", 0, None, 200))
        assert len(driven.reserve(1, 1).reservations) == 2, "a clean answer opens the account"


def test_a_probe_that_could_not_be_granted_is_not_lost(store_url: str) -> None:
    with Driven(store_url, max_in_flight=2) as driven:
        grant = driven.reserve(1, 1)
        driven.settle(Settlement(grant.reservations[0][0], "key", 0, None, 401))
        driven.now += 5.01
        driven.limiter.renew(driven.client, MODEL, [grant.reservations[1][0]], driven.now)
        assert len(driven.reserve(1).reservations) == 1
        driven.now += 10.01
        driven.limiter.renew(driven.client, MODEL, [name for name, _ in grant.reservations], driven.now)
        driven.client.zadd(keys.flight("account", MODEL), {"other.1": driven.now + 9, "other.2": driven.now + 9})
        assert driven.reserve(1).bound == "concurrency"
        driven.client.delete(keys.flight("account", MODEL))
        assert len(driven.reserve(1).reservations) == 1, "the probe waited for its place"
        assert driven.reserve(1).bound == "gate"


def test_the_gate_is_the_accounts_and_the_window_the_models(store_url: str) -> None:
    with Driven(store_url) as driven:
        grant = driven.reserve(1)
        driven.settle(Settlement(grant.reservations[0][0], "key", 0, None, 401))
        reply = driven.reserve_script(
            driven.client, driven.limiter.keys("another"), ["", "", "", FIRST_WINDOW, RESERVATION_S, "w.x", 1]
        )
        assert reply[2] == b"gate"


# -- the class, on the real clock


def test_the_limiter_itself(store_url: str) -> None:
    async def main() -> None:
        client = connect_async(store_url)
        try:
            limiter = Limiter(client, Settings(rpm=60_000, max_in_flight=3), "account", "w")
            grant = await limiter.reserve(MODEL, [5, 5, 5, 5])
            assert [name for name, _ in grant.reservations] == ["w.1.1", "w.1.2", "w.1.3"]
            assert (grant.bound, grant.ask_again_s, grant.detail) == ("concurrency", 0.1, "")
            pipe = client.pipeline(transaction=False)
            seconds, _ = await client.time()
            limiter.renew(pipe, MODEL, ["w.1.1", "gone"], seconds + 100)
            limiter.renew(pipe, MODEL, [], seconds)
            await pipe.execute()
            flight = keys.flight("account", MODEL)
            assert await client.zscore(flight, "w.1.1") == seconds + 100 + RESERVATION_S
            assert await client.zscore(flight, "gone") is None
            items = [Settlement(name, "clean", 0, None, 200) for name, _ in grant.reservations]
            assert await SETTLE(client, limiter.keys(MODEL), Limiter.settle_args(items)) == 3
            assert (await limiter.reserve(MODEL, [5])).reservations == [("w.2.1", 0.0)]
        finally:
            await client.connection_pool.aclose()

    asyncio.run(main())
