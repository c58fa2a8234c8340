"""The table of docs/retries.md is the table of the code."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path

from jobs.settings import PREFIX, Settings
from worker.verdict import TABLE, Policy

DOCS = Path(__file__).parents[2] / "docs" / "retries.md"
HEADER = "| seen | verdict | code | may have been billed |"


def rows() -> list[list[str]]:
    lines = DOCS.read_text().splitlines()
    table = takewhile(lambda line: line.startswith("| "), lines[lines.index(HEADER) + 2 :])
    return [[cell.strip() for cell in line.split("|")[1:5]] for line in table]


def test_every_row_stands_in_the_docs_in_the_same_order_with_its_verdict() -> None:
    assert [(seen, kind) for seen, kind, _, _ in rows()] == [(row.seen, row.kind) for row in TABLE]
    for (_, _, code, _), row in zip(rows(), TABLE, strict=True):
        if "{" not in row.code:
            assert f"`{row.code}`" in code


def test_rows_that_are_billed_alike_say_so_alike() -> None:
    said: dict[str, set[object]] = {}
    for (_, _, _, billed), row in zip(rows(), TABLE, strict=True):
        said.setdefault(billed, set()).add(row.maybe_billed)
    assert set(said) == {"", "yes", "no", "if the request was sent", "504 and 524"}
    assert all(len(meant) == 1 for meant in said.values())
    assert len({next(iter(meant)) for meant in said.values()}) == len(said)


def test_what_can_be_chosen_is_told() -> None:
    text = DOCS.read_text()
    for name in ("retry_statuses", "bad_answers", "degenerate_finish_reasons"):
        assert name in Settings.model_fields
        assert f"`{PREFIX}{name.upper()}`" in text
    for answer in Policy().bad_answers:
        assert f"`{answer}`" in text
