"""The command line, in this process: statuses and one-line messages for everything that is wrong before a job exists."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from jobs import identity, keys
from jobs.connections import connect
from producers import cli
from tests.integration.store_model import live_worker

KEY = "sk-not-for-your-eyes"
GOOD = json.dumps({"prompt": "What is a queue?"}) + "\n"

#: `mimoq ARGS` with stdin as given: its status, stdout and stderr.
Mimoq = Callable[..., tuple[int, str, str]]


class NoStore:
    """A connection that must not be used: what is refused must not have reached the store."""

    server = None
    closed = 0

    def __init__(self, settings: Any, say: Any) -> None:
        self.settings = settings

    @property
    def store(self) -> object:
        return self

    def close(self) -> None:
        NoStore.closed += 1


@pytest.fixture
def mimoq(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Mimoq:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MIMOQ_API_KEY", KEY)
    monkeypatch.setattr("producers.run.Connection", NoStore)
    Path("in.jsonl").write_text(GOOD)

    def call(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mimoq", *args])
        status = cli.main()
        out, err = capsys.readouterr()
        assert KEY not in out + err
        return status, out, err

    return call


def refused(answer: tuple[int, str, str], *parts: str) -> None:
    """Status 2, nothing on stdout, and one last line on stderr that says it."""
    status, out, err = answer
    assert (status, out) == (2, "")
    last = err.splitlines()[-1]
    assert all(part in last for part in parts), err
    assert "Traceback" not in err


# -- how it is called


def test_help_says_what_there_is(mimoq: Mimoq) -> None:
    status, out, err = mimoq("--help")
    assert (status, err) == (0, "")
    own = ("run", "validate", "submit", "status", "results", "cancel", "serve", "token", "config")
    for command in (*own, "api", "worker", "simulator"):
        assert f"  {command} " in out
        assert mimoq(command, "--help")[0] == 0 if command in own else True


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["frobnicate"], "No such command"),
        (["run"], "Missing argument"),
        (["run", "in.jsonl", "--nonsense"], "No such option"),
        (["run", "in.jsonl", "--rpm", "many"], "--rpm"),
        (["run", "in.jsonl", "--workers", "-1"], "--workers"),
        (["run", "in.jsonl", "--max-attempts", "0"], "--max-attempts"),
        (["run", "in.jsonl", "other.jsonl"], "unexpected extra argument"),
        (["submit", "in.jsonl", "--deadline", "soon"], "--deadline"),
        (["submit", "in.jsonl", "--deadline", "0"], "deadline_s: must be over 0"),
        (["submit", "in.jsonl", "--idempotency-key", ""], "idempotency_key: must not be empty"),
        (["results"], "Missing argument"),
        (["cancel"], "Missing argument"),
    ],
)
def test_a_call_that_makes_no_sense_is_refused(mimoq: Mimoq, args: list[str], part: str) -> None:
    refused(mimoq(*args), part)


def test_a_fault_of_our_own_shows_itself(mimoq: Mimoq, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> NoReturn:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "effective", fail)
    with pytest.raises(ZeroDivisionError):
        mimoq("config")


def test_ctrl_c_before_anything_began(mimoq: Mimoq, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(**_: Any) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "effective", interrupt)
    assert mimoq("config") == (130, "", "")


@pytest.mark.parametrize(("command", "module"), [("worker", "worker"), ("simulator", "ops.simulator")])
def test_worker_and_simulator_become_their_own_entry_points(
    mimoq: Mimoq, monkeypatch: pytest.MonkeyPatch, command: str, module: str
) -> None:
    class Became(Exception):
        pass

    def become(program: str, argv: list[str]) -> NoReturn:
        raise Became(program, argv)

    monkeypatch.setattr(os, "execv", become)
    with pytest.raises(Became) as became:
        mimoq(command, "--port", "0", "--help")
    assert became.value.args == (sys.executable, [sys.executable, "-P", "-m", module, "--port", "0", "--help"])


# -- run


@pytest.mark.parametrize("key", [None, "", "  "])
def test_a_run_without_a_key_says_what_to_set(mimoq: Mimoq, monkeypatch: pytest.MonkeyPatch, key: str | None) -> None:
    if key is None:
        monkeypatch.delenv("MIMOQ_API_KEY")
    else:
        monkeypatch.setenv("MIMOQ_API_KEY", key)
    answer = mimoq("run", "in.jsonl")
    refused(answer, "MIMOQ_API_KEY", "--simulate")
    assert len(answer[2].splitlines()) == 1


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["missing.jsonl"], ["missing.jsonl", "No such file"]),
        (["."], [". is a folder"]),
        (["x" * 300], ["File name too long"]),
        (["in.jsonl/x"], ["Not a directory"]),
        (["-"], ["-o"]),
        (["in.jsonl", "-o", "no/out.jsonl"], ["no does not exist"]),
        (["in.jsonl", "-o", "."], ["is a folder"]),
        (["in.jsonl", "-o", "in.jsonl"], ["is the input"]),
        (["in.jsonl", "-o", "./in.jsonl"], ["is the input"]),
        (["in.jsonl", "--errors", "in.jsonl"], ["is the input"]),
        (["in.jsonl", "-o", "same", "--errors", "same"], ["answers and errors both"]),
        (["in.jsonl", "--errors", "no/errors"], ["no does not exist"]),
        (["in.jsonl", "--endpoint", "/v1/embeddings"], ["--endpoint", "/v1/chat/completions", "/v1/messages"]),
        (["in.jsonl", "--rpm", "0"], ["MIMOQ_RPM"]),
        (["in.jsonl", "--tpm", "-5"], ["MIMOQ_TPM"]),
        (["in.jsonl", "--max-in-flight", "0"], ["MIMOQ_MAX_IN_FLIGHT"]),
    ],
)
def test_a_run_that_can_not_be_meant_is_refused(
    mimoq: Mimoq, monkeypatch: pytest.MonkeyPatch, args: list[str], parts: list[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(GOOD.encode()))
    answer = mimoq("run", *args)
    refused(answer, *parts)
    assert len(answer[2].splitlines()) == 1
    assert sorted(path.name for path in Path().iterdir()) in (["in.jsonl"], [".mimoq", "in.jsonl"])


class Stdin:
    """A standard input with these bytes."""

    def __init__(self, data: bytes) -> None:
        import io

        self.buffer = io.BytesIO(data)


def test_a_closed_standard_input_is_told(mimoq: Mimoq, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    refused(mimoq("run", "-", "-o", "out"), "standard input is closed")


def test_standard_input_that_can_not_be_kept_is_told(mimoq: Mimoq, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(GOOD.encode()))
    refused(mimoq("run", "-", "-o", "out", "--data-dir", "in.jsonl/x"), "--data-dir")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_as_input_is_refused(mimoq: Mimoq) -> None:
    read, write = os.pipe()
    os.write(write, GOOD.encode())
    try:
        refused(mimoq("run", f"/dev/fd/{read}", "-o", "out"), "only once", "mimoq run - <")
    finally:
        os.close(read)
        os.close(write)


def test_an_output_of_something_else_is_refused(mimoq: Mimoq) -> None:
    for name in ("in.out.jsonl", "in.out.errors.jsonl"):
        Path(name).write_text("my letters\n")
        refused(mimoq("run", "in.jsonl"), name, "--overwrite")
        refused(mimoq("run", "in.jsonl", "--fresh"), name, "--overwrite")
        assert Path(name).read_text() == "my letters\n"
        Path(name).unlink()
    assert NoStore.closed


def test_bad_lines_are_told_and_nothing_is_submitted(mimoq: Mimoq) -> None:
    lines = [GOOD, '{"prompt":"x","temperature":1.9}\n', "\n", "nonsense\n", *['{"messages":[]}\n'] * 120]
    Path("in.jsonl").write_text("".join(lines))
    for command in ("run", "validate"):
        status, out, err = mimoq(command, "in.jsonl")
        told = err.splitlines()
        assert (status, out) == (2, "")
        assert told[0] == "line 2: temperature: 1.9 is over 1.5"
        assert told[1].startswith("line 4: ")
        assert len([line for line in told if line.startswith("line ")]) == 100
        assert told[-2] == "... and 22 more"
        assert told[-1].startswith("mimoq: 122 bad lines, nothing was submitted")
        assert "--skip-invalid" in told[-1]
    assert not Path("in.out.jsonl").exists()


def test_skipping_every_line_leaves_nothing_to_run(mimoq: Mimoq) -> None:
    Path("in.jsonl").write_text("nonsense\n")
    answer = mimoq("run", "in.jsonl", "--skip-invalid")
    refused(answer, "1 bad lines, nothing was submitted")
    assert "--skip-invalid" not in answer[2]


def test_an_empty_file_is_refused(mimoq: Mimoq) -> None:
    Path("in.jsonl").write_text("\n\n")
    for command in ("run", "validate"):
        refused(mimoq(command, "in.jsonl"), "nothing was submitted")


def test_an_input_that_changed_after_it_was_judged_is_not_submitted(
    mimoq: Mimoq, monkeypatch: pytest.MonkeyPatch
) -> None:
    from producers import run

    class Store(NoStore):
        def batch_of_identity(self, identity: str) -> None:
            # Between the two passes over the file.
            with Path("in.jsonl").open("a") as file:
                file.write(GOOD)

        def submit(self, requests: Any, new: Any) -> NoReturn:
            list(requests)
            raise AssertionError("submitted")

    monkeypatch.setattr(run, "Connection", Store)
    refused(mimoq("run", "in.jsonl"), "changed", "nothing was submitted")


# -- validate


def test_validate_counts_and_warns(mimoq: Mimoq, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("in.jsonl").write_text(GOOD + '{"prompt":"x","seed":1}\n')
    status, out, err = mimoq("validate", "in.jsonl")
    assert (status, out) == (0, "")
    warning, count = err.splitlines()
    assert "seed" in warning
    assert count == "2 requests, all good"
    monkeypatch.setattr(sys, "stdin", Stdin(GOOD.encode()))
    assert mimoq("validate", "-")[0] == 0
    refused(mimoq("validate", "missing.jsonl"), "No such file")
    refused(mimoq("validate", "in.jsonl", "--endpoint", "/v2"), "--endpoint")


def test_validate_uses_the_endpoint_and_the_model_it_is_given(mimoq: Mimoq) -> None:
    Path("in.jsonl").write_text('{"messages":[{"role":"user","content":"x"}],"max_tokens":5}\n')
    assert mimoq("validate", "in.jsonl", "--endpoint", "/v1/messages", "--model", "m")[0] == 0


# -- config


def test_config_shows_values_and_where_they_came_from(mimoq: Mimoq, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIMOQ_REDIS_URL", f"redis://:{KEY}@h/0")
    monkeypatch.setenv("MIMOQ_RPM", "")
    Path(".env").write_text("MIMOQ_TPM=5000\n")
    status, out, err = mimoq("config", "--data-dir", "here")
    assert (status, err) == (0, "")
    shown = dict(line.split("=", 1) for line in out.splitlines())
    assert shown["MIMOQ_API_KEY"].startswith("*")
    assert shown["MIMOQ_API_KEY"].endswith("  # environment")
    assert shown["MIMOQ_REDIS_URL"].startswith("*")
    assert shown["MIMOQ_TPM"] == "5000  # .env"
    assert shown["MIMOQ_RPM"] == "(unset)  # default"
    assert shown["MIMOQ_DATA_DIR"] == "here  # command line"
    assert shown["MIMOQ_SLICE_SIZE"] == "50  # default"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("BASE_URL", "ftp://x"),
        ("BASE_URL", f"https://user:{KEY}@h"),
        ("BASE_URL", "http://example.org"),
        ("REDIS_URL", f"http://:{KEY}@h"),
        ("RPM", "many"),
        ("API_KEY", f"{KEY} {KEY}"),
        ("LOG_LEVEL", "loud"),
    ],
)
def test_a_bad_setting_is_one_line_without_its_secret(
    mimoq: Mimoq, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"MIMOQ_{name}", value)
    for command in (["config"], ["run", "in.jsonl"], ["validate", "in.jsonl"], ["status"]):
        answer = mimoq(*command)
        refused(answer, f"MIMOQ_{name}" if name != "BASE_URL" or "example" not in value else "BASE_URL")
        assert len(answer[2].splitlines()) == 1


# -- batches


@pytest.mark.parametrize("command", [["status"], ["results"], ["cancel"], ["results", "--follow"]])
@pytest.mark.parametrize("batch", ["nope", "0123456789abcdef01234567", ""])
def test_a_batch_that_is_not_there_is_told(
    mimoq: Mimoq, monkeypatch: pytest.MonkeyPatch, store_url: str, command: list[str], batch: str
) -> None:
    monkeypatch.setenv("MIMOQ_REDIS_URL", store_url)
    refused(mimoq(*command, batch), "there is no batch")


def test_a_store_that_is_away_is_told(mimoq: Mimoq, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a line while it is waited for, then with one of how that ended."""
    monkeypatch.setenv("MIMOQ_REDIS_URL", "unix:///nowhere/valkey.sock")
    commands = (["status"], ["results", "b"], ["cancel", "b"], ["pause", "b"], ["resume", "b"], ["submit", "in.jsonl"])
    for patience_s, said in (("0", []), ("0.5", ["waiting for the store"])):
        monkeypatch.setenv("MIMOQ_STORE_PATIENCE_S", patience_s)
        for command in commands:
            status, out, err = mimoq(*command)
            assert (status, out) == (1, "")
            assert [line.split(":")[0] for line in err.splitlines()] == [*said, "mimoq"]
            assert all(
                "Redis does not answer (ConnectionError): check MIMOQ_REDIS_URL" in line for line in err.splitlines()
            )


