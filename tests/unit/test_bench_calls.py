"""What can be wrong in the benchmark of calls: its texts, its window, its ratios, its table, its environments."""

from __future__ import annotations

import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest

from ops.bench.calls import bench, chart, environments, table
from ops.bench.calls.bench import Found, Result
from ops.bench.calls.environments import NotInstalled
from ops.bench.calls.measure import CALLER, LOAD, OTHERS, SIMULATOR, Look, Measured, measured
from ops.bench.calls.rows import ROWS, Row
from ops.bench.calls.runs import Run, Trial
from ops.bench.calls.tail import reached
from ops.bench.corpus import Corpus
from ops.bench.limits.stand import Broken
from ops.simulator.ledger import Call


def look(at: float, ended: int, caller_s: float, rss_mb: float = 10.0) -> Look:
    return Look(
        at,
        ended,
        {CALLER: caller_s, "valkey": caller_s / 10, SIMULATOR: 5 * caller_s, LOAD: caller_s, OTHERS: caller_s},
        rss_mb,
    )


LOOKS = [
    look(0.0, 0, 1.0),
    look(1.0, 90, 1.5),
    look(2.0, 110, 2.0),
    look(4.0, 500, 3.0, 30.0),
    look(6.0, 910, 4.0),
    look(9.0, 1000, 9.0),
]


class TestCorpus:
    def test_the_same_seed_gives_the_same_texts_and_another_others(self) -> None:
        first, again, other = Corpus(1), Corpus(1), Corpus(2)
        texts = [first.text(500) for _ in range(5)]
        assert texts == [again.text(500) for _ in range(5)]
        assert len(set(texts)) == 5
        assert texts[0] != other.text(500)

    @pytest.mark.parametrize("size", [1, 500, 1_000_000])
    def test_a_text_has_its_bytes(self, size: int) -> None:
        assert len(Corpus().text(size).encode()) == size

    def test_it_compresses_as_language_does_and_asking_draws_none(self) -> None:
        corpus = Corpus()
        assert 0.4 < corpus.ratio(500) < 0.7
        assert corpus.text(500) == Corpus().text(500)

    def test_a_body_is_a_request_of_one_text(self) -> None:
        body = Corpus(3).body(500)
        assert body["messages"] == [{"role": "user", "content": Corpus(3).text(500)}]


class TestWindow:
    def test_it_is_from_a_tenth_to_nine_tenths_of_the_jobs(self) -> None:
        found = measured(LOOKS, 1000)
        assert found.jobs_per_s == pytest.approx(800 / 4)
        assert found.caller_ms == pytest.approx(2000 / 800)
        assert found.cpu_ms == pytest.approx(2200 / 800)  # of what is the row's
        assert found.rss_mb == 30
        assert found.cores[SIMULATOR] == pytest.approx(10 / 4)

    def test_the_whole_costs_from_the_first_look_to_the_last_and_is_as_fast(self) -> None:
        found = measured(LOOKS, 1000, whole=True)
        assert found.jobs_per_s == pytest.approx(800 / 4)
        assert found.caller_ms == pytest.approx(8000 / 1000)

    @pytest.mark.parametrize(
        "looks",
        [[], LOOKS[3:], LOOKS[:4], [look(0.0, 0, 1.0), look(1.0, 1000, 2.0)]],
        ids=["none", "late", "cut", "one"],
    )
    def test_looks_that_tell_nothing_are_no_figures(self, looks: list[Look]) -> None:
        with pytest.raises(Broken):
            measured(looks, 1000)


def test_the_ramp_up_is_over_when_so_many_are_in_flight_at_once() -> None:
    calls = [
        Call(number=n, at=at, end=end, path="", in_flight=1)
        for n, (at, end) in enumerate([(1, 3), (2, 9), (4, 8), (5, 9)])
    ]
    assert reached(calls, 2) == 2
    assert reached(calls, 3) == 5
    assert reached(calls, 4) is None


def row(name: str) -> Row:
    return next(each for each in ROWS if each.name == name)


def result(name: str, *jobs_per_s: float, caller_ms: float = 1.0) -> Result:
    rounds = [Measured(rate, 2.0, caller_ms, 100.0, {CALLER: 0.5, SIMULATOR: 0.25}) for rate in jobs_per_s]
    return Result(row(name), {100: 1.0, 200: 2.0}, rounds)


FOUND = Found(
    [
        result("httpx", 1000, caller_ms=0.8),
        result("celery", 70, 50, 10),
        result("celery-tuned", 500),
        result("mimoq", 900, 1100, 1000, caller_ms=1.0),
        Result(row("litellm"), failed="could not be installed: no index | here"),
    ],
    tail=[0.96, 0.90, 0.97],
)


