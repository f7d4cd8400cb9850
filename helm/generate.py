"""Writes what is made from something else: the chart's schema and dashboards, and the manifests of k8s/rendered.

    values.yaml + the program's configuration ──► values.schema.json
    kvservice.telemetry.metrics               ──► dashboards/*.json
    the chart + ci/*-values.yaml              ──► k8s/rendered/*.yaml

`make charts` runs it; tests compare what is there with what it would write.
"""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from kvservice.config.service import ServiceConfig
from kvservice.telemetry.dashboards import dashboards

ROOT = Path(__file__).parents[1]
CHART = ROOT / "helm" / "kvservice"
RENDERED = ROOT / "k8s" / "rendered"
OWN_SECRETS = ROOT / "k8s" / "own-secrets-values.yaml"
HELM = Path(sys.executable).parent / "helm"
RELEASE = "kv"
NAMESPACE = "kvservice"
KUBE_VERSION = "1.34.0"

Schema = dict[str, Any]

# What the chart sets itself: of the program's tables these names are not the operator's.
HIDDEN = {
    "GatewayConfig": ("secret", "host", "port", "health_port", "http_port", "tls", "internal_tls"),
    "TelemetryConfig": ("metrics_host", "metrics_port"),
    "RayDeployment": ("resources",),
    "WorkerConfig": ("worker_id", "host", "port", "tls", "redis_url"),
}

SIZE: Schema = {
    "anyOf": [
        {"type": "integer", "minimum": 0},
        {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)? ?([KMGT]i?B)?$"},
    ]
}
CPU: Schema = {
    "anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?m?$"}]
}
QUANTITY: Schema = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?([KMGT]i?)?$"}
NAME: Schema = {"type": "string", "pattern": "^([a-z0-9]([a-z0-9.-]*[a-z0-9])?)?$", "maxLength": 253}
TAG: Schema = {"type": "string", "pattern": r"^[A-Za-z0-9_.-]*$", "not": {"const": "latest"}}
DIGEST: Schema = {"type": "string", "pattern": "^(sha256:[0-9a-f]{64})?$"}
PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
SHARE: Schema = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
COUNT: Schema = {"type": "integer", "minimum": 1}
OBJECTS: Schema = {"type": "array", "items": {"type": "object"}}
IMAGE: Schema = {
    "type": "object",
    "additionalProperties": False,
    "required": ["repository"],
    "properties": {
        "repository": {"type": "string", "minLength": 1, "description": "Name of the image."},
        "tag": {**TAG, "description": "Empty: the chart's appVersion."},
        "digest": {**DIGEST, "description": "Wins over the tag."},
    },
}
CIDRS: Schema = {"type": "array", "minItems": 1, "items": {"type": "string", "pattern": "^[0-9a-fA-F.:]+/[0-9]+$"}}
SOURCE: Schema = {
    "oneOf": [
        {
            "type": "object",
            "additionalProperties": False,
            "required": ["type"],
            "properties": {"type": {"const": "fetch"}},
        },
        {
            "type": "object",
            "additionalProperties": False,
            "required": ["type", "claimName"],
            "properties": {"type": {"const": "volume"}, "claimName": NAME, "subPath": {"type": "string"}},
        },
        {
            "type": "object",
            "additionalProperties": False,
            "required": ["type", "from", "image"],
            "properties": {
                "type": {"const": "objectStore"},
                "from": {"type": "string", "minLength": 1},
                "image": IMAGE,
                "existingSecret": NAME,
            },
        },
    ]
}
MODEL: Schema = {
    "type": "object",
    "additionalProperties": False,
    "required": ["deployment", "source"],
    "properties": {
        "deployment": {"$ref": "#/$defs/RayDeployment"},
        "image": {"enum": ["cpu", "cuda"], "description": "Which of `ray.images`."},
        "source": {**SOURCE, "description": "Where the model's folder comes from."},
        "baseMemory": {**SIZE, "description": "Host memory beside KV."},
        "gpuResource": {"type": "string", "pattern": "^[a-z0-9.-]+/[A-Za-z0-9._-]+$", "description": "Also of MIG."},
        "runtimeClassName": NAME,
        "extraResources": {"type": "object", "additionalProperties": {"type": ["integer", "string"]}},
        "initContainers": OBJECTS,
        "extraEnv": OBJECTS,
        "envFrom": OBJECTS,
        "schedulerName": NAME,
        "nodeSelector": {"type": "object", "additionalProperties": {"type": "string"}},
        "tolerations": OBJECTS,
        "affinity": {"type": "object"},
        "topologySpreadConstraints": OBJECTS,
    },
}

