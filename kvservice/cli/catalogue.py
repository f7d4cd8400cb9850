"""`kvservice methods` and `kvservice recipes`: what exists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

import typer

from kvservice.cli.options import JsonFile
from kvservice.cli.output import show_table, write_json
from kvservice.config.recipes import DEFAULT_RECIPE, RECIPES
from kvservice.types import RecipeSpec


def _status(recipe: RecipeSpec) -> str:
    if recipe.name == DEFAULT_RECIPE:
        return "default"
    return "baseline of eval" if recipe.evaluation_only else "served"


def _near(recipe: RecipeSpec) -> str:
    """What stays on the device."""
    if recipe.eviction is not None:
        return f"{recipe.eviction.kept_tokens} chosen"
    return f"{recipe.window_tokens}-{recipe.window_tokens + 63}" if recipe.slides else "all"


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
                _near(recipe),
                str(recipe.recalled_tokens or ""),
                recipe.summary,
            )
            for recipe in RECIPES.values()
        ],
        numeric=("recalled",),
    )


@dataclass(frozen=True, slots=True)
class MethodRow:
    """A method as it is listed. `status` is `served` when a recipe that sessions may choose uses it."""

    name: str
    paper: str
    summary: str
    stages: str
    saves: str
    costs: str
    status: str
    deviates: str


def method_rows() -> list[MethodRow]:
    """All methods there are, by name."""
    from kvservice.compression.methods import METHODS
    from kvservice.compression.protocols import CLUSTER_INDEXES, RECALL_INDEXES

    METHODS.discover("kvservice.methods")
    rows = [
        MethodRow(
            name=name,
            paper=index.paper,
            summary=index.summary,
            stages="recall index",
            saves="device memory: distant KV lies in the tier",
            costs="an index on the device; chosen tokens come from host memory",
            status=_used_by(name),
            deviates="see its file",
        )
        for name, index in [*RECALL_INDEXES, *CLUSTER_INDEXES]
    ]
    rows += [
        MethodRow(
            name=name,
            paper=method.paper,
            summary=method.summary,
            stages=", ".join(method.stages),
            saves=method.saves,
            costs=method.costs,
            status=_used_by(name),
            deviates=method.deviates,
        )
        for name, method in METHODS
    ]
    return sorted(rows, key=lambda row: row.name)


def markdown(rows: Sequence[MethodRow]) -> str:
    """The table as documents have it."""
    lines = ["| method | what it does | saves | costs | paper |", "|---|---|---|---|---|"]
    lines += [f"| `{row.name}` | {row.summary} | {row.saves} | {row.costs} | {row.paper} |" for row in rows]
    return "\n".join(lines) + "\n"


def deviations(rows: Sequence[MethodRow]) -> str:
    """How each that drops tokens, or looks at few, deviates from its paper, a line each."""
    some = [row for row in rows if row.stages != "recall index" and not row.paper.startswith("none")]
    return "".join(f"* `{row.name}`: {row.deviates}.\n" for row in some)


def methods(
    json_file: JsonFile = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="The table as documents have it.")] = False,
) -> None:
    """List the methods: what recipes are made of, and the papers they come from."""
    rows = method_rows()
    if as_markdown:
        typer.echo(markdown(rows), nl=False)
    else:
        show_table(
            "Methods",
            ("name", "stages", "status", "saves", "costs", "paper"),
            [(row.name, row.stages, row.status, row.saves, row.costs, row.paper) for row in rows],
        )
    if json_file is not None:
        write_json(json_file, {}, {"methods": [asdict(row) for row in rows]})


def _used_by(name: str) -> str:
    """`served` when a recipe that sessions may choose uses the method."""
    users = [recipe for recipe in RECIPES.values() if name in _named(recipe)]
    return "served" if any(not recipe.evaluation_only for recipe in users) else "baseline of eval"


def _named(recipe: RecipeSpec) -> set[str | None]:
    """The methods that a recipe names."""
    named = {recipe.index, recipe.reuse.plan if recipe.reuse else None}
    if recipe.eviction is not None:
        named |= {getattr(recipe.eviction, stage) for stage in ("scorer", "positions", "allocator", "merger", "codec")}
    return named
