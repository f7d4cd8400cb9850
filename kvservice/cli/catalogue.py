"""`kvservice methods` and `kvservice recipes`: what exists."""

from __future__ import annotations

from kvservice.cli.options import JsonFile
from kvservice.cli.output import show_table, write_json
from kvservice.config.recipes import DEFAULT_RECIPE, RECIPES
from kvservice.types import RecipeSpec


def _status(recipe: RecipeSpec) -> str:
    if recipe.name == DEFAULT_RECIPE:
        return "default"
    return "baseline of eval" if recipe.evaluation_only else "served"


def recipes() -> None:
    """List the recipes: how a session's KV can be kept."""
    show_table(
        "Recipes",
        ("name", "status", "distant tokens", "window", "recalled", "what it does"),
        [
            (
                recipe.name,
                _status(recipe),
                recipe.distant.value,
                "all" if recipe.distant.value == "resident" else f"{recipe.window_tokens}-{recipe.window_tokens + 63}",
                str(recipe.recalled_tokens or ""),
                recipe.summary,
            )
            for recipe in RECIPES.values()
        ],
        numeric=("recalled",),
    )


def methods(json_file: JsonFile = None) -> None:
    """List the methods: what recipes are made of, and the papers they come from."""
    from kvservice.compression.protocols import CLUSTER_INDEXES, RECALL_INDEXES

    RECALL_INDEXES.discover("kvservice.methods")
    rows = [
        {"name": name, "paper": method.paper, "stages": "recall index", "status": _used_by(name)}
        for name, method in sorted([*RECALL_INDEXES, *CLUSTER_INDEXES], key=lambda pair: pair[0])
    ]
    show_table(
        "Methods",
        ("name", "stages", "status", "paper"),
        [(row["name"], row["stages"], row["status"], row["paper"]) for row in rows],
    )
    if json_file is not None:
        write_json(json_file, {}, {"methods": rows})


def _used_by(index: str) -> str:
    """`served` when a recipe that sessions may choose uses the method."""
    users = [recipe for recipe in RECIPES.values() if recipe.index == index]
    return "served" if any(not recipe.evaluation_only for recipe in users) else "baseline of eval"