def test_a_queued_batch_without_workers(
    mimoq: Mimoq, monkeypatch: pytest.MonkeyPatch, store_url: str, tmp_path: Path
) -> None:
    monkeypatch.setenv("MIMOQ_REDIS_URL", store_url)
    assert mimoq("status") == (0, "no batches\n0 live workers\n", "")
    Path("in.jsonl").write_text(GOOD + '{"custom_id":"mine","prompt":"x"}\n')
    refused(mimoq("submit", "in.jsonl", "--lane", "fast"), "lane")
    status, out, err = mimoq("submit", "in.jsonl", "--lane", "interactive", "--max-attempts", "2")
    assert (status, err) == (0, "")
    batch = out.strip()
    assert out == f"{batch}\n"
    assert mimoq("results", batch) == (0, "", "")
    status, out, _ = mimoq("status", batch, "--json")
    told = json.loads(out)
    assert (status, told["batch_id"], told["total"], told["queued"], told["lane"]) == (0, batch, 2, 2, "interactive")
    assert f"{batch}  running" in mimoq("status")[1]
    assert f"{batch}  running" in mimoq("status", f"{batch}-1")[1], "of the batch that a job is of"
    refused(mimoq("cancel", f"{batch}-1"), "one job of 2")
    status, out, err = mimoq("cancel", batch)
    assert (status, out) == (0, "")
    assert "2 cancelled, 0 answered, 0 still in flight" in err
    rows = [json.loads(line) for line in mimoq("results", batch, "--follow")[1].splitlines()]
    assert [row["custom_id"] for row in rows] == ["line-1", "mine"]
    assert {row["error"]["code"] for row in rows} == {"batch_cancelled"}
    assert mimoq("results", batch, "-o", "rows") == (0, "", "")
    assert [json.loads(line) for line in Path("rows").read_bytes().splitlines()] == rows
    refused(mimoq("results", batch, "-o", "."), "Is a directory")
    refused(mimoq("results", batch, "-o", "no/rows"), "No such file")
    if Path("/dev/full").exists():
        status, _, err = mimoq("results", batch, "-o", "/dev/full")
        assert (status, len(err.splitlines())) == (1, 1)
        assert "No space left on device" in err


