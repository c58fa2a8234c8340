"""The table of metrics, what becomes of it in an exposition, and the counting."""

from __future__ import annotations

import ast
import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_text
from redis.exceptions import ConnectionError as RedisConnectionError

from jobs import metrics, tally
from jobs.exposition import families, process, render
from jobs.metrics import CALL_TIME, CALLS, LATE_ANSWERS, PREFIXES, SLOT_TIME, TABLE, TOKENS, Metric, Source
from jobs.tally import MOST_NAMES, Cell, Names, Reports, Tally, totals

ROOT = Path(__file__).resolve().parents[2]
SOURCES: tuple[Source, ...] = ("worker", "api", "store")
#: What may be a label. One that is missing here says why it holds nothing that nobody may see.
LABELS = {
    "account",  # a digest
    "action",  # of ours
    "endpoint",  # one of two
    "kind",  # of ours
    "lane",  # one of two
    "limit",  # of ours
    "method",  # a known one, or other
    "model",  # by Names
    "reason",  # of adapt.lua
    "result",  # of ours
    "route",  # a template
    "state",  # of ours
    "status",  # a number, or none
    "verdict",  # by Names
}


def sample(cells: dict[Cell, float], source: Source = "worker", accept: str = "") -> dict[str, float]:
    """What Prometheus reads: `name{label=value,...}` -> value."""
    text, _ = render(families(source, cells), accept)
    read = read_openmetrics if accept else read_text
    return {
        item.name + "".join(f"|{value}" for _, value in sorted(item.labels.items())): item.value
        for family in read(text.decode())
        for item in family.samples
    }


# -- the table


