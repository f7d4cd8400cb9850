"""`kvservice adapt`: trains a model's adapter. Training is in `kvservice.training`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvservice import __version__
from kvservice.cli.bench_soak import check_writable
from kvservice.cli.evaluate import Dtype, text_files
from kvservice.cli.options import DEFAULT_MODEL, JsonFile, Model, MoreTextFiles, Threads, parse_names
from kvservice.cli.output import hint, progress_bar, show_table, write_json
from kvservice.cli.settings import read_file
from kvservice.compression.sharing import SharingMode
from kvservice.errors import ConfigError

if TYPE_CHECKING:
    from kvservice.compression.sharing_map import SharingMap
    from kvservice.models.tokenizer import Tokenizer
    from kvservice.training.network import Network
    from kvservice.training.settings import TrainingSettings
    from kvservice.training.state import Curve
    from kvservice.training.texts import Texts, TrainingText
    from kvservice.training.trainer import Held, Trainer

app = typer.Typer(help="Train what makes a recipe lose less.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    # With one command only, typer would leave out its name.
    pass


@app.command("pod")
def pod(
    text: Annotated[
        list[Path], typer.Option("--text", metavar="FILE|DIR", help="Texts to train on, or folders; may be repeated.")
    ],
    sharing_map: Annotated[Path, typer.Option("--map", metavar="FILE", help="Which layers share, of `calibrate pod`.")],
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps of the whole run, with those done before.")],
    out: Annotated[
        Path,
        typer.Option("--out", metavar="ADAPTER", help="The adapter, safetensors; beside it the run, .csv and .png."),
    ],
    more_texts: MoreTextFiles = None,
    held: Annotated[
        list[Path] | None,
        typer.Option("--held", metavar="FILE|DIR", help="Texts that are only measured on; may be repeated."),
    ] = None,
    sharing: Annotated[
        SharingMode, typer.Option("--sharing", help="What layers without keys score by; to be served likewise.")
    ] = SharingMode.SCORE,
    method: Annotated[
        str, typer.Option("--method", help="lora: matrices of low rank are added. full: whole ones; a large file.")
    ] = "lora",
    rank: Annotated[int, typer.Option("--rank", min=1, help="Of lora's matrices.")] = 16,
    matrices: Annotated[
        str, typer.Option("--matrices", metavar="NAME,...", help="Which of each layer: qkv, o, gate_up, down.")
    ] = "qkv,o,gate_up,down",
    layers: Annotated[
        str, typer.Option("--layers", help="followers: those without keys in some KV head; or all.")
    ] = "followers",
    learning_rate: Annotated[float, typer.Option("--learning-rate", min=0, help="The highest.")] = 1e-3,
    context: Annotated[int, typer.Option("--context", min=1, help="Tokens of each text that is drawn.")] = 2048,
    texts_per_step: Annotated[
        int, typer.Option("--texts-per-step", min=1, help="Texts whose gradients are added up.")
    ] = 2,
    loss_tokens: Annotated[
        int, typer.Option("--loss-tokens", min=1, help="Of each text, drawn; next tokens are compared there.")
    ] = 512,
    state_weight: Annotated[
        float, typer.Option("--state-weight", min=0, help="Of the distance between layers' outputs in the loss.")
    ] = 0.0,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Compute layers again for gradients: less memory, more time.")
    ] = False,
    eval_every: Annotated[int, typer.Option("--eval-every", min=1, help="Steps between two looks at --held.")] = 25,
    save_every: Annotated[int, typer.Option("--save-every", min=1, help="Steps after which a run may be cut.")] = 5,
    seed: Annotated[
        int, typer.Option("--seed", help="Of the texts that are drawn, and of what training begins with.")
    ] = 7,
    model: Model = DEFAULT_MODEL,
    dtype: Dtype = "bf16",
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Train an adapter: changes of weights with which sharing distant keys by this map loses less.

    The model with shared keys learns to predict next tokens as it does with all its keys. A run that was cut off goes
    on where it last wrote its state, when the same command is given again. --steps may then be another number.

    Give texts like those that will be served; those of --held aren't trained on.
    """
    from kvservice.training.settings import TrainingSettings

    settings = _settings(
        {
            "mode": sharing,
            "steps": steps,
            "context": context,
            "texts_per_step": texts_per_step,
            "method": method,
            "rank": rank,
            "matrices": tuple(parse_names(matrices)),
            "layers": layers,
            "learning_rate": learning_rate,
            "loss_tokens": loss_tokens,
            "state_weight": state_weight,
            "recompute": recompute,
            "seed": seed,
        }
    )
    assert isinstance(settings, TrainingSettings)
    beside = {suffix: out.with_suffix(suffix) for suffix in (".run", ".csv", ".png")}
    if out in beside.values():
        raise typer.BadParameter(f"--out {out}: the run's own files take this name; name it .safetensors")
    for option, path in (("--out", out), ("--json", json_file)):
        check_writable(option, path)
    import kvservice.bench.plots
    from kvservice.training.state import Curve, latest, load, tokens_per_second
    from kvservice.training.texts import Texts
    from kvservice.training.trainer import Trainer

    network, read_map, tokenizer = _load(model, dtype, device, threads, sharing_map)
    texts = Texts(_read("--text", [*text, *(more_texts or [])], tokenizer), context)
    held_texts = Texts(_read("--held", held, tokenizer), context + 1) if held else None
    _check_apart(texts, held_texts)
    groups = read_map.layer_groups
    trainer = Trainer(network, groups, settings, texts, held_texts)
    identity = {
        "settings": settings.identity,
        "model": read_map.model.fingerprint,
        "map": groups.digest,
        "texts": texts.digest,
        "held-out texts": held_texts.digest if held_texts else "",
        "dtype": dtype,
    }
    state = beside[".run"]
    curve = load(state, trainer, identity) if state.exists() else Curve()
    if trainer.step_number:
        hint(f"{state}: going on after {trainer.step_number} steps.")
    hint(
        f"{len(texts.texts)} texts of {texts.num_tokens:,} tokens; {groups.num_groups} groups of {groups.num_cells} "
        f"cells, {groups.saved_fraction():.1%} of distant KV saved; {sum(p.numel() for p in trainer.parameters):,} "
        "numbers are trained."
    )
    _train(trainer, curve, beside, identity, eval_every=eval_every, save_every=save_every)
    speed = tokens_per_second(curve.steps)
    training = {
        **_training_record(settings, trainer, curve, texts, dtype),
        "map_delta": read_map.grouping.delta,
        "saved_of_distant": groups.saved_fraction(),
    }
    size = _write(out, read_map, settings, trainer, training)
    kvservice.bench.plots.plot_training(
        beside[".png"],
        [(step.step, step.kl) for step in curve.steps],
        {done: (one.kl, one.nll - one.dense_nll) for done, one in sorted(curve.held.items())},
        f"{read_map.model.name}, {groups.saved_fraction():.0%} of distant KV saved, by {sharing.value}",
    )
    _show(curve)
    hint(f"Adapter {out}, {size:,} bytes; {trainer.tokens:,} tokens, {speed:,.0f} tokens/s.")
    if json_file is not None:
        results = {
            **training,
            "adapter_bytes": size,
            "tokens_per_s": speed,
            "held": {str(done): asdict(one) for done, one in curve.held.items()},
            "last": asdict(last) if (last := latest(curve.held)) else None,
        }
        names = [each.name for each in texts.texts]
        write_json(json_file, {**settings.model_dump(mode="json"), **identity, "text_names": names}, results)


