"""What the README tells people to type exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from kvservice.cli.main import app
from kvservice.config.recipes import SERVED_RECIPES

README = (Path(__file__).parents[2] / "README.md").read_text()
MAKEFILE = (Path(__file__).parents[2] / "Makefile").read_text()


SHELL_BLOCKS = [
    body
    for language, body in re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    if language == "sh"
]


def typed(program: str) -> list[str]:
    """What follows `program` in blocks of shell commands and in the text."""
    lines = re.sub(r"\\\n\s*", "", "\n".join(SHELL_BLOCKS)).splitlines()
    calls = [match[1] for line in lines if (match := re.match(rf"(?:\.venv/bin/)?{program} ([^#]+)", line))]
    calls += re.findall(rf"`{program} ([a-z][^`]*)`", README)
    return sorted({" ".join(call.split()) for call in calls})


@pytest.mark.parametrize("line", typed("kvservice"))
def test_commands_and_options_in_the_readme_exist(line: str) -> None:
    command = typer.main.get_command(app)
    words = shlex.split(line)
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


@pytest.mark.parametrize("target", typed("make"))
def test_make_targets_in_the_readme_exist(target: str) -> None:
    assert re.search(rf"^{target}:", MAKEFILE, flags=re.MULTILINE)
