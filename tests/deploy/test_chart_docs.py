"""What the pages on Kubernetes tell people to type and to read exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main
import yaml

from kvservice.cli.main import app
from kvservice.config.api_keys import ApiKeys
from tests.deploy.chart import CHART, ROOT

PAGES = sorted([CHART / "README.md", *(ROOT / "k8s").rglob("*.md")])


def commands() -> set[str]:
    found: set[str] = set()
    for page in PAGES:
        text = re.sub(r"\\\n\s*", "", page.read_text())
        found |= set(re.findall(r"`kvservice ([a-z][^`]*)`", text))
        found |= set(re.findall(r"^ *kvservice ([a-z].*)$", text, flags=re.MULTILINE))
    return {" ".join(each.split()) for each in found}


@pytest.mark.parametrize("line", sorted(commands()))
def test_commands_and_options_exist(line: str) -> None:
    command = typer.main.get_command(app)
    words = shlex.split(line)
    while words and (group := getattr(command, "commands", None)):
        name = words.pop(0)
        assert name in group, f"kvservice has no command {name!r}"
        command = group[name]
    options = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    assert {word.split("=")[0] for word in words if word.startswith("--")} <= options


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", page.read_text())
    assert [link for link in links if not link.startswith("http") and not (page.parent / link).exists()] == []


def test_metrics_and_values_that_pages_name_exist() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    text = "\n".join(page.read_text() for page in PAGES)
    for path in re.findall(
        r"`((?:gateway|ray|redis|monitoring|networkPolicy|modelCache|internalTls)\.[A-Za-z.]+)`", text
    ):
        table = values
        for name in path.split("."):
            assert name in table, path
            table = table[name]


def test_example_tenants_are_a_file_of_keys_that_the_program_takes() -> None:
    secret = yaml.safe_load((ROOT / "k8s" / "tenants.yaml").read_text())
    keys = ApiKeys.model_validate_json(secret["stringData"]["api-keys.json"])
    assert {key.tenant for key in keys.keys} == {"platform", "acme"}
