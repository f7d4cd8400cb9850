"""What the README tells people to type exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer.main

from kvservice.cli.main import app
from kvservice.config.recipes import SERVED_RECIPES

README = (Path(__file__).parents[2] / "README.md").read_text()
MAKEFILE = (Path(__file__).parents[2] / "Makefile").read_text()


def command_lines() -> list[str]:
    blocks = "\n".join(re.findall(r"```(?:sh|bash|console|shell)?\n(.*?)```", README, flags=re.DOTALL))
    lines = re.sub(r"\\\n\s*", "", blocks).splitlines()
    calls = [match[1] for line in lines if (match := re.match(r"\$?\s*(?:\.venv/bin/)?kvservice (.+)", line))]
    return calls + [call.removeprefix("kvservice ") for call in re.findall(r"`(kvservice [a-z][^`]*)`", README)]


@pytest.mark.parametrize("line", command_lines())
def test_commands_and_options_in_the_readme_exist(line: str) -> None:
    command = typer.main.get_command(app)
    words = line.split("#")[0].split()
    # Typer's groups are not click's: it has a click of its own.
    while words and (commands := getattr(command, "commands", None)):
        name = words.pop(0)
        assert name in commands, f"kvservice has no command {name!r}"
        command = commands[name]
    options = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    used = {word.split("=")[0] for word in words if word.startswith("--")}
    assert used <= options


def test_recipes_that_are_served_are_named_in_the_readme() -> None:
    assert [name for name in SERVED_RECIPES if f"`{name}`" not in README] == []


@pytest.mark.parametrize("target", sorted(set(re.findall(r"make ([a-z]+)`", README))))
def test_make_targets_in_the_readme_exist(target: str) -> None:
    assert re.search(rf"^{target}:", MAKEFILE, flags=re.MULTILINE)
