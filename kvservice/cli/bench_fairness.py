"""`kvservice bench fairness`: one call beside another tenant's flood. `bench.fairness` measures."""

from __future__ import annotations

import asyncio
import json
import secrets
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvservice.cli.bench_soak import check_writable
from kvservice.cli.options import DEFAULT_MODEL, HostBytes, JsonFile, KvBytes, Model, Recipe, Threads
from kvservice.cli.output import hint, show_table, write_json
from kvservice.config.api_keys import key_entry
from kvservice.config.recipes import DEFAULT_RECIPE

if TYPE_CHECKING:
    from kvservice.bench.fairness import FairnessLoad, FairnessResult


def fairness(
    documents: Annotated[int, typer.Option("--documents", min=1, help="Documents of the flood, all at once.")] = 50,
    doc_tokens: Annotated[int, typer.Option("--doc-tokens", min=32, help="Tokens of each document.")] = 2000,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="Tokens of each answer.")] = 1,
    repeats: Annotated[
        int,
        typer.Option("--repeats", min=1, help="Calls of the other tenant, one by one, alone and beside it."),
    ] = 5,
    recipe: Recipe = DEFAULT_RECIPE,
    kv_bytes: KvBytes = None,
    host_bytes: HostBytes = None,
    max_ratio: Annotated[
        float | None, typer.Option("--max-ratio", min=1.0, help="Exit with 1 if the median is above this.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the documents' random tokens.")] = 7,
    model: Model = DEFAULT_MODEL,
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Time to first token of one tenant's call while another floods the service, beside what it takes alone.

    On a service started for it, over gRPC.
    """
    check_writable("--json", json_file)
    from kvservice.bench.fairness import FairnessLoad

    load = FairnessLoad(documents, doc_tokens, new_tokens, repeats, seed)
    arguments = ["--log-level", "WARNING", "--model", model, "--recipe", recipe or DEFAULT_RECIPE]
    for flag, value in (("--kv-bytes", kv_bytes), ("--host-bytes", host_bytes), ("--threads", threads)):
        if value is not None:
            arguments += [flag, str(value)]
    result = asyncio.run(_run(load, arguments))
    _show(load, result)
    if json_file is not None:
        settings = asdict(load) | {"recipe": recipe or DEFAULT_RECIPE, "model": model, "kv_bytes": kv_bytes}
        write_json(json_file, settings, asdict(result) | {"ratio": result.ratio, "worst_ratio": result.worst_ratio})
    if max_ratio is not None and result.ratio > max_ratio:
        raise typer.Exit(1)


async def _run(load: FairnessLoad, arguments: list[str]) -> FairnessResult:
    from kvservice.bench.fairness import PATIENT, measure
    from kvservice.client import Client
    from kvservice.client.local import LocalService

    keys = {tenant: secrets.token_urlsafe(24) for tenant in ("flood", "one")}
    with tempfile.TemporaryDirectory(prefix="kvservice-fairness-") as folder:
        file = Path(folder) / "keys.json"
        entries = [key_entry(key, tenant) for tenant, key in keys.items()]
        file.write_text(json.dumps({"keys": entries}))
        file.chmod(0o600)
        async with (
            LocalService([*arguments, "--api-keys", str(file)]) as service,
            Client(service.address, keys["flood"], retry=PATIENT) as flood,
            Client(service.address, keys["one"]) as one,
        ):
            (info,) = await one.list_models()
            return await measure(flood, one, load, info.shape.vocab_size)


def _show(load: FairnessLoad, result: FairnessResult) -> None:
    show_table(
        f"{load.documents} documents of {load.doc_tokens:,} tokens of one tenant, one of another's",
        ("", "seconds to first token", "calls of the flood left"),
        [
            *(("alone", f"{seconds:.3f}", "-") for seconds in result.alone_s),
            *(
                ("beside the flood", f"{seconds:.3f}", f"{left}")
                for seconds, left in zip(result.beside_s, result.flood_left, strict=True)
            ),
        ],
        numeric=("seconds to first token", "calls of the flood left"),
    )
    hint(f"Median beside it: {result.ratio:.2f} x alone; the longest: {result.worst_ratio:.2f} x.")
    if result.flood_failed:
        hint(f"{result.flood_failed} calls of the flood failed.")
