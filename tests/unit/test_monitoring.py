"""Dashboard and alerts: each expression is Prometheus's grammar, and speaks of metrics and labels that are exported."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
import yaml

from jobs.exposition import process
from jobs.metrics import TABLE

ROOT = Path(__file__).resolve().parents[2]
ALERTS = ROOT / "ops/prometheus/alerts.yml"
RULES: dict[str, dict[str, Any]] = {
    rule["alert"]: rule
    for group in yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
}
DASHBOARD: dict[str, Any] = json.loads((ROOT / "ops/grafana/dashboards/mimoq.json").read_text(encoding="utf-8"))
PANELS: dict[str, dict[str, Any]] = {panel["title"]: panel for panel in DASHBOARD["panels"] if panel["type"] != "row"}
#: Labels that Prometheus gives to what it scrapes.
SCRAPED = {"instance", "job"}


def exported() -> dict[str, set[str]]:
    """The labels of every series that Prometheus finds at our doors, by name."""
    found: dict[str, set[str]] = {}
    for metric in TABLE:
        for name in metric.exported():
            labels = {*metric.labels, *SCRAPED}
            if metric.kind == "histogram":
                found |= {f"{name}_bucket": labels | {"le"}, f"{name}_sum": labels, f"{name}_count": labels}
            else:
                found[name] = labels
    for family in process():
        found |= {sample.name: SCRAPED for sample in family.samples}
    return found


EXPORTED = exported()


def parsed(expr: str) -> Any:
    """An expression, with Grafana's variables as it would fill them in."""
    return promql.parse(expr.replace("$__rate_interval", "5m").replace("$model", ".*").replace("$lane", ".*"))


def selectors(node: Any) -> Iterator[Any]:
    """Every selector in an expression."""
    if isinstance(node, promql.VectorSelector):
        yield node
    elif isinstance(node, promql.MatrixSelector):
        yield node.vector_selector
    elif isinstance(node, promql.BinaryExpr):
        yield from [*selectors(node.lhs), *selectors(node.rhs)]
    elif isinstance(node, promql.Call):
        for argument in node.args:
            yield from selectors(argument)
    elif isinstance(node, promql.AggregateExpr | promql.ParenExpr | promql.UnaryExpr | promql.SubqueryExpr):
        yield from selectors(node.expr)
    else:
        assert isinstance(node, promql.NumberLiteral | promql.StringLiteral), node


def labels_of(node: Any) -> set[str]:
    """The labels that the result of an expression has. Raises AssertionError where one is named that is not there."""
    if isinstance(node, promql.VectorSelector):
        assert node.name in EXPORTED, f"nobody exports {node.name}"
        labels = EXPORTED[node.name]
        assert {matcher.name for matcher in node.matchers.matchers} <= labels, node.name
        return labels
    if isinstance(node, promql.MatrixSelector):
        return labels_of(node.vector_selector)
    if isinstance(node, promql.AggregateExpr):
        inner = labels_of(node.expr)
        if node.modifier is None:
            return set()
        named = set(node.modifier.labels)
        assert named <= inner, f"{named - inner} of {node}"
        return named if node.modifier.type == promql.AggModifierType.By else inner - named
    if isinstance(node, promql.Call):
        inner = set().union(*(labels_of(argument) for argument in node.args))
        if node.func.name == "absent":
            return set()
        return inner - {"le"} if node.func.name == "histogram_quantile" else inner
    if isinstance(node, promql.BinaryExpr):
        sides = [labels_of(side) for side in (node.lhs, node.rhs)]
        numbers = [isinstance(side, promql.NumberLiteral) for side in (node.lhs, node.rhs)]
        if any(numbers):
            return sides[numbers.index(False)]
        if str(node.op) != "or":
            assert sides[0] == sides[1], f"the sides of {node} never meet"
        return sides[0] & sides[1] if str(node.op) == "or" else sides[0]
    if isinstance(node, promql.ParenExpr):
        return labels_of(node.expr)
    assert isinstance(node, promql.NumberLiteral), node
    return set()


def test_what_is_checked_is_found() -> None:
    """The checks themselves can fail."""
    for wrong in (
        "mimoq_nothing",
        'mimoq_jobs{verdict="x"}',
        "sum by (verdict) (mimoq_jobs)",
        "mimoq_jobs / mimoq_workers",
    ):
        with pytest.raises(AssertionError):
            labels_of(parsed(wrong))
    with pytest.raises(ValueError, match="parenthesis"):
        parsed("sum by (lane (mimoq_jobs)")


# -- alerts


