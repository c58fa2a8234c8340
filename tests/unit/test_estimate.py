"""Estimates of tokens: begun cautiously, learned from real usage, bounded in number."""

from __future__ import annotations

import base64
import json
import math
import random
from collections import deque

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

import worker.estimate
from jobs.leases import Job
from jobs.requests import CHAT, Request
from jobs.results import Usage
from worker.estimate import FIRST_NARROW, FIRST_WIDE, GUESS_CHARS, KEEP, WINDOW, Estimates, Text, measure
from worker.run import Run

FIRST = 1000


def run_of(text: str = "", batch: str = "b", model: str = "m", most: object = None, escaped: bool = False) -> Run:
    """A run whose body holds this text, as UTF-8 or all ASCII with escapes."""
    body = json.dumps({"model": model, "max_tokens": most, "x": text}, ensure_ascii=escaped).encode()
    return Run.of(Job(batch, 0, "t", Request(CHAT, body, None), b"", 0, None, 60), "default")


# -- how much text there is


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", Text(0, 0)),
        (b'{"a":"b\\n"}', Text(11, 0)),
        ("中文。".encode(), Text(0, 3)),
        ("a中b文".encode(), Text(2, 2)),
        ("né".encode(), Text(1.5, 0.5)),
        ("Привет".encode(), Text(3, 3)),
        ("“hi”".encode(), Text(2, 2)),
        ("🙂".encode(), Text(0, 2)),
        (b"\\u4e2d\\u6587.", Text(1, 2)),
        (b"\\ud83d\\ude42", Text(0, 2)),
        (b"\\u00e9", Text(0, 1)),
        ("\\u4e2d文".encode(), Text(0, 2)),
        (b"C:\\\\users", Text(9, 0)),
        (b"C:\\\\\\u4e2d", Text(4, 1)),
        (b"\xff\xfe", Text(0, 4)),
        (b"\\uabc", Text(0, 1)),
        ("\\u文".encode(), Text(0, 2)),
        ("文".encode()[:2], Text(0, 1)),
    ],
)
def test_measure(body: bytes, text: Text) -> None:
    assert measure(body) == text


@pytest.mark.parametrize("data", [base64.b64encode(bytes(range(256)) * 40), b"Ab1\\/" * 300])
def test_a_picture_is_no_text(data: bytes) -> None:
    assert measure(b'"data:image/png;base64,' + data + b'" caption') == Text(32, 0)
    assert measure(b'"' + data + b'"') == Text(2 + len(data), 0)


@settings(max_examples=200)
@given(st.text() | st.text("a\\né文🙂"))
def test_every_character_counts_once_or_twice(text: str) -> None:
    once = len(text) + sum(character > "\uffff" for character in text)
    assert sum(measure(text.encode())) == once
    # Escaped, what JSON writes as a letter or a sign after a backslash is two characters.
    assert sum(measure(json.dumps(text).encode())) == 2 + once + sum(character in '\\"\b\f\n\r\t' for character in text)


# -- prompts

LATIN = "It was the best of times, it was the worst of times. "
CHINESE = "那是最美好的时代，那是最糟糕的时代。"


def teach(estimates: Estimates, kinds: list[str], narrow: float, wide: float, seed: int = 1, rounds: int = 300) -> None:
    """So many calls of a model that takes these rates, give or take a tenth, in texts of many lengths."""
    rng = random.Random(seed)
    for number in range(rounds):
        run = run_of(kinds[number % len(kinds)] * rng.randint(1, 40), escaped=rng.random() < 0.3)
        tokens = (narrow * run.text.narrow + wide * run.text.wide) * rng.uniform(0.9, 1.1)
        estimates.learn(run, Usage(prompt_tokens=round(tokens)))


def prompt(estimates: Estimates, text: str) -> float:
    return estimates.of(run_of(text)) - FIRST


def expected(text: str, narrow: float, wide: float) -> float:
    measured = run_of(text).text
    return narrow * measured.narrow + wide * measured.wide


