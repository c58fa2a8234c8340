"""The output files of a run: what is kept, what is cut, what is refused, whatever came before."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from jobs.errors import MimoqError, UsageError
from jobs.requests import InvalidLine, Problem
from jobs.results import About, Failure, StoredResult, Usage
from jobs.states import JobState
from producers import output as output_module
from producers.follow import Ended
from producers.output import OutputFile, check_paths, default_output, error_file
from producers.rows import Rows

IDENTITY = "0123456789abcdef"
BATCH = IDENTITY + "00000001"
OTHER = "f" * 24


def row(index: int, batch: str = BATCH, text: str = "ä") -> bytes:
    return f'{{"id":"batch_req_{batch}-{index}","custom_id":"c","response":"{text}"}}\n'.encode()


def indexes(bits: bytearray) -> list[int]:
    return [place * 8 + bit for place, byte in enumerate(bits) for bit in range(8) if byte >> bit & 1]


def ended(index: int, state: JobState = JobState.SUCCEEDED, body: str = "{}") -> Ended:
    failed = state is not JobState.SUCCEEDED
    about = About(
        f"c{index}",
        "/v1/chat/completions",
        Usage(),
        [],
        200,
        error=Failure("no_answer", "no answer") if failed else None,
    )
    stored = StoredResult("FAILURE" if failed else "SUCCESS", f"{BATCH}-{index}", msgspec.Raw(body.encode()), about)
    return Ended(BATCH, index, state, f"c{index}", stored)


def opened(folder: Path, **how: bool) -> Rows:
    rows = Rows(folder / "out", folder / "errors", IDENTITY)
    rows.open(**{"overwrite": False, "fresh": False, **how})
    return rows


def ids(path: Path) -> list[str]:
    return [json.loads(line)["id"] for line in path.read_bytes().splitlines()]


# -- one file


def test_a_file_that_is_not_there_is_made_by_its_first_row(tmp_path: Path) -> None:
    file = OutputFile(tmp_path / "out", IDENTITY)
    assert file.scan() == (bytearray(), set())
    file.mend()
    file.truncate()
    file.keep_invalid()
    file.write([])
    assert not file.path.exists()
    file.write([row(0), row(1)])
    file.close()
    file.close()
    assert file.path.read_bytes() == row(0) + row(1)


def test_scan_tells_jobs_and_invalid_lines(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(row(3) + row(11) + f'{{"id":"batch_req_{BATCH}-invalid-7",}}\n'.encode())
    file = OutputFile(path, IDENTITY)
    bits, invalid = file.scan()
    file.close()
    assert (indexes(bits), invalid) == ([3, 11], {7})


def test_a_row_torn_at_any_byte_is_cut_off_and_written_again(tmp_path: Path) -> None:
    path = tmp_path / "out"
    whole, last = row(0) + row(1), row(2)
    for cut in range(len(last)):
        path.write_bytes(whole + last[:cut])
        file = OutputFile(path, IDENTITY)
        bits, _ = file.scan()
        file.mend()
        assert (cut, indexes(bits), path.read_bytes()) == (cut, [0, 1], whole)
        file.write([last])
        file.close()
        assert path.read_bytes() == whole + last


def test_a_torn_row_longer_than_a_block_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_module, "_TAIL_BYTES", 16)
    path = tmp_path / "out"
    for before in (b"", row(0)):
        path.write_bytes(before + row(1, text="x" * 100)[:-1])
        file = OutputFile(path, IDENTITY)
        file.scan()
        file.mend()
        file.close()
        assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [
        b"hello\n",
        b"hello",
        b"\n",
        row(0) + b"\n",
        row(0) + row(1, OTHER),
        row(0) + row(1).replace(b'"id":', b'"id": '),
        b'{"custom_id":"a"',
        b"\x00" * 20,
    ],
)
def test_what_another_wrote_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "out"
    path.write_bytes(content)
    file = OutputFile(path, IDENTITY)
    with pytest.raises(UsageError, match=r"out holds something .* --overwrite"):
        file.scan()
    file.close()
    assert path.read_bytes() == content


def test_only_one_run_writes_a_file(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(row(0) + b"{")
    first, second = OutputFile(path, IDENTITY), OutputFile(path, IDENTITY)
    first.scan()
    # From the first look on: what the second read might be written on before it cuts the file.
    for use in (second.scan, second.mend, second.truncate, lambda: second.write([row(1)])):
        with pytest.raises(UsageError, match="another mimoq run"):
            use()
    assert path.read_bytes() == row(0) + b"{"
    first.close()
    second.scan()
    second.mend()
    second.close()
    assert path.read_bytes() == row(0)


def test_keep_invalid_leaves_the_rows_of_bad_lines(tmp_path: Path) -> None:
    path = tmp_path / "errors"
    bad = f'{{"id":"batch_req_{BATCH}-invalid-4","custom_id":null}}\n'.encode()
    path.write_bytes(row(0) + bad + row(9))
    file = OutputFile(path, IDENTITY)
    file.mend()
    file.keep_invalid()
    file.write([row(10)])
    file.close()
    assert path.read_bytes() == bad + row(10)


def test_a_full_disk_leaves_whole_rows(tmp_path: Path) -> None:
    file = OutputFile(tmp_path / "out", IDENTITY)
    file.write([row(0)])

    class Full:
        """A disk with room for 10 bytes more."""

        def __init__(self, inner: Any) -> None:
            self._inner = inner

        def write(self, data: bytes) -> None:
            self._inner.write(data[:10])

        def flush(self) -> None:
            self._inner.flush()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def fileno(self) -> int:
            return int(self._inner.fileno())

        def close(self) -> None:
            self._inner.close()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file._file = Full(file._file)  # type: ignore[assignment] # as much of a file as is used
    with pytest.raises(MimoqError, match=r"out can't be written \(No space left on device\).*run the same command"):
        file.write([row(1)])
    assert file.path.read_bytes() == row(0)
    file.write([row(1)])
    file.close()
    assert file.path.read_bytes() == row(0) + row(1)


def test_a_disk_that_refuses_at_the_end_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "fsync", refuse)
    file = OutputFile(tmp_path / "out", IDENTITY)
    file.write([row(0)])
    with pytest.raises(MimoqError, match="Disk quota exceeded"):
        file.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_a_device_is_written_and_never_cut() -> None:
    file = OutputFile(Path("/dev/full"), IDENTITY)
    assert file.scan() == (bytearray(), set())
    with pytest.raises(MimoqError, match="No space left on device"):
        file.write([row(0)])
    file.close()
    null = OutputFile(Path("/dev/null"), IDENTITY)
    null.write([row(0)])
    null.close()


def test_a_file_that_can_not_be_opened_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Not a directory"):
        OutputFile(Path("/dev/null/out"), IDENTITY).write([row(0)])


def test_usage_of_both_protocols_is_added_up(tmp_path: Path) -> None:
    chat = {
        "prompt_tokens": 10,
        "completion_tokens": 20,
        "total_tokens": 30,
        "completion_tokens_details": {"reasoning_tokens": 5},
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    message = {"input_tokens": 100, "output_tokens": 200, "cache_read_input_tokens": 50}
    path = tmp_path / "out"
    bodies: list[object] = [{"usage": chat}, {"usage": message}, {"usage": None}, None]
    lines = [json.dumps({"response": {"body": body}}) for body in bodies]
    path.write_text("\n".join([*lines, "not JSON", '{"response":null}', ""]))
    # What the cache gave stands beside `input_tokens`, and within `prompt_tokens`.
    assert OutputFile(path, IDENTITY).usage() == Usage(160, 220, 5, 54, 380)
    assert OutputFile(tmp_path / "none", IDENTITY).usage() == Usage()


# -- both files


def test_rows_go_where_they_belong_and_count_once(tmp_path: Path) -> None:
    rows = opened(tmp_path)
    rows.write([ended(0), ended(1, JobState.FAILED), ended(9)])
    rows.write([])
    rows.close()
    assert ids(tmp_path / "out") == [f"batch_req_{BATCH}-0", f"batch_req_{BATCH}-9"]
    assert ids(tmp_path / "errors") == [f"batch_req_{BATCH}-1"]
    again = opened(tmp_path)
    assert (indexes(again.written), again.count()) == ([0, 1, 9], 3)
    assert again.states(10) == b"sf\0\0\0\0\0\0\0s"
    assert again.states(5) == b"sf\0\0\0"
    again.close()


def test_no_row_means_no_states_and_no_usage(tmp_path: Path) -> None:
    rows = opened(tmp_path)
    assert (rows.states(4), rows.usage(), rows.count()) == (b"", Usage(), 0)
    assert not list(tmp_path.iterdir())


def test_a_job_whose_result_is_gone_gets_no_row_and_no_bit(tmp_path: Path) -> None:
    rows = opened(tmp_path)
    lost = Ended(BATCH, 1, JobState.SUCCEEDED, "c1", None)
    rows.written[:] = b"\x03"  # as the follower marks them
    rows.write([ended(0), lost])
    assert (rows.count(), ids(tmp_path / "out")) == (1, [f"batch_req_{BATCH}-0"])
    rows.close()


def test_invalid_lines_are_told_once_however_often_they_are_read(tmp_path: Path) -> None:
    line = InvalidLine([Problem("temperature", "1.9 is over 1.5")], "mine")
    for _ in range(2):
        rows = opened(tmp_path)
        rows.invalid(BATCH, 17, line)
        rows.invalid(BATCH, 17, line)
        rows.close()
    (told,) = (tmp_path / "errors").read_bytes().splitlines()
    error = {"code": "invalid_request", "message": "line 17: temperature: 1.9 is over 1.5"}
    assert json.loads(told) == {
        "id": f"batch_req_{BATCH}-invalid-17",
        "custom_id": "mine",
        "response": None,
        "error": error,
    }


def test_forget_failed_keeps_answers_and_bad_lines(tmp_path: Path) -> None:
    rows = opened(tmp_path)
    rows.write([ended(0), ended(1, JobState.FAILED)])
    rows.invalid(BATCH, 5, InvalidLine([Problem("", "is not JSON")]))
    rows.close()
    rows = opened(tmp_path)
    rows.forget_failed()
    assert (indexes(rows.written), rows.states(2)) == ([0], b"s\0")
    rows.write([ended(1)])
    rows.close()
    assert ids(tmp_path / "out") == [f"batch_req_{BATCH}-0", f"batch_req_{BATCH}-1"]
    assert ids(tmp_path / "errors") == [f"batch_req_{BATCH}-invalid-5"]


def test_fresh_begins_both_files_anew(tmp_path: Path) -> None:
    rows = opened(tmp_path)
    rows.write([ended(0), ended(1, JobState.FAILED)])
    rows.close()
    rows = opened(tmp_path, fresh=True)
    assert rows.count() == 0
    rows.write([ended(1)])
    rows.close()
    assert ids(tmp_path / "out") == [f"batch_req_{BATCH}-1"]
    assert (tmp_path / "errors").read_bytes() == b""


@pytest.mark.parametrize("name", ["out", "errors"])
def test_foreign_rows_are_written_over_only_when_told_so(tmp_path: Path, name: str) -> None:
    foreign = row(0, OTHER)
    for fresh in (False, True):
        (tmp_path / name).write_bytes(foreign)
        rows = Rows(tmp_path / "out", tmp_path / "errors", IDENTITY)
        with pytest.raises(UsageError, match="--overwrite"):
            rows.open(overwrite=False, fresh=fresh)
        rows.close()
        assert (tmp_path / name).read_bytes() == foreign
        rows = opened(tmp_path, overwrite=True, fresh=fresh)
        rows.close()
        assert (tmp_path / name).read_bytes() == b""


def test_overwrite_keeps_rows_of_our_own(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(row(4))
    rows = opened(tmp_path, overwrite=True)
    rows.close()
    assert indexes(rows.written) == [4]


# -- paths


def test_names_are_derived_from_the_input() -> None:
    assert default_output(Path("a/prompts.jsonl")) == Path("a/prompts.out.jsonl")
    assert default_output(Path("prompts")) == Path("prompts.out.jsonl")
    assert error_file(Path("a/prompts.out.jsonl")) == Path("a/prompts.out.errors.jsonl")


def test_paths_that_can_not_be_meant_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output, errors = tmp_path / "in", tmp_path / "out", tmp_path / "errors"
    source.write_text("")
    link = tmp_path / "link"
    link.symlink_to(source)
    check_paths(source, output, errors)
    check_paths(None, output, errors)
    for paths, message in [
        ((source, tmp_path, errors), "is a folder"),
        ((source, output, tmp_path), "is a folder"),
        ((source, tmp_path / "no" / "out", errors), "no does not exist"),
        ((source, source / "out", errors), "in does not exist"),
        ((source, output, tmp_path / "." / "out"), "answers and errors both"),
        ((source, source, errors), "is the input"),
        ((source, link, errors), "is the input"),
        ((source, output, link), "is the input"),
        ((source, tmp_path / ("x" * 300), errors), "File name too long"),
    ]:
        with pytest.raises(UsageError, match=message):
            check_paths(*paths)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(UsageError, match=f"{tmp_path} can't be written"):
        check_paths(source, output, errors)
