"""`kvservice bench`: how fast the engine and the service are. Measuring is done in `kvservice.bench`."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvservice.cli.bench_admitted import admitted
from kvservice.cli.bench_churn import churn
from kvservice.cli.bench_context import context
from kvservice.cli.bench_fairness import fairness
from kvservice.cli.bench_gateway import gateway
from kvservice.cli.bench_interference import interference
from kvservice.cli.bench_kernels import kernels
from kvservice.cli.bench_methods import methods
from kvservice.cli.bench_placement import placement
from kvservice.cli.bench_quotas import quotas
from kvservice.cli.bench_replicas import kills, scale
from kvservice.cli.bench_resume import resume
from kvservice.cli.bench_rolls import rolls
from kvservice.cli.bench_roofline import roofline
from kvservice.cli.bench_soak import soak
from kvservice.cli.bench_start import start
from kvservice.cli.bench_tier import tier
from kvservice.cli.options import (
    DEFAULT_MODEL,
    HostBytes,
    HostLink,
    JsonFile,
    KvBytes,
    Map,
    Model,
    Recipe,
    Sharing,
    SkipAbove,
    Threads,
    parse_counts,
)
from kvservice.cli.output import hint, human_bytes, progress_bar, show_table, write_json
from kvservice.cli.settings import read_file, sharing_settings, worker_config
from kvservice.config.recipes import DEFAULT_RECIPE, RECIPES, SERVED_RECIPES
from kvservice.config.worker import WorkerConfig
from kvservice.errors import ConfigError

if TYPE_CHECKING:
    from kvservice.bench.engine import EngineRow, SkippedRow
    from kvservice.bench.sessions import SessionLoad, SessionsResult

app = typer.Typer(help="Measure speed, and what happens under load.", no_args_is_help=True)

BENCH_KV_BYTES = 2 << 30
"""Of `bench engine`: room for eight dense sequences of 8,000 tokens of the small model."""


@app.command("engine")
def engine(
    recipe: Recipe = DEFAULT_RECIPE,
    prompt_tokens: Annotated[
        str, typer.Option("--prompt-tokens", metavar="N,N", help="Lengths of the documents.")
    ] = "512,2048,8000",
    batch: Annotated[str, typer.Option("--batch", metavar="N,N", help="Sequences at a time.")] = "1,8",
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="Timed decode steps.")] = 32,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Figures are medians over as many runs.")] = 3,
    seed: Annotated[int, typer.Option("--seed", help="Of the documents' random tokens.")] = 7,
    model: Model = DEFAULT_MODEL,
    kv_bytes: KvBytes = BENCH_KV_BYTES,
    host_bytes: HostBytes = None,
    host_link: HostLink = None,
    sharing_map: Map = None,
    sharing: Sharing = None,
    skip_above: SkipAbove = None,
    threads: Threads = None,
    transformers: Annotated[
        bool, typer.Option("--transformers", help="Also transformers on the same load, after it.")
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Speed of prefill and decode in this process: no gateway, no RPC, no Redis. Documents are random tokens.

    With --host-link and layers that share keys, also how much of what they fetch arrives while others compute.
    """
    lengths, batches = parse_counts(prompt_tokens), parse_counts(batch)
    from kvservice.bench.engine import EngineRow, Load, SkippedRow, measure
    from kvservice.cli.compose import make_engine
    from kvservice.models.fetch import resolve

    name = recipe or DEFAULT_RECIPE
    defaults = WorkerConfig()
    shared = sharing_settings(RECIPES[name], sharing_map, sharing, skip_above)
    config = worker_config(
        {
            "model": model,
            "kv_bytes": kv_bytes or BENCH_KV_BYTES,
            "host_bytes": host_bytes or defaults.host_bytes,
            "max_batch": max(batches),
            "threads": threads,
            "host_link_bytes_per_s": host_link,
            **shared,
        }
    )
    measured = make_engine(config, resolve(model, None), None)
    loads = [Load(RECIPES[name], length, size, new_tokens, seed) for length in lengths for size in batches]
    results: list[EngineRow | SkippedRow] = []
    with progress_bar() as bar:
        for load in bar.track(loads, description="measuring"):
            results.append(measure(measured, load, repeats))
    rows = [row for row in results if isinstance(row, EngineRow)]
    if host_link is None:
        rows = [replace(row, arrived_fraction=None) for row in rows]
    skipped = [row for row in results if isinstance(row, SkippedRow)]
    _show_rows(f"Engine, recipe {name}", rows)
    for row in skipped:
        hint(f"Skipped: {row.batch} x {row.prompt_tokens:,} tokens: {row.reason}.")
    measured.close()
    beside: list[EngineRow] = []
    if transformers:
        import torch

        from kvservice.bench.peer import measure_peer
        from kvservice.cli.compose import num_threads
        from kvservice.models.peer import Peer

        torch.set_num_threads(num_threads(config))  # our kernels have threads of their own, and leave torch one
        peer = Peer(resolve(model, None), torch.bfloat16)
        with progress_bar() as bar:
            for load in bar.track(loads, description="transformers"):
                beside.append(measure_peer(peer, measured.info.shape.vocab_size, load, repeats))
        _show_rows("transformers", beside)
    hint(f"Model {measured.info.name}: {measured.info.origin}.")
    if json_file is not None:
        settings = {
            "recipe": name,
            "model": model,
            "origin": measured.info.origin,
            "new_tokens": new_tokens,
            "repeats": repeats,
            "seed": seed,
            "kv_bytes": config.kv_bytes,
            "host_bytes": config.host_bytes,
            "threads": threads,
            "host_link_bytes_per_s": host_link,
            **shared,
        }
        write_json(
            json_file,
            settings,
            {
                "rows": [asdict(row) for row in rows],
                "skipped": [asdict(row) for row in skipped],
                "transformers": [asdict(row) for row in beside],
            },
        )


