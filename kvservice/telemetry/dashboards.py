"""Grafana dashboards of all metrics there are, made from their declarations. Knows Grafana's JSON, and no service.

`helm/generate.py` writes them into the chart; a test keeps both together.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvservice.telemetry.metrics import ALL_METRICS, RECALL_HITS, RECALL_LOOKUPS, Kind, MetricSpec

Json = dict[str, object]

SELECTOR = 'kvservice=~"$kvservice"'
"""The label that the chart's monitors put on each series: the release."""
QUANTILES = (0.5, 0.95, 0.99)
PANEL_WIDTH, PANEL_HEIGHT = 8, 7
COLUMNS = 24 // PANEL_WIDTH

UNITS = {"bytes": "bytes", "seconds": "s", "tokens": "short", "": "short"}
"""Grafana's words for ours."""

PREFIXES = {
    "workers": ("kvservice_worker_", "Workers: memory, engine, recall"),
    "tier": ("kvservice_tier_", "KV in Redis"),
    "gateways": ("kvservice_", "Gateways: calls, waits, tenants"),
}
"""By the name of the dashboard: what its metrics' names begin with, and its title. The first that fits has a metric."""


def dashboards() -> dict[str, Json]:
    """All dashboards, by the names of their files without `.json`."""
    by_name: dict[str, list[MetricSpec]] = {name: [] for name in PREFIXES}
    for spec in ALL_METRICS:
        by_name[next(name for name, (prefix, _) in PREFIXES.items() if spec.name.startswith(prefix))].append(spec)
    return {f"kvservice-{name}": _dashboard(name, PREFIXES[name][1], specs) for name, specs in by_name.items()}


def _dashboard(name: str, title: str, specs: Iterable[MetricSpec]) -> Json:
    panels = [_panel(_title(spec), spec.help, _targets(spec), _unit(spec)) for spec in specs]
    if name == "workers":
        panels.insert(0, _panel("recall hit rate", "Of the tokens that recall chose.", [_hit_rate()], "percentunit"))
    for index, panel in enumerate(panels):
        panel["id"] = index + 1
        row, column = divmod(index, COLUMNS)
        panel["gridPos"] = {"x": column * PANEL_WIDTH, "y": row * PANEL_HEIGHT, "w": PANEL_WIDTH, "h": PANEL_HEIGHT}
    return {
        "uid": f"kvservice-{name}",
        "title": f"kvservice / {title}",
        "tags": ["kvservice"],
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": [_datasource(), _release()]},
        "panels": panels,
    }


def _title(spec: MetricSpec) -> str:
    return spec.name.removeprefix("kvservice_").replace("_", " ")


def _unit(spec: MetricSpec) -> str:
    if spec.name.endswith("_per_second"):
        return "short"
    unit = UNITS[spec.unit]
    if spec.kind is not Kind.COUNTER:
        return unit
    return "Bps" if unit == "bytes" else "cps"


def _targets(spec: MetricSpec) -> list[Json]:
    by = ", ".join(spec.labels)
    legend = " ".join(f"{{{{{label}}}}}" for label in spec.labels)
    if spec.kind is Kind.HISTOGRAM:
        rate = f"sum by (le) (rate({spec.name}_bucket{{{SELECTOR}}}[$__rate_interval]))"
        return [
            {"refId": f"Q{index}", "expr": f"histogram_quantile({quantile:g}, {rate})", "legendFormat": f"{quantile:g}"}
            for index, quantile in enumerate(QUANTILES)
        ]
    if spec.kind is Kind.COUNTER:
        total = f"rate({spec.name}_total{{{SELECTOR}}}[$__rate_interval])"
        return [{"refId": "A", "expr": f"sum by ({by}) ({total})", "legendFormat": legend or "all"}]
    # A gateway's levels have no label of ours: each pod is a line.
    legend = legend or "{{pod}}"
    return [{"refId": "A", "expr": f"{spec.name}{{{SELECTOR}}}", "legendFormat": legend}]


def _hit_rate() -> Json:
    hits, lookups = (
        f"sum by (worker) (rate({spec.name}_total{{{SELECTOR}}}[$__rate_interval]))"
        for spec in (RECALL_HITS, RECALL_LOOKUPS)
    )
    return {"refId": "A", "expr": f"{hits} / {lookups}", "legendFormat": "{{worker}}"}


def _panel(title: str, description: str, targets: list[Json], unit: str) -> Json:
    return {
        "type": "timeseries",
        "title": title,
        "description": description,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}},
        "targets": targets,
    }


def _datasource() -> Json:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"}


def _release() -> Json:
    return {
        "name": "kvservice",
        "type": "query",
        "label": "release",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": "label_values(kvservice_connected_workers, kvservice)",
        "refresh": 2,
        "includeAll": True,
        "multi": True,
    }
