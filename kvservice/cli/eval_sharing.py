"""`kvservice eval sharing`: what sharing distant keys saves and costs. Measuring is in `kvservice.evaluation`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvservice.cli.bench_soak import check_writable
from kvservice.cli.evaluate import EVAL_KV_BYTES, Dtype, read_texts
from kvservice.cli.options import DEFAULT_MODEL, JsonFile, Model, MoreTextFiles, TextFiles, Threads
from kvservice.cli.output import hint, human_bytes, progress_bar, show_table, write_json
from kvservice.cli.settings import worker_config
from kvservice.compression.layer_groups import delta_for_saving, group_layers
from kvservice.compression.sharing import SharingPlan
from kvservice.errors import ConfigError

if TYPE_CHECKING:
    from kvservice.compression.layer_groups import LayerGroups
    from kvservice.compression.sharing_map import SharingMap
    from kvservice.engine import Engine
    from kvservice.evaluation.sharing_helpers import Fit
    from kvservice.evaluation.sharing_table import Case, Kept, Row, SavedBytes, ServedRow, Text
    from kvservice.models.adapter import Adapter
    from kvservice.models.llama import LlamaModel

Texts = list[tuple[str, list[int]]]

COLUMNS = ("method", "mode", "δ", "groups", "saved", "KL", "from - to", "NLL change", "top-1")
SERVED_COLUMNS = ("recipe", "KL", "from - to", "NLL change", "top-1")
BYTES_COLUMNS = ("δ", "exact", "pod-exact", "saved of distant KV", "½ (1 - groups / cells)")


def sharing(
    texts: TextFiles,
    fit_texts: Annotated[
        list[Path],
        typer.Option(
            "--fit-texts", metavar="FILE|DIR", help="Other texts, that helpers are fitted on; --fit-tokens each."
        ),
    ],
    sharing_map: Annotated[
        Path, typer.Option("--map", metavar="FILE", help="How alike layers attend, of `calibrate pod`.")
    ],
    more_texts: MoreTextFiles = None,
    deltas: Annotated[
        str, typer.Option("--deltas", metavar="D,D,...", help="Least similarities within a group.")
    ] = "0.3,0.4,0.5,0.6,0.7,0.8,0.9",
    random_draws: Annotated[int, typer.Option("--random", min=1, help="Draws of random groups for each.")] = 5,
    served_saving: Annotated[
        float,
        typer.Option("--served-saving", min=0, max=0.5, help="Served recipes share at least so much of distant KV."),
    ] = 0.1,
    context: Annotated[int, typer.Option("--context", min=1, help="Tokens read before the measured ones.")] = 4096,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="Measured tokens of each text.")] = 256,
    fit_tokens: Annotated[int, typer.Option("--fit-tokens", min=1, help="Tokens read of each text to fit on.")] = 2048,
    adapters: Annotated[
        list[Path] | None,
        typer.Option("--adapter", metavar="FILE", help="Also weights trained by `adapt pod`; may be repeated."),
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option("--keep", metavar="FILE", help="Measurements go here one by one; a run that was cut off goes on."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of random groups and of intervals.")] = 7,
    model: Model = DEFAULT_MODEL,
    dtype: Dtype = "bf16",
    threads: Threads = None,
    json_file: JsonFile = None,
    markdown: Annotated[Path | None, typer.Option("--markdown", metavar="FILE", help="Also write the tables.")] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE.png", help="Also draw loss against saving. Needs the extra `plots`."),
    ] = None,
) -> None:
    """Bytes saved against distance from dense, for layers that share distant keys, and for others at equal bytes.

    Groups by similarity at each --deltas, in both modes, with helpers that need no training; random and uniform groups;
    StreamingLLM. Then the recipes as they are served. Takes seconds for each text and case: use --keep.
    """
    chosen_deltas = _parse_deltas(deltas)
    for option, path in (("--json", json_file), ("--markdown", markdown), ("--plot", plot), ("--keep", keep)):
        check_writable(option, path)
    if plot is not None:
        import kvservice.bench.plots
    from kvservice.evaluation.sharing_table import Kept, make_cases, served_rows, summarize

    read, skipped = read_texts([*texts, *(more_texts or [])], context, new_tokens, model)
    fitted, _ = read_texts(fit_texts, fit_tokens - 2, 1, model)
    loaded, read_map = _load(model, dtype, threads, sharing_map, context + new_tokens)
    settings: dict[str, object] = {
        "model": model,
        "origin": loaded.spec.origin,
        "weights": loaded.spec.digest,
        "dtype": dtype,
        "context": context,
        "new_tokens": new_tokens,
        "fit_tokens": fit_tokens,
        "texts": [name for name, _ in read],
        "fit_texts": [name for name, _ in fitted],
        "map_texts": read_map.text_digest,
        "grouping": {"linkage": read_map.grouping.linkage.value, "per": read_map.grouping.per.value},
    }
    kept = Kept(keep, settings)
    draws = [seed + number for number in range(random_draws)]
    cases = make_cases(read_map, chosen_deltas, draws, context + new_tokens)
    served = group_layers(
        read_map.similarity,
        delta_for_saving(read_map.similarity, served_saving, read_map.grouping.linkage, read_map.grouping.per),
        read_map.grouping.linkage,
        read_map.grouping.per,
    )
    work = _Work(loaded, read, fitted, kept, new_tokens)
    read_densely = work.read()
    saved = work.saved_bytes(cases)
    work.cases(cases, read_densely)
    work.served(_served_engine(model, dtype, threads, SharingPlan(served)), served, read_densely)
    rows, recipes = summarize(cases, read_densely, kept, seed), served_rows(served, read_densely, kept, seed)
    if adapters:
        more_rows, more_recipes = _adapted(work, read_densely, adapters, model, dtype, threads, seed)
        rows, recipes = rows + more_rows, recipes + more_recipes
    title = f"after {context:,} tokens: {new_tokens * len(read):,} tokens of {len(read)} text(s)"
    tables = _tables(rows, recipes, saved, served, title)
    for name, columns, cells in tables:
        show_table(name, columns, cells, numeric=columns[1:])
    hint(f"Model {loaded.spec.name}: {loaded.spec.origin}. Its figures say nothing about another model: measure yours.")
    if json_file is not None:
        config = {**settings, "deltas": chosen_deltas, "random_seeds": draws, "skipped_texts": skipped, "seed": seed}
        results = {
            "rows": [asdict(row) for row in rows],
            "served": {
                "groups": served.runs,
                "num_groups": served.num_groups,
                "saved_of_distant": served.saved_fraction(),
                "rows": [asdict(row) for row in recipes],
            },
            "bytes": [asdict(one) for one in saved],
        }
        write_json(json_file, {**config, "threads": threads}, results)
    if markdown is not None:
        _write_markdown(markdown, tables)
    if plot is not None:
        lines = _lines(rows)
        kvservice.bench.plots.plot_sharing(plot, lines, f"{loaded.spec.name} {title}")


def _adapted(
    work: _Work, texts: Sequence[Text], paths: Sequence[Path], model: str, dtype: str, threads: int | None, seed: int
) -> tuple[list[Row], list[ServedRow]]:
    """Measures adapters, one after the other, since each is a model of its own."""
    import torch

    from kvservice.evaluation.sharing_adapted import Adapted, measure, measure_served, rows, served_rows
    from kvservice.models.adapter import adapt, read_adapter
    from kvservice.models.fetch import resolve
    from kvservice.models.llama import LlamaModel
    from kvservice.models.loader import read_model
    from kvservice.models.sharing import model_facts

    found = []
    with progress_bar() as bar:
        task = bar.add_task("adapters", total=len(paths) * len(texts))
        for path in paths:
            adapter = read_adapter(path)
            spec, weights = read_model(resolve(model, None), work.model.dtype)
            adapter.check_model(model_facts(spec))
            one = Adapted(path.stem, adapter.facts, adapter.digest)
            in_one_pass = LlamaModel(*adapt(spec, weights, adapter), torch.device("cpu"))
            engine = _served_engine(model, dtype, threads, one.plan, adapter)
            for text in texts:
                measure(in_one_pass, one, text, work.kept)
                measure_served(engine, one, text, work.kept)
                bar.advance(task)
            engine.close()
            found.append(one)
    return rows(found, texts, work.kept, seed), served_rows(found, texts, work.kept, seed)


def _parse_deltas(text: str) -> list[float]:
    try:
        return sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise typer.BadParameter(f"--deltas {text}: write similarities, such as 0.5,0.8") from None


def _load(model: str, dtype: str, threads: int | None, path: Path, num_tokens: int) -> tuple[LlamaModel, SharingMap]:
    """The model with the torch runner, whose attention can be replaced, and the map.

    Raises:
        ConfigError: a setting is wrong, or the map is another model's.
    """
    import os

    import torch

    from kvservice.compression.sharing_map import read_map
    from kvservice.models.fetch import resolve
    from kvservice.models.llama import LlamaModel
    from kvservice.models.loader import read_model
    from kvservice.models.sharing import check_shareable, model_facts

    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    if dtype not in dtypes:
        raise ConfigError(f"--dtype {dtype}: choose bf16 or fp32")
    folder = resolve(model, None)
    check_shareable(folder)
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    spec, weights = read_model(folder, dtypes[dtype])
    if num_tokens > spec.shape.max_positions:
        raise ConfigError(f"--context and --new-tokens: {spec.name} has {spec.shape.max_positions:,} positions")
    return LlamaModel(spec, weights, torch.device("cpu")), read_map(path, model_facts(spec))


def _served_engine(
    model: str, dtype: str, threads: int | None, plan: SharingPlan, adapter: Adapter | None = None
) -> Engine:
    import torch

    from kvservice.cli.compose import engine_config, open_model
    from kvservice.engine import Engine
    from kvservice.engine.ports import NoWriter
    from kvservice.models.fetch import resolve

    config = worker_config({"model": model, "kv_bytes": EVAL_KV_BYTES, "dtype": dtype, "threads": threads})
    used = torch.get_num_threads()
    engine = Engine(open_model(config, resolve(model, None), adapter), engine_config(config), NoWriter(), sharing=plan)
    # Opening a model may leave torch one thread; the other model needs them all.
    torch.set_num_threads(used)
    return engine


@dataclass(frozen=True, slots=True)
class _Work:
    """What is measured, with its progress shown. What is kept isn't measured again."""

    model: LlamaModel
    texts: Texts
    fit_texts: Texts
    kept: Kept
    count: int

    def read(self) -> list[Text]:
        from kvservice.evaluation.sharing_table import read_text

        return [read_text(self.model, name, tokens, self.count) for name, tokens in self.texts]

    def saved_bytes(self, cases: Sequence[Case]) -> list[SavedBytes]:
        from kvservice.evaluation.sharing_table import measure_bytes

        groups = {case.delta: case.groups for case in reversed(cases) if case.groups and case.method == "similarity"}
        token_ids = self.texts[0][1]
        return [measure_bytes(self.model, delta, each, token_ids) for delta, each in sorted(groups.items())]

    def served(self, engine: Engine, groups: LayerGroups, texts: Sequence[Text]) -> None:
        from kvservice.evaluation.sharing_table import SERVED, measure_served

        with progress_bar() as bar:
            total = (1 + len(SERVED)) * sum(len(text.token_ids) - 1 for text in texts)
            task = bar.add_task("as served", total=total)
            for text in texts:
                measure_served(engine, groups, text, self.kept, lambda count: bar.advance(task, count))
        engine.close()

    def cases(self, cases: Sequence[Case], texts: Sequence[Text]) -> None:
        from kvservice.evaluation.sharing_table import measure

        todo = {case.key: case for case in reversed(cases)}
        fit: Fit | None = None
        with progress_bar() as bar:
            task = bar.add_task("cases", total=len(todo) * len(texts))
            for case in cases:
                if todo.pop(case.key, None) is None:
                    continue
                bar.update(task, description=f"{case.method} {case.delta:g}")
                for text in texts:
                    if self.kept.get(case.key, text.name) is None:
                        if case.needs_fit and fit is None:
                            fit = self._fit(cases)
                        self.kept.put(case.key, text.name, measure(self.model, text, case, fit))
                    bar.advance(task)

    def _fit(self, cases: Sequence[Case]) -> Fit:
        from kvservice.evaluation.sharing_helpers import fit_helpers, pairs_of

        groups = [case.groups for case in cases if case.needs_fit and case.groups is not None]
        return fit_helpers(self.model, [tokens for _, tokens in self.fit_texts], pairs_of(groups))