def test_every_row_is_named_once_and_well() -> None:
    names = [name for metric in TABLE for name in metric.exported()]
    assert len(names) == len(set(names))
    for metric in TABLE:
        assert re.fullmatch(r"[a-z][a-z_]+[a-z]", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert metric.name.endswith("_seconds") or metric.kind != "histogram", metric.name
        assert bool(metric.buckets) == (metric.kind == "histogram")
        assert list(metric.buckets) == sorted(set(metric.buckets))
        assert set(metric.labels) <= LABELS, metric.name
        assert metric.help.endswith(".")
        assert not metric.counted or metric.sources in (("worker",), ("api",)), "its total would be counted twice"


def test_the_table_holds_every_metric_of_the_module() -> None:
    assert {metric.name for metric in vars(metrics).values() if isinstance(metric, Metric)} == {
        metric.name for metric in TABLE
    }


def test_no_other_module_spells_a_name() -> None:
    whole = re.compile("mimoq_(?:worker|api)_|" + "|".join(rf"\bmimoq_{metric.name}\b" for metric in TABLE))
    for folder in ("jobs", "worker", "api", "producers"):
        for path in (ROOT / folder).rglob("*.py"):
            if path == ROOT / "jobs/metrics.py":
                continue
            tree = ast.parse(path.read_text(encoding="utf-8"))
            docs = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
            for node in ast.walk(tree):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docs:
                    assert not whole.search(node.value), path


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("accept", ["", "application/openmetrics-text"])
def test_what_is_exported_is_the_table(source: Source, accept: str) -> None:
    found = {family.name: family for family in families(source, {})}
    wanted = {name: metric for metric in TABLE for name in metric.exported() if name.startswith(PREFIXES[source])}
    if source == "store":
        wanted = {name: metric for name, metric in wanted.items() if name == PREFIXES["store"] + metric.name}
    assert set(found) == {name.removesuffix("_total") for name in wanted}
    text, content_type = render(found.values(), accept)
    assert ("openmetrics" in content_type) == bool(accept)
    for name, metric in wanted.items():
        shown = name.removesuffix("_total") if accept else name
        assert f"# TYPE {shown} {metric.kind}\n".encode() in text
        assert f"# HELP {shown} ".encode() in text


def test_the_page_names_every_exported_name_and_no_other() -> None:
    page = (ROOT / "docs/metrics.md").read_text(encoding="utf-8").partition("| metric |")[2]
    assert set(re.findall(r"`(mimoq_\w+)`", page)) == {name for metric in TABLE for name in metric.exported()}


def test_the_process_tells_of_itself() -> None:
    assert {family.name for family in process()} >= {"process_cpu_seconds", "process_resident_memory_bytes"}


# -- counting


def test_a_counter_counts_by_its_labels() -> None:
    counts = Tally()
    counts.add(TOKENS, "prompt", "m", amount=3)
    counts.add(TOKENS, "prompt", "m", amount=4)
    counts.add(TOKENS, "completion", "m", amount=1)
    assert sample(counts.cells) == {
        "mimoq_worker_tokens_total|prompt|m": 7,
        "mimoq_worker_tokens_total|completion|m": 1,
    } | dict.fromkeys((f"mimoq_worker_{name}_total" for name in ("late_answers", "fenced_ends", "lease_losses")), 0)


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text"])
def test_a_histogram_has_what_fell_up_to_each_end(accept: str) -> None:
    counts = Tally()
    for seconds in (0.005, 0.0051, 7.0, 1e6):
        counts.observe(SLOT_TIME, seconds, "bulk")
    found = sample(counts.cells, accept=accept)
    name = "mimoq_worker_time_to_slot_seconds"
    buckets = {key: value for key, value in found.items() if key.startswith(f"{name}_bucket")}
    assert len(buckets) == len(SLOT_TIME.buckets) + 1
    assert buckets[f"{name}_bucket|bulk|0.005"] == 1
    assert buckets[f"{name}_bucket|bulk|0.01"] == buckets[f"{name}_bucket|bulk|5.0"] == 2
    assert buckets[f"{name}_bucket|bulk|10.0"] == buckets[f"{name}_bucket|bulk|300.0"] == 3
    assert buckets[f"{name}_bucket|bulk|+Inf"] == found[f"{name}_count|bulk"] == 4
    assert found[f"{name}_sum|bulk"] == pytest.approx(1_000_007.0101)


def test_a_value_is_escaped() -> None:
    text, _ = render(families("worker", {(TOKENS.name, "prompt", 'a"b\\c\nd'): 1}), "")
    assert b'model="a\\"b\\\\c\\nd"' in text


# -- labels


def test_names_let_through_what_looks_like_a_model() -> None:
    names = Names("MaaS_Mimo_V2.5_20260423")
    for name in ("MaaS_Mimo_V2.5_20260423", "org/model:free@2024-01+x", "7b", "x" * 64):
        assert names(name) == name
    for name in ("", "x" * 65, "tell me a joke", "größe", "a\nb", 'a"b', "a{b}", "../x", " m", "m\n", "-m", "模型"):
        assert names(name) == "other"


def test_names_are_so_many_and_those_known_before_have_their_place() -> None:
    names = Names("mine", most=3)
    assert [names(name) for name in ("a", "b", "c", "a", "mine", "c")] == ["a", "b", "other", "a", "mine", "other"]
    assert MOST_NAMES == 100


# -- reports


class FakeStore:
    """Takes reports like count.lua, and fails when told to, before or after it has taken one."""

    def __init__(self) -> None:
        self.sent: list[tuple[Any, ...]] = []
        self.away = False

    async def __aenter__(self) -> None: ...

    async def evalsha(self, sha: str, count: int, *rest: Any) -> int:
        if self.away:
            raise RedisConnectionError("away")
        self.sent.append(rest)
        return 0


def told(sent: tuple[Any, ...]) -> tuple[int, dict[bytes, float]]:
    cells = sent[5:]
    return sent[2], dict(zip(cells[::2], cells[1::2], strict=True))


def test_a_report_tells_what_is_new_and_nothing_twice() -> None:
    counts, store = Tally(), FakeStore()
    reports = Reports(counts)

    async def main() -> None:
        await reports.report(store)
        assert store.sent == [], "there is nothing to tell"
        counts.add(LATE_ANSWERS)
        counts.add(TOKENS, "prompt", "m", amount=5)
        await reports.report(store)
        counts.add(LATE_ANSWERS)
        store.away = True
        for _ in range(2):
            with pytest.raises(RedisConnectionError):
                await reports.report(store)
        counts.add(LATE_ANSWERS)  # while the fate of the report before is unknown
        store.away = False
        await reports.report(store)
        await reports.report(store)
        await reports.report(store)

    asyncio.run(main())
    late, prompt = b'["late_answers_total"]', b'["tokens_total","prompt","m"]'
    reports_told = [told(sent) for sent in store.sent]
    assert [cells for _, cells in reports_told] == [{late: 1, prompt: 5}, {late: 1}, {late: 1}]
    numbers = [number for number, _ in reports_told]
    assert numbers == sorted(set(numbers))


def test_a_report_of_fractions_comes_to_an_end() -> None:
    counts, store = Tally(), FakeStore()
    reports = Reports(counts)

    async def main() -> None:
        for n in range(1, 50):
            counts.observe(CALL_TIME, 0.1 + n / 7, "/v1/messages", "m")
            await reports.report(store)
        before = len(store.sent)
        await reports.report(store)
        assert len(store.sent) == before

    asyncio.run(main())


def test_the_totals_leave_out_what_no_metric_has() -> None:
    good = {b'["calls_total","e","m","200","succeeded"]': b"3", b'["call_seconds","e","m","0.5"]': b"2"}
    bad = {
        b'["calls_total","e","m","200"]': b"1",
        b'["calls_total","e","m","200","succeeded"': b"1",
        b'["renamed_total"]': b"1",
        b'["jobs","queued","bulk"]': b"1",
        b'["call_seconds","e","m","0.51"]': b"1",
        b'["late_answers_total"]': b"many",
        b"[]": b"1",
        b"[1]": b"1",
        b"\xff": b"1",
    }
    assert totals(good | bad) == {
        (CALLS.name, "e", "m", "200", "succeeded"): 3,
        (CALL_TIME.name, "e", "m", "0.5"): 2,
    }
    assert tally.is_cell((CALL_TIME.name, "e", "m", "sum"))
