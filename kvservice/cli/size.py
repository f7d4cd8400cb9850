"""`kvservice size`: how many sessions fit, and what binds. Arithmetic over `footprint`; loads no weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

import typer

from kvservice.cli.options import DEFAULT_MODEL, HostBytes, JsonFile, KvBytes, Model, parse_bytes
from kvservice.cli.output import hint, human_bytes, show_table, write_json
from kvservice.config.recipes import PLAIN_RECIPES, RECIPES
from kvservice.config.worker import WorkerConfig
from kvservice.errors import ModelError
from kvservice.types import Footprint, ModelShape, RecipeSpec, footprint

DEFAULT_PREFILL_TOKENS_PER_S = 4000.0
"""About what SmolLM2-135M does on two CPU cores. Measure yours with `kvservice bench engine`."""


@dataclass(frozen=True, slots=True)
class Budgets:
    """Bytes that sessions share; None where there is no limit."""

    device: int
    host: int
    redis: int | None = None


@dataclass(frozen=True, slots=True)
class SizeRow:
    """One recipe's sessions in a budget. `binds` names what is used up first."""

    recipe: str
    device_bytes: int
    host_bytes: int
    redis_bytes: int
    dense_fraction: float
    fitting_sessions: int
    binds: str
    wanted_device_bytes: int
    wanted_host_bytes: int


def size_row(shape: ModelShape, recipe: RecipeSpec, num_tokens: int, sessions: int, budgets: Budgets) -> SizeRow:
    """How many sessions of `num_tokens` fit under `recipe`, all of them resident at once."""
    need = footprint(shape, recipe, num_tokens)
    dense = num_tokens * shape.kv_bytes_per_token
    # Raw frames hold what the host tier holds; headers are less than a thousandth of that.
    redis_bytes = need.host_bytes
    fits = _fits(need, redis_bytes, budgets)
    binds = min(fits, key=lambda owner: fits[owner])
    return SizeRow(
        recipe=recipe.name,
        device_bytes=need.device_bytes,
        host_bytes=need.host_bytes,
        redis_bytes=redis_bytes,
        dense_fraction=need.device_bytes / dense,
        fitting_sessions=fits[binds],
        binds=binds,
        wanted_device_bytes=sessions * need.device_bytes,
        wanted_host_bytes=sessions * need.host_bytes,
    )


def _fits(need: Footprint, redis_bytes: int, budgets: Budgets) -> dict[str, int]:
    fits = {"device": budgets.device // need.device_bytes}
    if need.host_bytes:
        fits["host"] = budgets.host // need.host_bytes
    if redis_bytes and budgets.redis is not None:
        fits["redis"] = budgets.redis // redis_bytes
    return fits


def break_even_gb_per_s(shape: ModelShape, prefill_tokens_per_s: float) -> float:
    """The tier speed below which computing KV again is faster than reading it."""
    return shape.kv_bytes_per_token * prefill_tokens_per_s / 1e9


def size(
    model: Model = DEFAULT_MODEL,
    context: Annotated[int, typer.Option("--context", min=1, help="Tokens of one session.")] = 8000,
    sessions: Annotated[int, typer.Option("--sessions", min=1, help="Sessions that are to be resident at once.")] = 8,
    kv_bytes: KvBytes = None,
    host_bytes: HostBytes = None,
    redis_bytes: Annotated[
        int | None,
        typer.Option(
            "--redis-bytes", parser=parse_bytes, metavar="SIZE", help="Memory of the kv Redis; unset: no limit."
        ),
    ] = None,
    prefill_tokens_per_s: Annotated[
        float, typer.Option("--prefill-tokens-per-s", min=1e-9, help="Measured prefill speed, for the break-even.")
    ] = DEFAULT_PREFILL_TOKENS_PER_S,
    json_file: JsonFile = None,
) -> None:
    """Show what sessions of a model take, how many fit, and which of device, host and Redis binds."""
    shape = _model_shape(model)
    if context > shape.max_positions:
        raise typer.BadParameter(f"--context {context}: {model} has {shape.max_positions:,} positions")
    defaults = WorkerConfig()
    budgets = Budgets(kv_bytes or int(defaults.kv_bytes), host_bytes or int(defaults.host_bytes), redis_bytes)
    rows = [size_row(shape, RECIPES[name], context, sessions, budgets) for name in PLAIN_RECIPES]
    break_even = break_even_gb_per_s(shape, prefill_tokens_per_s)
    _print_rows(model, context, sessions, budgets, rows)
    typer.echo(
        f"Break-even: a tier slower than {break_even:.2f} GB/s is slower than prefill "
        f"({shape.kv_bytes_per_token:,} bytes of KV a token x {prefill_tokens_per_s:,.0f} tokens/s)."
    )
    hint("The worker's prefill workspace comes out of the device budget too, and is not counted here.")
    if json_file is not None:
        config = {"model": model, "context": context, "sessions": sessions, **asdict(budgets)}
        write_json(json_file, config, {"rows": [asdict(row) for row in rows], "break_even_gb_per_s": break_even})


def _print_rows(model: str, context: int, sessions: int, budgets: Budgets, rows: Sequence[SizeRow]) -> None:
    limits = f"device {human_bytes(budgets.device)}, host {human_bytes(budgets.host)}"
    if budgets.redis is not None:
        limits += f", Redis {human_bytes(budgets.redis)}"
    numbers = ("device", "of dense", "host", "Redis", "fit", f"{sessions} need on device", "and in host")
    show_table(
        f"{model}: sessions of {context:,} tokens in {limits}",
        ("recipe", "device", "of dense", "host", "Redis", "fit", "binds", *numbers[5:]),
        [
            (
                row.recipe,
                human_bytes(row.device_bytes),
                f"{row.dense_fraction:.1%}",
                human_bytes(row.host_bytes),
                human_bytes(row.redis_bytes),
                str(row.fitting_sessions),
                row.binds,
                human_bytes(row.wanted_device_bytes),
                human_bytes(row.wanted_host_bytes),
            )
            for row in rows
        ],
        numeric=numbers,
    )


def _model_shape(model: str) -> ModelShape:
    """The figures in a model's config.json; its weights aren't read.

    Raises:
        ModelError: the folder isn't there, or its model is of a kind that the runner doesn't do.
    """
    import torch

    from kvservice.models.base import MODELS, ModelIdentity
    from kvservice.models.fetch import resolve
    from kvservice.models.folder import read_json

    MODELS.discover("kvservice.models.families")
    folder = resolve(model, None)
    config = read_json(folder, "config.json")
    architectures = config.get("architectures")
    known = [name for name in MODELS.names() if isinstance(architectures, list) and name in architectures]
    if not known:
        raise ModelError(f"{folder}: architectures={architectures!r}: supported are {', '.join(MODELS.names())}")
    identity = ModelIdentity(name=folder.name, origin="", digest="", eos_token_ids=frozenset())
    return MODELS.get(known[0]).spec(config, identity, torch.bfloat16).shape
