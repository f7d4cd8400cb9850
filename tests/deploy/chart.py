"""The chart as the real helm renders it, and questions about what comes out."""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "kvservice"
BIN = Path(sys.executable).parent
HELM = BIN / "helm"
PROFILES = sorted(path.name.removesuffix("-values.yaml") for path in (CHART / "ci").glob("*-values.yaml"))

Manifest = dict[str, Any]


def load_generate() -> ModuleType:
    """helm/generate.py, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("chart_generate", ROOT / "helm" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    assert HELM.exists(), f"no helm in {BIN}: run `make tools`"
    return subprocess.run([str(HELM), *arguments], capture_output=True, text=True, check=False)


def values_file(profile: str) -> Path:
    return CHART / "ci" / f"{profile}-values.yaml"


def template(*arguments: str) -> list[Manifest]:
    """What `helm template kv` makes with these arguments."""
    made = helm("template", "kv", str(CHART), "--namespace", "kvservice", *arguments)
    assert made.returncode == 0, made.stderr
    return [each for each in yaml.load_all(made.stdout, Loader=yaml.CSafeLoader) if each]


@functools.cache
def _objects(profile: str) -> tuple[Manifest, ...]:
    return tuple(template("--values", str(values_file(profile))))


def objects(profile: str, kind: str = "") -> list[Manifest]:
    """The objects of a profile; of one kind, if it is named."""
    return [each for each in _objects(profile) if kind in ("", each["kind"])]


def only(profile: str, kind: str, name: str) -> Manifest:
    (found,) = (each for each in objects(profile, kind) if each["metadata"]["name"] == name)
    return found


@dataclass(frozen=True)
class PodTemplate:
    """Where a pod's template was found, and the template."""

    owner: str
    template: Manifest

    @property
    def spec(self) -> Manifest:
        return self.template["spec"]

    @property
    def labels(self) -> dict[str, str]:
        return self.template["metadata"]["labels"]

    @property
    def component(self) -> str:
        return self.labels["app.kubernetes.io/component"]

    @property
    def containers(self) -> list[Manifest]:
        return [*self.spec.get("initContainers", ()), *self.spec["containers"]]

    @property
    def ports(self) -> dict[str, int]:
        return {
            port["name"]: port["containerPort"] for each in self.spec["containers"] for port in each.get("ports", ())
        }


def pods(profile: str) -> list[PodTemplate]:
    """Every pod that a profile makes, with the labels that KubeRay adds to Ray's."""
    return [pod for each in objects(profile) for pod in _pods(each)]


def _pods(manifest: Manifest) -> Iterator[PodTemplate]:
    name = f"{manifest['kind']}/{manifest['metadata']['name']}"
    if manifest["kind"] == "Pod":
        yield PodTemplate(name, manifest)
    elif manifest["kind"] in ("Deployment", "StatefulSet"):
        yield PodTemplate(name, manifest["spec"]["template"])
    elif manifest["kind"] == "RayService":
        cluster = manifest["spec"]["rayClusterConfig"]
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            yield PodTemplate(f"{name}/{group.get('groupName', 'head')}", _as_kuberay_makes_it(group["template"]))


def _as_kuberay_makes_it(template: Manifest) -> Manifest:
    labels = {**template["metadata"]["labels"], "ray.io/is-ray-node": "yes"}
    return {**template, "metadata": {**template["metadata"], "labels": labels}}


def matches(selector: Manifest, labels: dict[str, str]) -> bool:
    """Whether a selector with nothing but `matchLabels` takes a pod."""
    assert set(selector) <= {"matchLabels"}, "the chart selects by labels alone"
    return selector.get("matchLabels", {}).items() <= labels.items()