# By the path of a value, from its end; the first that fits. What isn't here has the type that it has in values.yaml.
OVERRIDES: tuple[tuple[str, Schema], ...] = (
    (r"^config\.gateway$", {"$ref": "#/$defs/GatewayConfig"}),
    (r"^config\.telemetry$", {"$ref": "#/$defs/TelemetryConfig"}),
    (r"^config\.log_level$", {"enum": ["DEBUG", "INFO", "WARNING", "ERROR"]}),
    (r"^models$", {"type": "array", "items": MODEL}),
    (r"^image\.pullPolicy$", {"enum": ["Always", "IfNotPresent", "Never"]}),
    (r"^gateway\.service\.type$", {"enum": ["ClusterIP", "NodePort", "LoadBalancer"]}),
    (r"^gateway\.service\.nodePort$", {"type": ["integer", "null"], "minimum": 30000, "maximum": 32767}),
    (r"^gateway\.route\.hostnames$", {"type": "array", "items": {"type": "string", "minLength": 1}}),
    (r"^ray\.upgradeStrategy$", {"enum": ["NewCluster", "None"]}),
    (r"^ray\.images\.(cpu|cuda)$", IMAGE),
    (r"^ray\.pdb\.minAvailable$", {"type": ["integer", "null"], "minimum": 0}),
    (r"(shmSize|maxmemory)$", SIZE),
    (r"\.cpu$", CPU),
    (r"\.size$", QUANTITY),
    (r"\.tag$", TAG),
    (r"\.digest$", DIGEST),
    (r"\.port$", PORT),
    (r"apiServerPorts$", {"type": "array", "items": PORT}),
    (r"\.cidrs$", CIDRS),
    (r"accessModes$", {"type": "array", "items": {"enum": ["ReadWriteOnce", "ReadWriteMany", "ReadOnlyMany"]}}),
    (r"\.(errorRatio)$", SHARE),
    (r"targetCPUUtilizationPercentage$", {"type": "integer", "minimum": 1, "maximum": 100}),
    (r"(\.replicas|minReplicas|maxReplicas|runningCallsPerGateway)$", COUNT),
    (r"pdb\.maxUnavailable$", {"anyOf": [COUNT, {"type": "string", "pattern": "^[0-9]+%$"}]}),
    (r"(existingSecret|Secret|existingClaim|priorityClassName|className|storageClassName)$", NAME),
    (r"(existingSecret|[nN]ameOverride)$", NAME),
    (r"(resources|affinity)$", {"type": "object"}),
    (r"([lL]abels|[aA]nnotations|nodeSelector)$", {"type": "object", "additionalProperties": {"type": "string"}}),
    (r"^extraObjects$", {"type": "array", "items": {"type": ["object", "string"]}}),
)


def values_schema() -> Schema:
    """The schema of values.yaml: every name that is there, and no other."""
    text = (CHART / "values.yaml").read_text()
    schema = _schema_of(yaml.safe_load(text), "", _comments(text))
    # Helm adds it where the chart is part of another.
    schema["properties"]["global"] = {"type": "object"}
    program = ServiceConfig.model_json_schema(mode="validation")
    definitions: Schema = copy.deepcopy(program["$defs"])
    for name, hidden in HIDDEN.items():
        table = definitions[name]
        for each in hidden:
            table["properties"].pop(each)
        if required := [each for each in table.get("required", ()) if each not in hidden]:
            table["required"] = required
        else:
            table.pop("required", None)
    worker = definitions["RayDeployment"]
    # Two models can't share a name, so none has the default.
    worker["required"] = ["name"]
    _take_sizes(definitions)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Values of the chart kvservice",
        **schema,
        "$defs": {name: definitions[name] for name in sorted(_used(schema, definitions))},
    }


