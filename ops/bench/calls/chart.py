"""The chart of a run: jobs a second of each row as bars, and its CPU beside them; plain SVG."""

from __future__ import annotations

from xml.sax.saxutils import escape

from ops.bench.calls.bench import Found
from ops.bench.calls.table import medians

WIDTH, LABELS, BAR, STEP, TOP = 960, 340, 420, 26, 56
OWN, OTHER, TEXT, GROUND = "#1f6feb", "#8c959f", "#24292f", "#ffffff"


def bars(found: Found) -> str:
    """The chart as text; rows that could not be run are left out."""
    known = medians(found)
    rows = [(result.row, known[result.row.name]) for result in found.results if result.row.name in known]
    most = max((one.jobs_per_s for _, one in rows), default=1.0)
    height = TOP + STEP * len(rows) + 16
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="{GROUND}"/>',
        f'<text x="16" y="24" fill="{TEXT}" font-size="15" font-weight="bold">Jobs a second, and CPU of a job</text>',
        f'<text x="16" y="43" fill="{OTHER}">An upstream that answers in 0.2 s; CPU of all processes of a row</text>',
    ]
    for place, (row, one) in enumerate(rows):
        top, length = TOP + STEP * place, max(BAR * one.jobs_per_s / most, 1)
        colour = OWN if row.label.startswith("mimoq") else OTHER
        said = f"{one.jobs_per_s:,.0f}/s, {one.cpu_ms:.2f} ms"
        lines += [
            f'<text x="{LABELS - 8}" y="{top + 15}" fill="{TEXT}" text-anchor="end">{escape(row.label)}</text>',
            f'<rect x="{LABELS}" y="{top + 2}" width="{length:.1f}" height="{STEP - 8}" fill="{colour}"/>',
            f'<text x="{LABELS + length + 6:.1f}" y="{top + 15}" fill="{TEXT}">{said}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])