def test_shut_gates_are_shown(mimoq: Mimoq, monkeypatch: pytest.MonkeyPatch, store_url: str) -> None:
    """By the server's clock, whatever this machine's says."""
    monkeypatch.setenv("MIMOQ_REDIS_URL", store_url)
    monkeypatch.setattr("producers.status.server_time", lambda client: 1_000_000.0)
    account = identity.account(KEY)
    client: Any = connect(store_url)
    outage = {"gate_reason": "outage", "gate_status": "", "gate_since": 999_999.5, "gate_until": 1_000_004}
    refused = {"gate_reason": "retry_after", "gate_status": 429, "gate_since": 999_990, "gate_until": 1_000_037.2}
    client.hset(keys.limit(account, "m2"), mapping=outage)
    client.hset(keys.limit(account, "m1"), mapping=refused)
    client.hset(keys.limit("another", "m1"), mapping=refused)
    client.zadd(keys.LIMITS, {f"{account}:m2": 1, f"{account}:m1": 2, "another:m1": 3})
    shut = {"reason": "key_refused", "status": 401, "since": 900_000, "until": 0, "step_s": 1, "refused_at": 950_000}
    client.hset(keys.gate(account), mapping=shut)
    live_worker(client, account="another")
    assert mimoq("status", "--json") == (0, "", "")
    lines = mimoq("status")[1].splitlines()
    assert sorted(line for line in lines if "shut" in line) == sorted(
        [
            f"account {account} is shut: key_refused (401) since 1970-01-11T10:00:00Z, next probe in 0 s",
            f"model m1 of account {account} is shut: retry_after (429) since 1970-01-12T13:46:30Z, next probe in 37 s",
            f"model m2 of account {account} is shut: outage since 1970-01-12T13:46:39Z, next probe in 4 s",
            "model m1 of account another is shut: retry_after (429) since 1970-01-12T13:46:30Z, next probe in 37 s",
        ]
    )
    mimoq("submit", "in.jsonl")
    mimoq("submit", "in.jsonl")
    objects = [json.loads(line) for line in mimoq("status", "--json")[1].splitlines()]
    assert [told["state"] for told in objects] == ["running", "running"]
    for told in objects:
        assert [(gate["account"], gate["model"], gate["reason"], gate["status"]) for gate in told["gates"]] == [
            (account, None, "key_refused", 401),
            (account, "m1", "retry_after", 429),
            (account, "m2", "outage", None),
        ]
        assert (told["gates"][1]["since"], told["gates"][1]["until"]) == (999_990.0, 1_000_037.2)
    client.delete(keys.gate(account), keys.LIMITS)
    assert "shut" not in mimoq("status")[1]
    assert json.loads(mimoq("status", "--json")[1].splitlines()[0])["gates"] == []
    client.close()