def _train(
    trainer: Trainer,
    curve: Curve,
    files: Mapping[str, Path],
    identity: Mapping[str, str],
    *,
    eval_every: int,
    save_every: int,
) -> None:
    """All steps that are left, with a line for each; the run is written as it goes."""
    from kvservice.training.state import save

    steps = trainer.settings.steps
    with progress_bar() as bar:
        task = bar.add_task("steps", total=steps, completed=trainer.step_number)
        while True:
            done = trainer.step_number
            if (done % eval_every == 0 or done >= steps) and done not in curve.held:
                found = trainer.evaluate()
                if found is not None:
                    curve.held[done] = found
                    hint(_held_line(done, found))
            if done and (done % save_every == 0 or done >= steps):
                save(files[".run"], trainer, curve, identity)
                curve.write_csv(files[".csv"])
            if done >= steps:
                break
            step = trainer.step()
            curve.steps.append(step)
            hint(
                f"step {step.step}: KL {step.kl:.4f}, states {step.state_distance:.4f}, gradient {step.gradient:.2f}, "
                f"rate {step.learning_rate:.1e}, {step.seconds:.1f} s"
            )
            bar.update(task, completed=step.step)


def _settings(values: dict[str, object]) -> TrainingSettings:
    from pydantic import ValidationError

    from kvservice.training.settings import TrainingSettings

    try:
        return TrainingSettings.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = "-".join(str(part) for part in first["loc"][:1]).replace("_", "-")
        raise ConfigError(f"--{where} {first['input']!r}: {first['msg']}") from None


