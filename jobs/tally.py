"""The tally: what one process has counted, and how it gets into the totals that the store keeps of all processes.

A tally is a flat table of cells. The cell of a counter is `(name, *labels)`; a histogram has one for each bucket,
`(name, *labels, upper end)`, which holds what fell into that bucket alone, and one for the sum, `(name, *labels, "sum")`.

What goes wrong: the store is away, or full, and what was counted goes with a later report. A process is killed, and what it
counted since its last report, in a second at most, is missing in the totals.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from bisect import bisect_left
from collections.abc import Mapping
from typing import Any

import msgspec
import structlog
from redis.exceptions import RedisError

from jobs import keys
from jobs.metrics import BY_NAME, Metric
from jobs.scripts import Script

Cell = tuple[str, ...]
Cells = Mapping[Cell, float]

#: Seconds between two reports.
REPORT_S = 1.0
#: Seconds that a process's last report is remembered: none is sent again after so long.
REMEMBERED_S = 86_400
#: Cells that the totals may have: what models users think of fill no store.
MOST_CELLS = 10_000
#: What the last bucket of a histogram is called, and the cell of its sum.
INFINITE = "+Inf"
SUM = "sum"
#: What a name is called that is not fit to be a label, or one too many.
OTHER = "other"
#: Names from outside that one process tells apart.
MOST_NAMES = 100

_NAME = re.compile(r"[A-Za-z0-9][\w.:/@+-]{0,63}", re.ASCII)
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(list[str]).decode
_count = Script("count")

log = structlog.get_logger("tally")


class Names:
    """Makes labels of names that come from outside: as they are if they look like a name, and at most so many.

    A name has letters, digits and `._:/@+-`, 64 characters at most, so that no text and nothing long gets through. `known`
    ones have their place from the start.
    """

    def __init__(self, *known: str, most: int = MOST_NAMES) -> None:
        self._most = most
        self._known: set[str] = set()
        for name in known:
            self(name)

    def __call__(self, name: str) -> str:
        """The label for this name."""
        if name in self._known:
            return name
        if len(self._known) >= self._most or not _NAME.fullmatch(name):
            return OTHER
        self._known.add(name)
        return name


class Tally:
    """The counts of one process, made in one thread; `dict(tally.cells)` is a whole copy from any other."""

    def __init__(self) -> None:
        self.cells: dict[Cell, float] = {}

    def add(self, metric: Metric, *labels: str, amount: float = 1) -> None:
        """Counts something of a counter; one value for each of its labels."""
        cell = (metric.name, *labels)
        cells = self.cells
        cells[cell] = cells.get(cell, 0) + amount

    def observe(self, metric: Metric, seconds: float, *labels: str) -> None:
        """Counts a duration of a histogram."""
        cells = self.cells
        bucket = (metric.name, *labels, ENDS[metric.name][bisect_left(metric.buckets, seconds)])
        cells[bucket] = cells.get(bucket, 0) + 1
        total = (metric.name, *labels, SUM)
        cells[total] = cells.get(total, 0.0) + seconds


#: What the upper ends of each histogram's buckets are called, the last included.
ENDS = {
    name: (*(repr(end) for end in metric.buckets), INFINITE)
    for name, metric in BY_NAME.items()
    if metric.kind == "histogram"
}


class Reports:
    """Brings a process's tally into the totals, each count once, whatever becomes of a report on its way."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._process = secrets.token_hex(8)
        self._number = 0
        self._told: dict[Cell, float] = {}
        self._pending: dict[Cell, float] = {}  # how far the report of this number goes, until it has arrived
        self._full = False

    async def report(self, client: Any) -> None:
        """Tells what is new to an async client of the store. Raises what redis-py does; then the next one says it again."""
        told = self._told
        if not self._pending:
            self._pending = {cell: value for cell, value in self._tally.cells.items() if value != told.get(cell)}
            self._number += 1
        if not self._pending:
            return
        args: list[Any] = [self._number, REMEMBERED_S, MOST_CELLS]
        for cell, value in self._pending.items():
            args += (_encode(cell), value - told.get(cell, 0))
        left_out = await _count(client, [keys.METRICS, keys.reported(self._process)], args)
        told.update(self._pending)
        self._pending = {}
        if left_out and not self._full:
            log.warning("totals_full", cells=MOST_CELLS, left_out=left_out)
        self._full = bool(left_out)

    async def run(self, client: Any) -> None:
        """Reports once a second until cancelled."""
        while True:
            try:
                await self.report(client)
            except (RedisError, OSError) as error:
                log.debug("report_failed", error=type(error).__name__)
            await asyncio.sleep(REPORT_S)


def totals(raw: Mapping[bytes, bytes]) -> dict[Cell, float]:
    """The totals as the store keeps them; cells that no metric of this version has are left out."""
    found: dict[Cell, float] = {}
    for name, value in raw.items():
        try:
            cell = tuple(_decode(name))
            amount = float(value)
        except (ValueError, msgspec.DecodeError):
            continue
        if is_cell(cell):
            found[cell] = amount
    return found


def is_cell(cell: Cell) -> bool:
    """Whether this is a cell of a metric that is counted."""
    metric = BY_NAME.get(cell[0]) if cell else None
    if metric is None or not metric.counted:
        return False
    if metric.kind == "counter":
        return len(cell) == 1 + len(metric.labels)
    return len(cell) == 2 + len(metric.labels) and (cell[-1] == SUM or cell[-1] in ENDS[metric.name])
