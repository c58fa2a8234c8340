"""The table of docs/retries.md is the table of the code."""

from __future__ import annotations

from pathlib import Path

from worker.verdict import TABLE

DOCS = Path(__file__).parents[2] / "docs" / "retries.md"


def test_every_row_stands_in_the_docs_in_the_same_order_with_its_verdict() -> None:
    rows = [line.split("|")[1:4] for line in DOCS.read_text().splitlines() if line.startswith("| ")][1:]
    assert [(seen.strip(), kind.strip()) for seen, kind, _ in rows] == [(row.seen, row.kind) for row in TABLE]
    for (_, _, code), row in zip(rows, TABLE, strict=True):
        if "{" not in row.code:
            assert f"`{row.code}`" in code