def _load(
    model: str, dtype: str, device: str, threads: int | None, path: Path
) -> tuple[Network, SharingMap, Tokenizer]:
    import os

    import torch

    from kvservice.compression.sharing_map import read_map
    from kvservice.models.fetch import resolve
    from kvservice.models.loader import read_model
    from kvservice.models.sharing import check_shareable, model_facts
    from kvservice.models.tokenizer import Tokenizer
    from kvservice.training.network import Network

    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    if dtype not in dtypes:
        raise ConfigError(f"--dtype {dtype}: choose bf16 or fp32")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"--device {device}: choose cpu, or cuda where torch sees one")
    folder = resolve(model, None)
    check_shareable(folder)
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    spec, weights = read_model(folder, dtypes[dtype])
    sharing_map = read_map(path, model_facts(spec))
    return Network(spec, weights, torch.device(device)), sharing_map, Tokenizer.load(folder)


def _read(option: str, paths: Sequence[Path], tokenizer: Tokenizer) -> list[TrainingText]:
    import torch

    from kvservice.training.texts import TrainingText
    from kvservice.types import PromptFormat, TextRole

    found = []
    for path in text_files(option, paths):
        content = read_file(path, option)
        tokens = tokenizer.encode(content.decode(errors="replace"), TextRole.DOCUMENT, PromptFormat.RAW, first=True)
        sha256 = hashlib.sha256(content).hexdigest()
        found.append(TrainingText(path.name, sha256, torch.tensor(tokens, dtype=torch.int32)))
    return found


def _check_apart(texts: Texts, held: Texts | None) -> None:
    """What is measured on may not be trained on.

    Raises:
        ConfigError: a text is in both.
    """
    trained = {text.sha256: text.name for text in texts.texts}
    both = [text.name for text in held.texts if text.sha256 in trained] if held else []
    if both:
        raise ConfigError(f"--held {both[0]}: is also among the texts that are trained on; take it out of one of them")


def _training_record(
    settings: TrainingSettings, trainer: Trainer, curve: Curve, texts: Texts, dtype: str
) -> dict[str, str | int | float | bool | None]:
    """For people who find the adapter."""
    last = curve.held[max(curve.held)] if curve.held else None
    return {
        **settings.model_dump(mode="json", exclude={"matrices"}),
        "matrices": ",".join(settings.matrices),
        "dtype": dtype,
        "text_digest": texts.digest,
        "texts": len(texts.texts),
        "tokens": trainer.tokens,
        "seconds": sum(step.seconds for step in curve.steps),
        **({f"held_{name}": value for name, value in asdict(last).items()} if last else {}),
    }


def _write(
    out: Path,
    sharing_map: SharingMap,
    settings: TrainingSettings,
    trainer: Trainer,
    training: dict[str, str | int | float | bool | None],
) -> int:
    from kvservice.models.adapter import AdapterFacts, write_adapter

    facts = AdapterFacts(
        tool=f"kvservice {__version__}",
        model=sharing_map.model,
        groups=sharing_map.groups,
        mode=settings.mode,
        training=training,
    )
    write_adapter(out, facts, trainer.changes)
    return out.stat().st_size


def _held_line(done: int, held: Held) -> str:
    return (
        f"held out, after {done} steps: KL {held.kl:.4f}, NLL {held.nll:.4f} ({held.nll - held.dense_nll:+.4f} to "
        f"dense, {held.unshared_nll - held.dense_nll:+.4f} unshared), top-1 {held.top1:.1%}"
    )


def _show(curve: Curve) -> None:
    columns = ("steps", "KL", "NLL", "of dense", "not sharing", "top-1")
    rows = [
        (
            str(done),
            f"{one.kl:.4f}",
            f"{one.nll:.4f}",
            f"{one.dense_nll:.4f}",
            f"{one.unshared_nll:.4f}",
            f"{one.top1:.1%}",
        )
        for done, one in sorted(curve.held.items())
    ]
    if rows:
        show_table("On texts held out", columns, rows, numeric=columns)