def test_a_pause_is_shown_with_its_reason(mimoq: Mimoq, monkeypatch: pytest.MonkeyPatch, store_url: str) -> None:
    monkeypatch.setenv("MIMOQ_REDIS_URL", store_url)
    batch = mimoq("submit", "in.jsonl")[1].strip()
    client: Any = connect(store_url)
    client.hset(
        keys.batch(batch), mapping={"state": "paused", "reason": "the first 20 jobs all failed alike: http_404"}
    )
    client.close()
    (line,) = [line for line in mimoq("status", batch)[1].splitlines() if line.startswith(batch)]
    assert line.startswith(f"{batch}  paused ")
    assert line.endswith("  (the first 20 jobs all failed alike: http_404)")
    told = json.loads(mimoq("status", batch, "--json")[1])
    assert (told["state"], told["reason"]) == ("paused", "the first 20 jobs all failed alike: http_404")


def test_submitting_bad_lines_submits_none(mimoq: Mimoq, monkeypatch: pytest.MonkeyPatch, store_url: str) -> None:
    monkeypatch.setenv("MIMOQ_REDIS_URL", store_url)
    Path("in.jsonl").write_text(GOOD + "nonsense\n")
    refused(mimoq("submit", "in.jsonl"), "1 bad lines, nothing was submitted")
    assert mimoq("status", "--json") == (0, "", "")


def test_a_repeated_submit_gives_the_batch_that_is_there(
    mimoq: Mimoq, monkeypatch: pytest.MonkeyPatch, store_url: str
) -> None:
    monkeypatch.setenv("MIMOQ_REDIS_URL", store_url)
    args = ("submit", "in.jsonl", "--idempotency-key", KEY)
    status, batch, err = mimoq(*args, "--deadline", "1000")
    assert (status, err) == (0, "")
    client: Any = connect(store_url)
    assert client.zscore(keys.DEADLINES, batch.strip()) is not None
    assert not [name for name in client.keys("*") if KEY.encode() in name]
    assert KEY.encode() not in b"".join(client.hvals(keys.batch(batch.strip())))
    status, again, err = mimoq(*args)
    assert (status, again) == (0, batch)
    assert err == f"batch {batch.strip()} of this idempotency key was there already; nothing was submitted again\n"
    Path("in.jsonl").write_text(GOOD + GOOD.replace("queue", "ring"))
    refused(mimoq(*args), batch.strip(), "has other requests", "a key of their own")
    assert client.zcard(keys.BATCHES) == 1
    client.close()
