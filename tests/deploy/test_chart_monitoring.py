"""Dashboards, alerts and KEDA ask for metrics that there are; every alert has a runbook."""

from __future__ import annotations

import json
import re

import pytest

from kvservice.telemetry.dashboards import dashboards
from kvservice.telemetry.metrics import ALL_METRICS, Kind
from tests.deploy.chart import ROOT, objects, only

LABELS_OF_THE_MONITORS = {"kvservice", "pod"}
SUFFIXES = {Kind.COUNTER: ("_total",), Kind.GAUGE: ("",), Kind.HISTOGRAM: ("_bucket", "_sum", "_count")}
SERIES = {spec.name + suffix: set(spec.labels) for spec in ALL_METRICS for suffix in SUFFIXES[spec.kind]}


def expressions() -> list[str]:
    """Every PromQL expression of the chart."""
    found = [
        target["expr"]
        for dashboard in dashboards().values()
        for panel in dashboard["panels"]
        for target in panel["targets"]
    ]
    found += [rule["expr"] for rule in alerts()]
    (scaler,) = objects("many-gpus", "ScaledObject")
    return [*found, *(trigger["metadata"]["query"] for trigger in scaler["spec"]["triggers"])]


def alerts() -> list[dict]:
    (rule,) = objects("many-gpus", "PrometheusRule")
    return [alert for group in rule["spec"]["groups"] for alert in group["rules"]]


@pytest.mark.parametrize("expression", sorted(set(expressions())))
def test_expressions_name_series_and_labels_that_there_are(expression: str) -> None:
    series = re.findall(r"\b(kvservice_[a-z_]+)\{", expression)
    assert series, "every series is asked for with a selector"
    unknown = set(series) - set(SERIES)
    assert unknown == set()
    labels = LABELS_OF_THE_MONITORS.union({"le"}, *(SERIES[name] for name in series))
    used = set(re.findall(r'([a-z_]+)=~?"', expression))
    used |= {each.strip() for by in re.findall(r"by \(([^)]*)\)", expression) for each in by.split(",") if each.strip()}
    assert used <= labels
    assert expression.count("(") == expression.count(")")
    assert expression.count("kvservice=") == len(series), "other releases are left out"


def test_every_metric_has_a_panel() -> None:
    text = json.dumps(list(dashboards().values()))
    assert [spec.name for spec in ALL_METRICS if f"{spec.name}" not in text] == []


def test_the_label_that_is_asked_for_is_put_on_every_series() -> None:
    monitors = [*objects("many-gpus", "ServiceMonitor"), *objects("many-gpus", "PodMonitor")]
    assert len(monitors) == 3
    for each in monitors:
        for end in each["spec"].get("endpoints", each["spec"].get("podMetricsEndpoints", ())):
            assert end["relabelings"] == [
                {"action": "replace", "targetLabel": "kvservice", "replacement": "kv-kvservice"}
            ]


def test_every_alert_has_a_runbook_and_every_runbook_an_alert() -> None:
    names = {alert["alert"] for alert in alerts()}
    assert {path.stem for path in (ROOT / "k8s" / "runbooks").glob("*.md")} == names
    for alert in alerts():
        page = ROOT / alert["annotations"]["runbook_url"]
        text = page.read_text()
        assert text.startswith(f"# {alert['alert']}\n")
        assert [part for part in ("**Means.**", "**Look.**", "**Do.**") if part not in text] == []


def test_dashboards_in_the_config_map_are_grafanas_json() -> None:
    data = only("many-gpus", "ConfigMap", "kv-kvservice-dashboards")["data"]
    assert {name.removesuffix(".json"): json.loads(text) for name, text in data.items()} == dashboards()