def _show_rows(title: str, rows: list[EngineRow]) -> None:
    columns = ("prompt tokens", "batch", "prefill tok/s", "decode ms/token", "output tok/s")
    show_table(
        title,
        columns,
        [
            (
                f"{row.prompt_tokens:,}",
                str(row.batch),
                f"{row.prefill_tokens_per_s:,.0f}",
                f"{row.decode_ms_per_token:.1f}",
                f"{row.output_tokens_per_s:,.1f}",
            )
            for row in rows
        ],
        numeric=columns,
    )
    for measured in rows:
        size = f"{measured.batch} x {measured.prompt_tokens:,} tokens"
        if measured.arrived_fraction is not None:
            share = f"{measured.arrived_fraction:.1%}"
            typer.echo(f"{size}: {share} of what followers fetched had arrived when they needed it.")
        if measured.skipped_fraction is not None:
            typer.echo(f"{size}: {measured.skipped_fraction:.1%} of followers' rows left distant tokens out.")


@app.command("sessions")
def sessions(
    num_sessions: Annotated[int, typer.Option("--sessions", min=1, help="Sessions, each with its document.")] = 12,
    doc_tokens: Annotated[int, typer.Option("--doc-tokens", min=1, help="Tokens of each document.")] = 6000,
    turns: Annotated[int, typer.Option("--turns", min=1, help="Questions of each session.")] = 3,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="Tokens of each answer.")] = 48,
    question_tokens: Annotated[int, typer.Option("--question-tokens", min=1, help="Tokens of each question.")] = 24,
    recipe: Recipe = DEFAULT_RECIPE,
    kv_bytes: KvBytes = None,
    host_bytes: HostBytes = None,
    host_link: HostLink = None,
    sharing_map: Map = None,
    sharing: Sharing = None,
    skip_above: SkipAbove = None,
    random_tokens: Annotated[
        bool, typer.Option("--random-ids", help="Documents and questions of random tokens instead of a text.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of random tokens, and of the questions' places in a text.")] = 7,
    text: Annotated[
        Path | None,
        typer.Option("--text", metavar="FILE", help="Prose to cut documents from. Unset: the demo's document."),
    ] = None,
    ray: Annotated[bool, typer.Option("--ray", help="Through a worker in a Ray Serve replica.")] = False,
    model: Model = DEFAULT_MODEL,
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Many long-document sessions on a service started for it, over gRPC. All take each turn together.

    Turn 1 loads the documents, and its times include that.
    """
    if random_tokens and text is not None:
        raise typer.BadParameter("--text is for documents of prose: leave out --random-ids, or --text")
    from kvservice.bench.sessions import SessionLoad

    name = recipe or DEFAULT_RECIPE
    if name not in SERVED_RECIPES:
        raise ConfigError(f"--recipe {name}: the service doesn't serve it; choose one of {', '.join(SERVED_RECIPES)}")
    defaults = WorkerConfig()
    load = SessionLoad(
        sessions=num_sessions,
        document_tokens=doc_tokens,
        question_tokens=question_tokens,
        new_tokens=new_tokens,
        turns=turns,
        recipe=name,
        text=None if random_tokens else _text_tokens(text, model),
        seed=seed,
    )
    budget = {"kv_bytes": int(kv_bytes or defaults.kv_bytes), "host_bytes": int(host_bytes or defaults.host_bytes)}
    arguments = ["--log-level", "WARNING", "--model", model, "--max-batch", str(max(num_sessions, defaults.max_batch))]
    arguments += ["--kv-bytes", str(budget["kv_bytes"]), "--host-bytes", str(budget["host_bytes"])]
    shared = sharing_settings(RECIPES[name], sharing_map, sharing, skip_above)
    flags = {"--host-link": host_link, "--map": sharing_map, "--sharing": sharing, "--skip-above": skip_above}
    for flag, value in flags.items():
        if value is not None:
            arguments += [flag, str(value)]
    if threads is not None:
        arguments += ["--threads", str(threads)]
    if ray:
        arguments.append("--ray")
    result, origin = asyncio.run(_run_sessions(load, arguments))
    _show_turns(load, budget["kv_bytes"], result)
    hint(f"Model {model}: {origin}.")
    if json_file is not None:
        words = {"random": random_tokens, "text": str(text) if text is not None else None}
        settings = {key: value for key, value in asdict(load).items() if key != "text"}
        write_json(
            json_file,
            {
                **settings,
                **words,
                **budget,
                "model": model,
                "origin": origin,
                "threads": threads,
                "ray": ray,
                "host_link_bytes_per_s": host_link,
                **shared,
            },
            {
                "turns": [asdict(turn) for turn in result.turns],
                "device_kv_bytes_peak": result.peaks.device_kv_bytes,
                "workspace_bytes_peak": result.peaks.workspace_bytes,
                "host_kv_bytes_peak": result.peaks.host_kv_bytes,
                "redis_kv_bytes_peak": result.peaks.redis_kv_bytes,
                "rss_bytes_peak": result.rss_bytes_peak,
                "tier_bytes_moved_per_token": result.tier_bytes_moved_per_token,
                "recall_hit_rate": result.recall_hit_rate,
                "recomputed_tokens": result.recomputed_tokens,
            },
        )


async def _run_sessions(load: SessionLoad, arguments: list[str]) -> tuple[SessionsResult, str]:
    from kvservice.bench.sessions import run_sessions
    from kvservice.client import Client, LocalService

    hint("starting the service")
    async with LocalService(arguments) as service:
        async with Client(service.address) as client:
            origin = (await client.list_models())[0].origin
        with progress_bar() as bar:
            task = bar.add_task("answers", total=load.sessions * load.turns)
            return await run_sessions(service.address, service.pid, load, lambda: bar.advance(task)), origin


def _text_tokens(path: Path | None, model: str) -> tuple[int, ...]:
    from kvservice.demo.document import shipped_text
    from kvservice.models.fetch import resolve
    from kvservice.models.tokenizer import Tokenizer
    from kvservice.types import PromptFormat, TextRole

    text = shipped_text() if path is None else read_file(path, "--text").decode(errors="replace")
    tokenizer = Tokenizer.load(resolve(model, None))
    tokens = tuple(tokenizer.encode(text, TextRole.DOCUMENT, PromptFormat.RAW, first=True))
    if not tokens:
        raise ConfigError(f"--text {path}: it is empty; give a file with prose, or leave --text out")
    return tokens


def _show_turns(load: SessionLoad, kv_bytes: int, result: SessionsResult) -> None:
    columns = ("turn", "wall s", "TTFT s, mean", "TTFT s, max", "output tok/s")
    show_table(
        f"{load.sessions} sessions x {load.document_tokens:,} tokens, recipe {load.recipe}, "
        f"{human_bytes(kv_bytes)} of device KV",
        columns,
        [
            (
                str(turn.turn),
                f"{turn.wall_s:.1f}",
                f"{turn.ttft_s_mean:.2f}",
                f"{turn.ttft_s_max:.2f}",
                f"{turn.output_tokens_per_s:.1f}",
            )
            for turn in result.turns
        ],
        numeric=columns,
    )
    peaks = result.peaks
    rate = "-" if result.recall_hit_rate is None else f"{result.recall_hit_rate:.1%}"
    show_table(
        "Memory at its peak, and what moved",
        ("device KV", "workspace", "host KV", "Redis", "server RSS", "tier bytes/token", "recall hits", "recomputed"),
        [
            (
                human_bytes(peaks.device_kv_bytes),
                human_bytes(peaks.workspace_bytes),
                human_bytes(peaks.host_kv_bytes),
                human_bytes(peaks.redis_kv_bytes),
                human_bytes(result.rss_bytes_peak),
                human_bytes(result.tier_bytes_moved_per_token),
                rate,
                f"{result.recomputed_tokens:,} tokens",
            )
        ],
    )


app.command("context")(context)
app.command("methods")(methods)
app.command("roofline")(roofline)
app.command("start")(start)
app.command("soak")(soak)
app.command("interference")(interference)
app.command("kernels")(kernels)
app.command("tier")(tier)
app.command("resume")(resume)
app.command("churn")(churn)
app.command("placement")(placement)
app.command("fairness")(fairness)
app.command("quotas")(quotas)
app.command("gateway")(gateway)
app.command("admitted")(admitted)
app.command("kills")(kills)
app.command("scale")(scale)
app.command("rolls")(rolls)
