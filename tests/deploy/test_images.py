"""The files of images: what they promise can be read off them. `k8s/images/build.sh` builds them."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.deploy.chart import ROOT, objects, pods
from tests.deploy.test_repository import normalised, pins

IMAGES = ROOT / "k8s" / "images"
FILES = sorted(IMAGES.glob("*.Containerfile"))
HEAVY = ("torch", "ray", "transformers", "triton", "safetensors", "tokenizers", "llguidance")

every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)


def instructions(path: Path) -> list[tuple[str, str]]:
    """Words and arguments, a line each."""
    text = re.sub(r"\\\n\s*", "", path.read_text())
    lines = (line for line in text.splitlines() if line and not line.startswith("#"))
    return [(word, arguments) for word, _, arguments in (line.partition(" ") for line in lines)]


def stages(path: Path) -> dict[str, list[tuple[str, str]]]:
    """By name; the last one's is empty. What a stage is made from comes first in it."""
    found: dict[str, list[tuple[str, str]]] = {}
    stage: list[tuple[str, str]] = []
    for word, arguments in instructions(path):
        if word == "FROM":
            base, _, name = arguments.partition(" AS ")
            stage = found[name] = list(found.get(base, ()))
        stage.append((word, arguments))
    return found


@every_file
def test_images_are_built_in_stages_and_run_as_nobody_special(path: Path) -> None:
    assert set(stages(path)) == {"runtime", "build", ""}
    assert ("USER", "10001:10001") in stages(path)[""]
    copied = [arguments for word, arguments in stages(path)[""] if word == "COPY"]
    assert copied == ["--from=build /opt/kvservice /opt/kvservice"]
    found = instructions(path)
    users = {pod.spec["securityContext"]["runAsUser"] for pod in pods("one-gpu") if "redis" not in str(pod.containers)}
    assert users == {10001}
    assert not any(word == "ADD" for word, _ in found)


@every_file
def test_the_base_has_a_version_and_packages_are_pinned(path: Path) -> None:
    base = next(a for word, a in instructions(path) if word == "ARG")
    assert re.fullmatch(r"BASE=[a-z0-9./-]+:(?!latest)[a-z0-9.-]+", base)
    for word, arguments in instructions(path):
        for command in re.findall(r"pip install [^&]*", arguments) if word == "RUN" else ():
            assert "--constraint constraints.txt" in command or "--no-deps ." in command


@every_file
def test_compilers_stay_in_the_stage_that_builds_unless_triton_needs_one(path: Path) -> None:
    installed = " ".join(arguments for word, arguments in stages(path)[""] if word == "RUN")
    assert "g++" not in installed
    assert (" gcc " in installed) is ("cuda" in path.name)


@every_file
def test_kuberay_finds_a_shell_to_start_ray_by(path: Path) -> None:
    if "worker" in path.name:
        assert any(" bash " in f" {arguments} " for word, arguments in stages(path)[""] if word == "RUN")


def test_the_gateway_gets_nothing_heavy_and_all_of_it_is_pinned() -> None:
    lines = (IMAGES / "gateway-requirements.txt").read_text().splitlines()
    names = [Requirement(line).name for line in lines if line and not line.startswith("#")]
    assert set(names).isdisjoint(HEAVY)
    assert {normalised(name) for name in names} <= set(pins())


ASK = """
import importlib, sys

class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HEAVY:
            raise ModuleNotFoundError(f"{name} isn't in the gateway's image")

HEAVY = %r
sys.meta_path.insert(0, Without())
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def test_what_the_gateway_imports_is_light() -> None:
    modules = [
        *("kvservice.cli.main", "kvservice.cli.running", "kvservice.cli.telemetry", "kvservice.client"),
        *("kvservice.cli.drain_worker", "kvservice.cli.config", "kvservice.gateway.server", "kvservice.tier.redis"),
    ]
    asked = subprocess.run(
        [sys.executable, "-c", ASK % (HEAVY,), *modules], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert asked.returncode == 0, asked.stderr


def test_the_check_of_helm_test_needs_nothing_that_the_gateways_image_lacks() -> None:
    (config,) = (each for each in objects("cpu-trial", "ConfigMap") if each["metadata"]["name"] == "kv-kvservice-test")
    tree = ast.parse(config["data"]["check.py"])
    named = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    named |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    outside = {name.partition(".")[0] for name in named if name} - set(sys.stdlib_module_names)
    assert outside == {"grpc", "grpc_health", "kvservice"}


def test_scripts_are_sound_shell() -> None:
    for script in IMAGES.glob("*.sh"):
        assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