def test_the_alerts_that_an_operator_wants_are_there() -> None:
    assert list(RULES) == [
        "MimoqGateShut",
        "MimoqOldestInteractiveJob",
        "MimoqOldestJob",
        "MimoqNoWorker",
        "MimoqLaneWithoutWorker",
        "MimoqFollowupsGivenUp",
        "MimoqFollowupsPending",
        "MimoqFailures",
        "MimoqLeaseLosses",
        "MimoqStoreAway",
        "MimoqWorkerCutOff",
        "MimoqApiAway",
    ]


@pytest.mark.parametrize("name", RULES)
def test_an_alert_speaks_of_what_is_exported(name: str) -> None:
    rule = RULES[name]
    labels = labels_of(parsed(rule["expr"]))
    said = " ".join(rule["annotations"].values())
    assert set(re.findall(r"\$labels\.(\w+)", said)) <= labels
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert set(rule["annotations"]) == {"summary", "description"}


@pytest.mark.parametrize("name", RULES)
def test_an_alert_takes_what_every_api_process_tells_once(name: str) -> None:
    """A sum over API processes would count everything as often as there are processes."""
    tree = parsed(RULES[name]["expr"])
    if any(not str(found.name).startswith("mimoq_worker_") for found in selectors(tree)):
        assert name == "MimoqApiAway" or "instance" not in labels_of(tree)
        assert "max without (instance)" in RULES[name]["expr"] or name == "MimoqApiAway"


def test_the_alerts_fire_when_they_should() -> None:
    """ops/prometheus/alerts_test.yml, by Prometheus's own tool."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool: it comes with Prometheus")
    argv = [promtool, "test", "rules", str(ALERTS.with_name("alerts_test.yml"))]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# -- the dashboard


@pytest.mark.parametrize("title", PANELS)
def test_a_panel_speaks_of_what_is_exported(title: str) -> None:
    panel = PANELS[title]
    assert panel["targets"]
    assert panel["description"]
    assert panel["fieldConfig"]["defaults"]["unit"], "of what?"
    for target in panel["targets"]:
        labels = labels_of(parsed(target["expr"]))
        assert set(re.findall(r"\{\{\s*(\w+)\s*\}\}", target["legendFormat"])) <= labels
        assert target["datasource"]["uid"] == panel["datasource"]["uid"] == "${datasource}"


def test_the_dashboard_shows_what_it_is_for() -> None:
    shown = {
        found.name
        for panel in PANELS.values()
        for target in panel["targets"]
        for found in selectors(parsed(target["expr"]))
    }
    assert shown >= {
        "mimoq_jobs_ended_total",
        "mimoq_oldest_ready_job_age_seconds",
        "mimoq_limit_utilisation",
        "mimoq_gate_shut",
        "mimoq_calls_total",
        "mimoq_tokens_total",
        "mimoq_call_seconds_bucket",
        "mimoq_lease_losses_total",
        "mimoq_workers",
        "mimoq_pipeline_messages",
        "mimoq_followups_pending",
        "mimoq_followups_total",
    }


def test_its_variables_are_known() -> None:
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables.pop("datasource")["type"] == "datasource"
    for name, variable in variables.items():
        metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["definition"]).groups()  # type: ignore[union-attr]
        assert label in EXPORTED[metric]
        assert label == name
    used = set(
        re.findall(r"\$(\w+)", " ".join(target["expr"] for panel in PANELS.values() for target in panel["targets"]))
    )
    assert used - {"__rate_interval"} == set(variables)


def test_panels_do_not_lie_over_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


def test_it_is_provisioned_with_its_source() -> None:
    folder = ROOT / "ops/grafana/provisioning"
    (source,) = yaml.safe_load((folder / "datasources/prometheus.yml").read_text(encoding="utf-8"))["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert source["isDefault"] is True
    (provider,) = yaml.safe_load((folder / "dashboards/mimoq.yml").read_text(encoding="utf-8"))["providers"]
    assert provider["options"]["path"] == "/etc/grafana/dashboards"


# -- RabbitMQ


def test_the_setting_of_rabbitmq_has_one_name() -> None:
    """Told in the documents as it is set; a name that it does not know keeps RabbitMQ from starting."""
    found = {
        path.relative_to(ROOT).as_posix(): set(re.findall(r"[\w.]*property_equivalence[\w.]*", path.read_text("utf-8")))
        for folder, pattern in (("docs", "*.md"), ("ops", "*"))
        for path in (ROOT / folder).rglob(pattern)
        if path.is_file() and path.suffix in (".md", ".conf", ".yml", ".sh")
    }
    named = {path: names for path, names in found.items() if names}
    assert set(named) >= {"docs/brokers.md", "ops/rabbitmq/rabbitmq.conf"}
    assert set().union(*named.values()) == {"quorum_queue.property_equivalence.relaxed_checks_on_redeclaration"}
