"""The checks that keep the repository honest: layers, generated code, protos, pins."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def run(*command: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {normalised(name): version for name, version in pairs}


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [Requirement(text) for text in (*project["dependencies"], *project["optional-dependencies"]["dev"])]


def test_packages_import_only_what_their_layer_allows() -> None:
    result = run(str(BIN / "lint-imports"), "--no-logo")
    assert result.returncode == 0, result.stdout + result.stderr


def test_protos_pass_buf_lint() -> None:
    result = run(str(BIN / "buf"), "lint")
    assert result.returncode == 0, result.stdout + result.stderr


def test_generated_code_is_what_the_protos_make(tmp_path: Path) -> None:
    made = run("make", "-o", ".venv/.installed", "protos", f"PROTO_OUT={tmp_path}", f"PY={sys.executable}")
    assert made.returncode == 0, made.stdout + made.stderr
    fresh = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*.py*")}
    committed = {
        path.relative_to(ROOT): path.read_text()
        for package in ("kvservice/v1", "kvservice/internal/v1")
        for path in (ROOT / package).glob("*_pb2*.py*")
    }
    stale = sorted(str(path) for path in fresh.keys() | committed.keys() if fresh.get(path) != committed.get(path))
    assert stale == [], "run `make protos` and commit what it changes"


@pytest.mark.parametrize("requirement", requirements(), ids=lambda requirement: requirement.name)
def test_every_dependency_is_pinned_inside_its_range(requirement: Requirement) -> None:
    version = pins()[normalised(requirement.name)]
    assert requirement.specifier.contains(version)


def test_ci_runs_the_command_that_developers_run() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_make_without_python_says_what_to_install() -> None:
    result = run("make", "-W", "pyproject.toml", "install", "PYTHON=")
    assert result.returncode != 0
    assert "No Python 3.11 or later found" in result.stderr


def test_tracked_files_name_no_path_of_one_machine() -> None:
    found = run("git", "grep", "-nIE", r"(^|[^A-Za-z0-9_.])/(home|root|work)/[a-z]", "--", ".", ":!tests/deploy")
    assert found.returncode == 1, found.stdout