def _schema_of(value: object, path: str, comments: dict[str, str]) -> Schema:
    for pattern, override in OVERRIDES:
        if path and re.search(pattern, path):
            schema = copy.deepcopy(override)
            break
    else:
        schema = _plain_schema(value, path, comments)
    if path in comments and "$ref" not in schema:
        schema["description"] = comments[path]
    return schema


def _plain_schema(value: object, path: str, comments: dict[str, str]) -> Schema:
    if isinstance(value, dict):
        inner = {name: _schema_of(each, f"{path}.{name}" if path else name, comments) for name, each in value.items()}
        return {"type": "object", "additionalProperties": False, "properties": inner}
    if isinstance(value, bool):
        return {"type": "boolean"}
    if isinstance(value, int):
        return {"type": "integer", "minimum": 0}
    if isinstance(value, list):
        return copy.deepcopy(OBJECTS)
    assert isinstance(value, str), f"{path}: say in OVERRIDES what it may be"
    return {"type": "string"}


def _comments(text: str) -> dict[str, str]:
    """What follows `# --` above a value, by the value's path."""
    found: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    comment: list[str] = []
    for line in text.splitlines():
        if match := re.match(r"\s*#(?: --)? (.*)", line):
            comment = [match[1]] if "# --" in line else [*comment, match[1]]
        elif match := re.match(r"( *)(- )?([A-Za-z_]+):", line):
            indent = len(match[1]) + len(match[2] or "")
            path = [*((at, name) for at, name in path if at < indent), (indent, match[3])]
            if comment:
                found[".".join(name for _, name in path)] = " ".join(comment)
            comment = []
        else:
            comment = []
    return found


def _take_sizes(definitions: Schema) -> None:
    """pydantic says of sizes that they are integers; it takes strings with units too."""
    for table in definitions.values():
        for name, field in table.get("properties", {}).items():
            if name.endswith("_bytes") and table["title"] == "WorkerConfig":
                field.pop("type", None)
                field["anyOf"] = [*SIZE["anyOf"], *([{"type": "null"}] if "anyOf" in field else [])]


def _used(schema: object, definitions: Schema) -> set[str]:
    """The names of the definitions that `schema` needs."""
    found: set[str] = set()
    waiting = [schema]
    while waiting:
        for name in re.findall(r'"#/\$defs/([A-Za-z]+)"', json.dumps(waiting.pop())):
            if name not in found:
                found.add(name)
                waiting.append(definitions[name])
    return found


def render(values: Path, *more: str) -> str:
    """The manifests of one set of values, with Secrets of the operator's own, so that each render is the same."""
    made = subprocess.run(
        [
            *(str(HELM), "template", RELEASE, str(CHART), "--namespace", NAMESPACE, "--kube-version", KUBE_VERSION),
            *("--values", str(values), "--values", str(OWN_SECRETS), *more),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode != 0:
        raise SystemExit(made.stderr)
    return made.stdout


def parts_of_the_chart() -> dict[Path, str]:
    """The schema and the dashboards, by their paths. Renders look at both."""
    made = {CHART / "values.schema.json": json.dumps(values_schema(), indent=2) + "\n"}
    for name, dashboard in dashboards().items():
        made[CHART / "dashboards" / f"{name}.json"] = json.dumps(dashboard, indent=2) + "\n"
    return made


def files() -> dict[Path, str]:
    """All that is made, by its path."""
    made = parts_of_the_chart()
    for values in sorted((CHART / "ci").glob("*-values.yaml")):
        head = f"# Made by `make charts` from helm/kvservice and {values.name}. Don't edit.\n"
        made[RENDERED / f"{values.name.removesuffix('-values.yaml')}.yaml"] = head + render(values)
    return made


def main() -> None:
    """Writes everything."""
    for made in (parts_of_the_chart, files):
        for path, text in made().items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


if __name__ == "__main__":
    main()
