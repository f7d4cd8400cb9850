"""The README's tables say what the registries hold, and its demo output what the demo prints."""

from __future__ import annotations

import re
from pathlib import Path

from kvservice.compression.protocols import CLUSTER_INDEXES, RECALL_INDEXES
from kvservice.config.recipes import DEFAULT_RECIPE, RECIPES
from kvservice.demo.story import QUESTIONS

README = (Path(__file__).parents[2] / "README.md").read_text()


def table(heading: str) -> list[list[str]]:
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*) \|$", section, flags=re.MULTILINE)
    return [row.split(" | ") for row in rows]


def test_the_table_of_recipes_is_that_of_the_registry() -> None:
    expected = [
        [
            f"`{recipe.name}`" + (" (default)" if recipe.name == DEFAULT_RECIPE else ""),
            recipe.summary + (" For `eval` only." if recipe.evaluation_only else ""),
        ]
        for recipe in RECIPES.values()
    ]
    assert table("Recipes") == expected


def test_the_table_of_methods_is_that_of_the_registry() -> None:
    RECALL_INDEXES.discover("kvservice.methods")
    methods = sorted([*RECALL_INDEXES, *CLUSTER_INDEXES], key=lambda pair: pair[0])
    assert table("Methods") == [[f"`{name}`", method.summary, method.paper] for name, method in methods]


def test_the_demo_output_asks_what_the_demo_asks() -> None:
    for number, question in enumerate(QUESTIONS, start=1):
        assert f"Question {number}: {question.text}" in README