def test_begins_with_what_is_usual() -> None:
    estimates = Estimates(FIRST)
    assert prompt(estimates, LATIN * 20) == pytest.approx(expected(LATIN * 20, 0.25, 0.7), abs=1)
    assert prompt(estimates, CHINESE * 20) == pytest.approx(expected(CHINESE * 20, 0.25, 0.7), abs=1)


@pytest.mark.parametrize(
    ("kinds", "rates"),
    [
        ([LATIN], (0.18, 0.0)),
        ([CHINESE], (0.25, 1.3)),
        ([LATIN, CHINESE], (0.35, 0.5)),
        ([LATIN + CHINESE], (0.2, 1.0)),
        ([LATIN + CHINESE, CHINESE + LATIN * 5, "Überraschung, мир! "], (0.3, 0.45)),
    ],
)
def test_learns_what_a_character_takes(kinds: list[str], rates: tuple[float, float]) -> None:
    estimates = Estimates(FIRST)
    teach(estimates, kinds, *rates)
    for kind in kinds:
        for times in (5, 40):
            assert prompt(estimates, kind * times) == pytest.approx(expected(kind * times, *rates), rel=0.06)


def test_latin_and_chinese_are_told_apart() -> None:
    estimates = Estimates(FIRST)
    teach(estimates, [LATIN, LATIN, LATIN, CHINESE], 0.2, 1.1)
    (rates,) = estimates._rates.values()
    assert rates.narrow == pytest.approx(0.2, rel=0.05)
    assert rates.wide == pytest.approx(1.1, rel=0.05)


def test_what_was_never_met_keeps_its_first_guess() -> None:
    estimates = Estimates(FIRST)
    teach(estimates, [LATIN], 0.1, 0.7)
    assert prompt(estimates, CHINESE * 50) == pytest.approx(expected(CHINESE * 50, 0.1, 0.7), rel=0.02)


def test_follows_a_change() -> None:
    estimates = Estimates(FIRST)
    teach(estimates, [LATIN, CHINESE], 0.2, 0.6, rounds=2000)
    teach(estimates, [LATIN, CHINESE], 0.4, 0.9, rounds=200)
    for text in (LATIN * 20, CHINESE * 20):
        assert prompt(estimates, text) == pytest.approx(expected(text, 0.4, 0.9), rel=0.06)


def test_one_answer_is_a_beginning_and_no_more() -> None:
    estimates = Estimates(FIRST)
    text = "x" * (500 - round(run_of().text.narrow))
    assert run_of(text).text == Text(500, 0)
    estimates.learn(run_of(text), Usage(prompt_tokens=250))  # half a token each, where a quarter was the guess
    assert prompt(estimates, text) == pytest.approx(500 * 0.375, abs=1)


def test_models_are_learned_apart() -> None:
    estimates = Estimates(FIRST)
    for _ in range(100):
        estimates.learn(run_of(LATIN * 10, model="dear"), Usage(prompt_tokens=500))
    assert estimates.of(run_of(LATIN * 10, model="dear")) == pytest.approx(FIRST + 500, rel=0.01)
    assert prompt(estimates, LATIN * 10) == pytest.approx(expected(LATIN * 10, 0.25, 0.7), abs=1)


@pytest.mark.parametrize("none", [0, 1])
def test_no_character_takes_less_than_nothing(none: int) -> None:
    """Tokens that fall where one kind of text grows would give it a rate below zero."""
    estimates = Estimates(FIRST)
    short, long = "a文" * 100, "a文" * 100 + ("文" if none else "a") * 300
    for _ in range(300):
        estimates.learn(run_of(short), Usage(prompt_tokens=200))
        estimates.learn(run_of(long), Usage(prompt_tokens=50))
    (rates,) = estimates._rates.values()
    found = (rates.narrow, rates.wide)
    assert found[none] == 0.0
    assert found[1 - none] > 0
    # Of the rates that are none below zero there are no better ones near.
    near = [(found[0] + by, found[1] + other) for by in (-0.01, 0, 0.01) for other in (-0.01, 0, 0.01)]
    costs = {rates: _cost(rates, short, long) for rates in near if min(rates) >= 0}
    assert min(costs, key=lambda rates: costs[rates]) == found