def _tables(
    rows: Sequence[Row], recipes: Sequence[ServedRow], saved: Sequence[SavedBytes], served: LayerGroups, title: str
) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    cases: list[tuple[str, ...]] = [
        (
            row.method,
            row.mode,
            f"{row.delta:g}",
            str(row.num_groups or ""),
            f"{row.saved_fraction:.1%}",
            *_figures(row),
        )
        for row in rows
    ]
    share = f"{served.num_groups} groups of {served.num_cells} cells, {served.saved_fraction():.1%} of distant KV saved"
    return [
        (f"Distance from dense in one pass {title}", COLUMNS, cases),
        (f"As served {title}; {share}", SERVED_COLUMNS, [(row.recipe, *_figures(row)) for row in recipes]),
        (
            "Distant KV of one session in host memory",
            BYTES_COLUMNS,
            [
                (
                    f"{one.delta:g}",
                    human_bytes(one.whole_bytes),
                    human_bytes(one.shared_bytes),
                    f"{one.saved_fraction:.2%}",
                    f"{one.identity:.2%}" + (f" - {one.rounding:.2%}" if one.rounding else ""),
                )
                for one in saved
            ],
        ),
    ]


def _figures(row: Row | ServedRow) -> tuple[str, str, str, str]:
    low, high = row.kl_interval
    return f"{row.kl_mean:.4f}", f"{low:.4f} - {high:.4f}", f"{row.nll_change:+.3f}", f"{row.top1_agreement:.1%}"


def _write_markdown(path: Path, tables: Iterable[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]) -> None:
    parts = []
    for title, columns, rows in tables:
        lines = [f"## {title}", "", _line(columns), _line(["---"] * len(columns)), *map(_line, rows), ""]
        parts.append("\n".join(lines))
    try:
        path.write_text("\n".join(parts))
    except OSError as error:
        raise ConfigError(f"--markdown {path}: can't be written: {error.strerror}") from error


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _lines(rows: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
    """A line for each method and mode, points of (share saved, KL)."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        name = f"{row.method}, by {row.mode}" if row.mode else row.method
        lines.setdefault(name, []).append((row.saved_fraction, row.kl_mean))
    return lines