class TestTable:
    def test_a_ratio_is_of_medians_and_says_when_it_is_missed(self) -> None:
        told = table.ratios(FOUND)
        assert "| jobs/s against plain Celery with defaults, one httpx.Client | ≥ 20 × | 20.00 × |" in told
        assert "| jobs/s against the tuned plain Celery | ≥ 4 × | 2.00 ×, **missed** |" in told
        assert "| ≤ 1.25 × | 1.25 × |" in told
        assert "| jobs/s against LiteLLM | ≥ 8 × | not run |" in told
        assert "| ≥ 95% | 96.0% |" in told

    def test_a_row_has_its_medians_and_the_best_concurrency(self) -> None:
        assert "| the same, one httpx.Client for all | 200 | 50 | 2.00 | 1.00 | 100 |" in table.rows(FOUND)

    def test_a_row_that_could_not_be_run_says_why(self) -> None:
        assert "| LiteLLM acompletion |  |  |  |  | could not be installed: no index / here |" in table.rows(FOUND)

    def test_rows_that_were_not_asked_for_have_no_ratios(self) -> None:
        assert "openai" not in table.ratios(FOUND)

    def test_the_chart_is_a_drawing_with_a_bar_for_each_row_that_ran(self) -> None:
        drawn = ElementTree.fromstring(chart.bars(FOUND))
        assert len(drawn.findall("{http://www.w3.org/2000/svg}rect")) == 1 + 4


def dummy(run: Run, *tried: int) -> Row:
    return Row("dummy", "a row", run, tried, 100)


def results(row: Row) -> list[Result]:
    whole = bench.Bench([row], False, 1)
    whole.run()
    return whole.found.results


class TestCourse:
    def test_the_best_concurrency_is_measured_three_times(self, capsys: pytest.CaptureFixture[str]) -> None:
        asked: list[int] = []

        def run(trial: Trial) -> Measured:
            asked.append(trial.concurrency)
            return Measured({10: 5.0, 20: 9.0, 30: 7.0}[trial.concurrency], 1, 1, 1, {CALLER: 1.0})

        (found,) = results(dummy(run, 10, 20, 30))
        assert asked == [10, 20, 30, 20, 20, 20]
        assert found.concurrency == 20
        assert len(found.rounds) == 3

    @pytest.mark.parametrize(
        ("error", "said"),
        [(NotInstalled("no index"), "could not be installed: no index"), (Broken("x"), "could not be run: x")],
    )
    def test_a_row_that_fails_is_told_of_and_not_tried_again(
        self, error: Exception, said: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        asked: list[int] = []

        def run(trial: Trial) -> Measured:
            asked.append(trial.concurrency)
            raise error

        (found,) = results(dummy(run, 10, 20))
        assert (found.failed, asked) == (said, [10])
        assert said in capsys.readouterr().err


class TestEnvironments:
    def test_a_peer_that_pip_does_not_find_is_not_installed_and_says_why(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # A real environment takes seconds to make. Its end is pip's own: words, and a status.
        def refused(argv: list[str], **_: object) -> subprocess.CompletedProcess[str]:
            said = "WARNING: Retrying\nERROR: Could not find it\nERROR: No matching distribution found for x==1\n\n"
            return subprocess.CompletedProcess(argv, int("pip" in argv), "", said)

        monkeypatch.setattr(subprocess, "run", refused)
        with pytest.raises(NotInstalled, match=r"^No matching distribution found for x==1$"):
            environments.made(tmp_path / "peer", ["x==1"])
        assert not (tmp_path / "peer" / "requirements.json").exists()

    def test_one_that_is_there_is_used_until_its_requirements_change(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ran: list[list[str]] = []

        def made(argv: list[str], **_: object) -> subprocess.CompletedProcess[str]:
            ran.append(argv)
            (tmp_path / "bin").mkdir(parents=True, exist_ok=True)
            (tmp_path / "bin" / "python").touch()
            return subprocess.CompletedProcess(argv, 0, "", "")

        monkeypatch.setattr(subprocess, "run", made)
        for requirements in (["a==1"], ["a==1"], ["a==2"]):
            assert environments.made(tmp_path, requirements) == tmp_path / "bin" / "python"
        assert [argv[-1] for argv in ran] == [str(tmp_path), "a==1", str(tmp_path), "a==2"]

    def test_everything_is_pinned(self) -> None:
        assert all(version.partition(" ")[2] for version in environments.versions())
