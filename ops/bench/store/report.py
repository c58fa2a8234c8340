"""What a run of the store's benchmark has to say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ops.bench.limits.report import Row, table
from ops.bench.page import circumstances


def whole(found: Mapping[str, Sequence[Row]], seconds: float) -> str:
    """All parts as one table, and what it was measured with."""
    lines: list[str] = []
    for name, rows in found.items():
        lines += table(name, rows).splitlines()[2 if lines else 0 :]
    judged = [row.met for rows in found.values() for row in rows if row.met is not None]
    said = f"{sum(judged)} of {len(judged)} targets were met, in {seconds:.0f} s. {circumstances()}"
    return "\n".join([*lines, "", said, ""])
