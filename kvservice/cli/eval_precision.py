"""`kvservice eval precision`: what arithmetic alone does. Measuring is done in `kvservice.evaluation`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from kvservice.cli.options import DEFAULT_MODEL, JsonFile, Model, TextFiles, Threads
from kvservice.cli.output import hint, progress_bar, show_table, write_json

REFERENCE = "transformers fp32"


def precision(
    texts: TextFiles,
    context: Annotated[int, typer.Option("--context", min=1, help="Tokens read before the measured ones.")] = 1024,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="Measured tokens of each text.")] = 128,
    model: Model = DEFAULT_MODEL,
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Distance of next-token distributions from transformers' in fp32: ours in fp32 and bf16, transformers' in bf16."""
    import torch

    from kvservice.cli.evaluate import load_engine, read_texts
    from kvservice.evaluation.precision import compare, score_dense
    from kvservice.models.fetch import resolve
    from kvservice.models.peer import Peer

    chosen, skipped = read_texts(texts, context, new_tokens, model)
    forced = [tokens[: context + new_tokens] for _, tokens in chosen]
    folder = resolve(model, None)
    logits: dict[str, list[torch.Tensor]] = {}
    with progress_bar() as bar:
        task = bar.add_task("tokens", total=4 * (context + new_tokens) * len(chosen))
        for name, dtype in ((REFERENCE, torch.float32), ("transformers bf16", torch.bfloat16)):
            peer = Peer(folder, dtype)
            logits[name] = [peer.score(tokens, new_tokens) for tokens in forced]
            bar.advance(task, (context + new_tokens) * len(chosen))
        for dtype_name in ("fp32", "bf16"):
            engine = load_engine(model, dtype_name, threads)
            logits[f"kvservice {dtype_name}"] = [
                score_dense(engine, tokens, context, lambda count: bar.advance(task, count)) for tokens in forced
            ]
            engine.close()
    rows = compare(logits.pop(REFERENCE), logits)
    columns = ("runner", "KL", "top-1", "largest difference of logits")
    show_table(
        f"Beside {REFERENCE}: {len(chosen)} texts x {new_tokens} tokens after {context:,}",
        columns,
        [(row.runner, f"{row.kl_mean:.2e}", f"{row.top1_agreement:.2%}", f"{row.max_difference:.2e}") for row in rows],
        numeric=columns[1:],
    )
    hint(f"Model {model}. Both round bf16 at their own places: neither is nearer to the truth by rule.")
    if json_file is not None:
        settings = {
            "model": model,
            "context": context,
            "new_tokens": new_tokens,
            "texts": [name for name, _ in chosen],
            "skipped_texts": skipped,
            "threads": threads,
        }
        write_json(json_file, settings, {"rows": [asdict(row) for row in rows]})
