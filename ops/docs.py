"""Makes the documents that follow from the code: `python -m ops.docs`; with `--check`, fails where one is out of date.

`docs/settings.md` and `.env.example` come from the fields of `jobs.settings.Settings`, `docs/metrics.md` from the table of
`jobs.metrics`, `docs/openapi.json` from the API's routes.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobs.metrics import TABLE, Metric
from jobs.settings import PREFIX, Settings

ROOT = Path(__file__).resolve().parent.parent

SETTINGS_HEAD = """\
# Settings

Made from `jobs/settings.py` by `python -m ops.docs`: change it there.

A value comes, first match wins, from the command line, from the environment, from a file `.env` in the working directory,
or from the defaults here. An empty variable counts as unset. `mimoq config` prints the values in effect, secrets masked,
with where each came from. Times are seconds.

| variable | value | default | meaning |
|---|---|---|---|
"""

METRICS_HEAD = """\
# Metrics

Made from `jobs/metrics.py` by `python -m ops.docs`: change it there.

The API exports at `/metrics`, without a token, what holds for the whole cluster (`mimoq_…`), and what its own process has
counted (`mimoq_api_…`). A worker exports its own (`mimoq_worker_…`) at `http://MIMOQ_METRICS_HOST:MIMOQ_METRICS_PORT/`, if
the port is set; the processes of one command have ports of their own, counted up from it. Both speak Prometheus's text
format and OpenMetrics, and add `process_…` of their process where the system tells it (Linux).

- **Totals.** Each process reports what it has counted to the store once a second and when it drains; the totals outlive it.
  One that is killed may take its last second with it. Every API process shows the same totals and the same state: take one
  of them, as in `max without (instance) (mimoq_jobs)`. Should the store be emptied, they begin anew.
- **Labels** hold no prompt, answer, key or free text. A model's name is a label if it has up to 64 letters, digits and
  `._:/@+-`, and is among the first 100 of its process; any other is `other`. An account is its digest, an endpoint one of
  two.
- **The store is away**: `mimoq_store_up` is 0, the rest of `mimoq_…` has no values, what processes say of themselves stays.
- **Cost.** A look at the store serves all scrapes of a second, and goes no further than the oldest 20,000 open batches and
  the 100 models used last. It takes a few round trips and one for every 200 open batches, between which others are served:
  of 20,000 it takes the store about 0.2 s in all. After a second it looks at no further ones. The totals have at most
  10,000 values.

| metric | type | labels | exported by | meaning |
|---|---|---|---|---|
"""

ENV_HEAD = """\
# Every setting of mimoq. Copy this file to .env and take the # from what you set.
# Made from jobs/settings.py by `python -m ops.docs`: change it there.
"""

ENV_TAIL = """\

# -- docker compose alone, beside the settings above (docs/deployment.md)

# Profiles that `docker compose up` starts without being told: rabbitmq, postgres, monitoring, flower, simulator.
#COMPOSE_PROFILES=

# RabbitMQ as the broker takes its profile, a password, and the line below.
#RABBITMQ_PASSWORD=
# MIMOQ_BROKER_URL=amqp://mimoq:${RABBITMQ_PASSWORD}@rabbitmq:5672//

# Results in PostgreSQL take its profile, a password, and the line below.
#POSTGRES_PASSWORD=
# MIMOQ_RESULT_BACKEND=db+postgresql+psycopg://mimoq:${POSTGRES_PASSWORD}@postgres:5432/mimoq

# Valkey's room for jobs and results; its container needs twice as much.
#VALKEY_MAXMEMORY=1gb
#VALKEY_MEM_LIMIT=2g

# Time that a worker's container gets to end: MIMOQ_DRAIN_S and 45 s.
#WORKER_STOP_GRACE=75s

# Ports on loopback, how long Prometheus keeps what it has read, and who may use Flower (user:password).
#API_PORT=8000
#SIMULATOR_PORT=8001
#PROMETHEUS_PORT=9090
#PROMETHEUS_RETENTION=15d
#GRAFANA_PORT=3000
#FLOWER_PORT=5555
#FLOWER_BASIC_AUTH=
"""


def documents() -> dict[str, str]:
    """What each made document must hold, by its path in the checkout."""
    return {
        "docs/settings.md": settings_page(),
        "docs/metrics.md": metrics_page(),
        "docs/openapi.json": openapi_file(),
        ".env.example": env_example(),
    }


def settings_page() -> str:
    """The reference of all settings."""
    rows = []
    for variable, schema in _settings():
        default = f"`{_text(schema['default'])}`" if schema["default"] not in (None, []) else "unset"
        cells = (f"`{variable}`", _value(schema), default, schema["description"])
        rows.append(f"| {' | '.join(cells)} |\n")
    return SETTINGS_HEAD + "".join(rows)


def metrics_page() -> str:
    """The reference of all metrics."""
    return METRICS_HEAD + "".join(_metric_row(metric) for metric in TABLE)


def _metric_row(metric: Metric) -> str:
    names = metric.exported()
    cells = (
        "<br>".join(f"`{name}`" for name in names),
        metric.kind,
        ", ".join(metric.labels) or "none",
        "<br>".join(names.values()),
        metric.help,
    )
    return f"| {' | '.join(cells)} |\n"


def openapi_file() -> str:
    """What the API serves at `/openapi.json`."""
    from api.app import make_app

    return json.dumps(make_app().openapi(), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def env_example() -> str:
    """A `.env` in which nothing is set, for mimoq and for Compose."""
    parts = [ENV_HEAD]
    for variable, schema in _settings():
        comment = textwrap.fill(schema["description"], 118, initial_indent="# ", subsequent_indent="# ")
        default = "" if schema["default"] is None else _text(schema["default"])
        parts.append(f"{comment}\n#{variable}={default}\n")
    return "\n".join(parts) + ENV_TAIL


def _settings() -> Iterator[tuple[str, dict[str, Any]]]:
    """Each variable with its field's JSON schema."""
    for name, schema in Settings.model_json_schema()["properties"].items():
        yield PREFIX + name.upper(), schema


def _value(schema: dict[str, Any]) -> str:
    """What may be given, in words."""
    (kind,) = (kind for kind in schema.get("anyOf", [schema]) if kind.get("type") != "null")
    if "enum" in kind:
        return ", ".join(f"`{choice}`" for choice in kind["enum"])
    if kind.get("format") in ("password", "path"):
        return "secret" if kind["format"] == "password" else "path"
    if kind["type"] == "array":
        names = kind["items"].get("enum")
        return f"list of {', '.join(f'`{name}`' for name in names)}" if names else f"list of {kind['items']['type']}s"
    words = {
        "string": "text",
        "boolean": "`true`, `false`",
        "integer": "integer",
        "number": "number",
        "object": "JSON object",
    }[kind["type"]]
    bounds = {"minimum": "from", "exclusiveMinimum": "over", "maximum": "to"}
    return " ".join([words, *(f"{word} {_text(kind[bound])}" for bound, word in bounds.items() if bound in kind)])


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ",".join(sorted(str(item) for item in value))  # of a set: its own order changes from run to run
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def main(argv: list[str]) -> int:
    """Writes the documents, or with `--check` names those that are out of date; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m ops.docs", description="Make the documents that follow from the code."
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail when one is out of date")
    check = parser.parse_args(argv).check
    stale = 0
    for name, text in documents().items():
        path = ROOT / name
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        if check:
            stale += 1
            print(f"{name} is out of date; run: make docs", file=sys.stderr)
        else:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {name}")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
