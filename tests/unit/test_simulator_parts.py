"""The simulator's parts without a socket: the sliding minute, configuration, latencies, bounds."""

from __future__ import annotations

import statistics
from pathlib import Path
from random import Random

import pytest

from ops.simulator import Config, ConfigError, configure
from ops.simulator.answers import latency_s, make_answer
from ops.simulator.asks import address, read_ask
from ops.simulator.ledger import Ledger
from ops.simulator.limits import Account


@pytest.mark.parametrize("seed", range(5))
def test_no_minute_ever_holds_more_than_the_limit_and_none_is_refused_below_it(seed: int) -> None:
    rng, account, config = Random(seed), Account(), Config(rpm=7, tpm=100)
    admitted: list[tuple[float, int]] = []
    now = 0.0
    for _ in range(2000):
        now += rng.choice([0.0, 0.25, 1.0, 9.5, 60.0] if rng.random() < 0.5 else [0.0, 0.5])
        tokens = rng.randint(0, 40)
        recent = [n for at, n in admitted if at > now - 60]
        fits = "rpm" if len(recent) >= 7 else "tpm" if sum(recent) + tokens > 100 else None
        assert account.ask(now, tokens, config) == fits
        if fits is None:
            admitted.append((now, tokens))
            account.leave()
    assert account.minute.most_admitted == 7
    assert 90 < account.minute.most_tokens <= 100
    assert account.minute.most_asked > 7


def test_a_place_is_free_again_exactly_a_minute_later() -> None:
    account, config = Account(), Config(rpm=1)
    assert account.ask(10.0, 5, config) is None
    assert account.ask(69.999, 5, config) == "rpm"
    assert account.headers(40.0, config) == {
        "x-ratelimit-limit-requests": "1",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "30.000s",
    }
    assert account.ask(70.0, 5, config) is None
    assert account.headers(500.0, Config(tpm=9))["x-ratelimit-remaining-tokens"] == "9"


def test_concurrency_frees_a_place_when_a_call_leaves() -> None:
    account, config = Account(), Config(concurrency=1)
    assert [account.ask(0.0, 1, config) for _ in range(2)] == [None, "concurrency"]
    account.leave()
    assert account.ask(0.0, 1, config) is None


@pytest.mark.parametrize(
    ("path", "means"),
    [
        ("/v1/chat/completions", ("chat", None)),
        ("/v1/messages", ("messages", None)),
        ("/v1/ai/a/b/chat/completions", ("chat", "a/b")),
        ("/a/v1/messages", ("messages", "a")),
        ("/v1/ai/chat/completions", None),
        ("//v1/messages", None),
        ("/v1/completions", None),
    ],
)
def test_addresses(path: str, means: tuple[str, str | None] | None) -> None:
    assert address(path) == means


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"host": "0.0.0.0"}, "loopback"),
        ({"host": "example.org"}, "loopback"),
        ({"port": 70_000}, "port: expected int <= 65535"),
        ({"latency": float("nan")}, "latency"),
        ({"latency": float("inf")}, "finite"),
        ({"down_s": float("inf")}, "finite"),
        ({"latency": 0.5, "latency_p99": 0.1}, "latency_p99"),
        ({"latency": 0.0, "latency_p99": 0.1}, "latency_p99"),
        ({"faults": {"500": 0.6, "502": 0.6}}, "1 at most"),
        ({"faults": {"500": -0.1}}, "shares"),
        ({"script": ["nonsense"]}, "no fault is called 'nonsense'"),
        ({"triggers": {"": "500"}}, "needs a text"),
        ({"text": "/nonexistent/answers.txt"}, "text must be a file"),
        ({"down": "maybe"}, "down"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_a_bad_configuration_is_refused_in_one_line(value: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configure(value)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_configuration_keeps_its_key_to_itself() -> None:
    config = configure({"key": "very-secret", "host": "::1"})
    assert "secret" not in repr(config) + str(config.public())


def test_latencies_are_seeded_with_the_median_and_tail_asked_for() -> None:
    config = Config(latency=0.2, latency_p99=6.0)
    seen = [latency_s(config, f"{n:x}", 0) for n in range(4000)]
    cuts = statistics.quantiles(seen, n=100)
    assert 0.18 < cuts[49] < 0.22
    assert 4.5 < cuts[98] < 8
    assert latency_s(config, "0", 0) == seen[0] != latency_s(config, "0", 1)
    assert latency_s(Config(latency=0.3), "0", 0) == 0.3


def test_answers_are_cut_from_a_text_by_seed_and_request(tmp_path: Path) -> None:
    text = " ".join(f"word{number}" for number in range(5_000))
    path = tmp_path / "answers.txt"
    path.write_text(text)

    def answered(seed: int, prompt: str) -> tuple[str, str]:
        config = configure({"text": str(path), "seed": seed, "answer_bytes": 1700})
        body = f'{{"model":"m","messages":[{{"role":"user","content":"{prompt}"}}]}}'
        answer = make_answer(config, read_ask("chat", None, body.encode()))
        return answer.content, answer.reasoning

    content, reasoning = answered(0, "a")
    assert content in text
    assert reasoning in text
    assert 0.75 * 1130 < len(content) + len(reasoning) < 1.25 * 1130
    assert answered(0, "a") == (content, reasoning)
    assert len({answered(0, "b"), answered(1, "a"), (content, reasoning)}) == 3
    path.with_name("empty.txt").write_text(" ")
    with pytest.raises(ConfigError, match="not empty"):
        configure({"text": str(path.with_name("empty.txt"))})


def test_tool_arguments_survive_odd_schemas() -> None:
    def arguments(schema: str) -> object:
        body = (
            f'{{"messages":[{{"role":"user","content":"x"}}],"model":"m","tool_choice":"t","tools":'
            f'[{{"type":"function","function":{{"name":"t","parameters":{schema}}}}}]}}'
        )
        call = make_answer(Config(), read_ask("chat", None, body.encode())).tool_call
        assert call is not None
        return call.arguments

    assert arguments('{"properties":[]}') == {}
    assert arguments('{"type":"string"}') == {}
    assert arguments("{}") == {}


def test_the_ledger_keeps_the_newest_calls_and_all_counters() -> None:
    ledger = Ledger(keep_calls=3)
    for number in range(10):
        call = ledger.arrive("/v1/messages")
        ledger.admit(call)
        call.digest, call.status, call.paid, call.delivered = str(number % 4), 200, number % 2 == 0, True
        ledger.end(call)
    view = ledger.view()
    assert [call["number"] for call in view["calls"]] == [8, 9, 10]
    assert view["paid"] == {"0": 3, "2": 2}
    assert ledger.asked_before("1") == 3
    assert view["totals"]["paid_again"] == 3
    held = ledger.arrive("/v1/messages")
    ledger.admit(held)
    ledger.reset()
    assert (ledger.totals.in_flight, ledger.asked_before("1")) == (1, 0)
    ledger.end(held)
    assert (ledger.totals.in_flight, ledger.totals.calls) == (0, 1)
