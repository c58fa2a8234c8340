"""The options of a benchmark whose rows can be chosen, and whose tables stand on the page of figures."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import NoReturn

from ops.bench.page import PAGE


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")  # one line, without the usage


def options(prog: str, description: str | None, rows: Sequence[str]) -> argparse.Namespace:
    """`rows`, those asked for in the order given here, `scale` and `write`; ends the process on bad use."""
    parser = _Parser(prog=f"python -m {prog}", description=description, allow_abbrev=False)
    parser.add_argument("--rows", type=_some(rows), default=tuple(rows), help=f"some of {','.join(rows)}")
    parser.add_argument("--scale", type=_scale, default=1.0, help="part of the usual numbers of jobs, to try it")
    parser.add_argument("--write", action="store_true", help=f"put what was measured into {PAGE.name}")
    args = parser.parse_args()
    if args.write and (args.scale != 1 or args.rows != tuple(rows)):
        parser.error("--write is for whole runs: without --rows and --scale")
    return args


def _some(rows: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def names(text: str) -> tuple[str, ...]:
        asked = text.split(",")
        if unknown := [name for name in asked if name not in rows]:
            raise argparse.ArgumentTypeError(f"no rows are called {', '.join(unknown)}; there are {', '.join(rows)}")
        return tuple(name for name in rows if name in asked)

    return names


def _scale(text: str) -> float:
    try:
        scale = float(text)
    except ValueError:
        scale = 0.0
    if not 0 < scale <= 1:
        raise argparse.ArgumentTypeError("must be over 0, and 1 at most")
    return scale
