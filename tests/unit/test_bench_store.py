"""The benchmark of the store, without running it: its arithmetic, its inputs, its page."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import islice

import psutil
import pytest

from ops.bench.limits.report import Row
from ops.bench.limits.stand import Broken
from ops.bench.peak import Peak, ever_mb
from ops.bench.store import feed, report
from ops.bench.store.bench import Spent, scaled
from ops.bench.store.command import run
from ops.bench.store.million import Window, beside, together
from ops.bench.store.submitting import bytes_row
from tests.waiting import wait_for


def spent(cpu_s: float, seconds: float = 10.0) -> Spent:
    return Spent(seconds, cpu_s, 0, 0, 0, 0, 0)


def test_cpu_at_a_long_queue_is_set_against_that_at_a_short_one_round_by_round() -> None:
    # The machine slows down from round to round; the ratio is 1.05 in each, and over the target for Valkey alone.
    rounds = [
        (Window(10_000, slow * 8.0, spent(slow * 1.0)), Window(20_000, slow * 16.6, spent(slow * 2.3)))
        for slow in (1.0, 1.5, 3.0)
    ]
    both, worker, valkey, rate = beside(rounds, 10_000, 1_000_000)
    assert both.measured == "1.418 / 1.350 (1.05 ×)"
    assert worker.measured == "1.245 / 1.200 (1.04 ×)"
    assert valkey.measured == "0.172 / 0.150 (1.15 ×)"
    assert [row.met for row in (both, worker, valkey)] == [True, True, False]
    assert rate.measured == "1,500"


def test_what_is_spent_between_two_moments_and_in_several_windows() -> None:
    one, other = Spent(5.0, 1.0, 100, 10, 7, 50, 1_000), Spent(15.0, 3.5, 1_100, 60, 27, 150, 9_000)
    between = other.since(one)
    assert between == Spent(10.0, 2.5, 1_000, 50, 20, 100, 8_000)
    assert together([between, between]).commands == 40


def test_memory_is_held_to_its_target() -> None:
    assert bytes_row("queued", 350, 349.6).met
    missed = bytes_row("queued", 350, 350.4)
    assert (missed.met, missed.measured) == (False, "350")


@pytest.mark.parametrize(("scale", "jobs"), [(1.0, 200_000), (0.05, 10_000), (0.00001, 50), (0.0007, 150)])
def test_a_part_of_the_jobs_is_whole_slices(scale: float, jobs: int) -> None:
    assert scaled(200_000, scale) == jobs


def test_every_submit_gets_the_same_requests_with_ids_of_ten_characters() -> None:
    bodies = list(islice(feed.bodies(20), 20))
    bare = [json.loads(line) for line in feed.lines(20, ids=False)]
    named = [json.loads(line) for line in feed.lines(20, ids=True)]
    assert bare == bodies == [line["body"] for line in named]
    assert {len(line["custom_id"]) for line in named} == {10}
    assert len({line["custom_id"] for line in named}) == 20
    assert {len(body["messages"][0]["content"]) for body in bodies} == {feed.PROMPT_BYTES}


def test_the_peak_of_a_program_is_its_own_and_found_though_it_is_over() -> None:
    held = bytearray(150_000_000)  # a child does not inherit this process's peak
    program = "held = b'x' * 60_000_000; del held; print('done', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"done\n"
        with Peak(psutil.Process(child.pid), ever_mb) as peak:
            wait_for(lambda: peak.most_mb > 60, what="a peak that is past")
        child.communicate(b"\n")
    assert len(held) == 150_000_000
    assert peak.most_mb < 140


def test_what_a_program_says_and_why_it_failed() -> None:
    assert run([sys.executable, "-c", "print('done')"], {}).out == "done"
    with pytest.raises(Broken, match="ended with 3: no such thing"):
        run([sys.executable, "-c", "import sys; sys.stderr.write('no such thing'); sys.exit(3)"], {})


def test_the_whole_table_has_one_head_and_counts_what_was_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "circumstances", lambda: "Here.")
    rows = {"a": [Row("x", "1", "2", True)], "b": [Row("y", "1", "0", False), Row("z", "", "7")]}
    told = report.whole(rows, 61.0)
    assert told.count("| scenario |") == 1
    assert told.splitlines()[2:5] == ["| a | x | 1 | 2 |", "| b | y | 1 | 0, **missed** |", "| b | z |  | 7 |"]
    assert "1 of 2 targets were met, in 61 s. Here." in told