def _cost(rates: tuple[float, float], short: str, long: str) -> float:
    """What the regression makes least: squared errors by length, an older answer's for less, and those of the guess."""
    total = 0.0
    for text, tokens, weight in ((run_of(short).text, 200, KEEP), (run_of(long).text, 50, 1.0)):
        error = rates[0] * text.narrow + rates[1] * text.wide - tokens
        total += weight / (1 - KEEP**2) * error**2 / sum(text)
    return total + GUESS_CHARS * ((rates[0] - FIRST_NARROW) ** 2 + (rates[1] - FIRST_WIDE) ** 2)


# -- completions


@pytest.mark.parametrize("most", [3, 50, 5000])
def test_answers_are_a_quantile_of_the_last(most: int) -> None:
    rng = random.Random(most)
    estimates = Estimates(FIRST)
    estimates.learn(run_of(batch="other"), Usage(completion_tokens=1))
    last: deque[int] = deque(maxlen=WINDOW)
    base = estimates.of(run_of(batch="new")) - FIRST
    for number in range(4 * WINDOW):
        count = rng.randint(1, most) + number  # ever longer
        estimates.learn(run_of(), Usage(completion_tokens=count))
        last.append(count)
        assert estimates.of(run_of()) - base == sorted(last)[math.ceil(0.75 * len(last)) - 1]


@pytest.mark.parametrize("field", ["max_completion_tokens", "max_tokens"])
def test_the_bodys_own_limit_bounds_the_answer_but_does_not_raise_it(field: str) -> None:
    def run(most: int) -> Run:
        body = json.dumps({field: most, "x": "."}).encode().ljust(400)
        return Run.of(Job("b", 0, "t", Request(CHAT, body, None), b"", 0, None, 60), "default")

    estimates = Estimates(FIRST)
    assert [estimates.of(run(most)) for most in (10, 131_072, -5)] == [110, 100 + FIRST, 100]
    estimates.learn(run(10), Usage(completion_tokens=50))
    assert [estimates.of(run(most)) for most in (10, 131_072)] == [110, 150]


def test_is_at_least_one() -> None:
    assert Estimates(FIRST).of(Run(run_of().job, "m", 0)) == 1


def test_nothing_is_learned_from_nothing() -> None:
    estimates = Estimates(FIRST)
    before = estimates.of(run_of(LATIN))
    estimates.learn(run_of(LATIN), Usage())
    estimates.learn(Run(run_of().job, "m", None), Usage(prompt_tokens=5))
    assert estimates.of(run_of(LATIN)) == before


def test_forgets_the_longest_unheard_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker.estimate, "KEPT", 2)
    estimates = Estimates(FIRST)
    for name in ("a", "b", "a", "c"):
        estimates.learn(run_of(batch=name, model=name), Usage(prompt_tokens=7, completion_tokens=7))
    assert list(estimates._answers) == list(estimates._rates) == ["a", "c"]


counts = st.integers(0, 10**12)


@settings(max_examples=100)
@given(
    st.lists(st.tuples(st.binary(max_size=60), counts, counts, st.booleans()), max_size=30),
    st.binary(max_size=60),
    st.none() | st.integers(-5, 10**9),
)
def test_an_estimate_is_always_a_positive_count(
    learned: list[tuple[bytes, int, int, bool]], body: bytes, most: int | None
) -> None:
    def run(data: bytes, limit: int | None = None) -> Run:
        job = Job("b", 0, "t", Request(CHAT, data, None), b"", 0, None, 60)
        return Run(job, "m", limit, measure(data))

    estimates = Estimates(FIRST)
    for data, prompt_tokens, completion_tokens, large in learned:
        data = data * 10_000 if large else data
        estimates.learn(run(data), Usage(prompt_tokens, completion_tokens))
        for asked in (run(body, most), run(data)):
            found = estimates.of(asked)
            assert type(found) is int
            assert found >= 1
    (rates,) = estimates._rates.values() or (worker.estimate._UNKNOWN,)
    assert min(rates.narrow, rates.wide) >= 0
