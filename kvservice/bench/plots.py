"""Figures of measurements, as PNG files. The only importer of matplotlib, which is an extra.

No global state and no windows: figures are made, saved and dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path

from kvservice.bench.context import ContextRow
from kvservice.bench.fleet_sim import PolicyRow
from kvservice.bench.replicas import Sample as FleetSample
from kvservice.bench.soak import MemoryTerms, Sample
from kvservice.compression.layer_groups import LayerGroups, Similarity
from kvservice.errors import ConfigError

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import FuncFormatter, MaxNLocator
except ModuleNotFoundError as error:
    raise ConfigError("figures need matplotlib: pip install 'kvservice[plots]'") from error

MIB = 1 << 20
DPI = 120

OWNERS = {
    "workspace_bytes": ("prefill workspace", "#9aa0a6"),
    "window_bytes": ("sinks and windows, dense KV", "#3b6fb6"),
    "index_bytes": ("recall indexes", "#e0a030"),
    "slot_bytes": ("recall slots", "#5fa55a"),
}
PREEMPTIONS = {
    "swapped_out": ("running, swapped out", "#c0392b"),
    "forgotten": ("running, to be recomputed", "#7d3c98"),
    "idle_swapped_out": ("idle, swapped out", "#e08a7e"),
    "idle_dropped": ("idle, dropped", "#8a8a8a"),
}
BEFORE = "#222222"
MARKS = ("o", "s", "^")
LINES = ("#3b6fb6", "#c0392b", "#e0a030", "#5fa55a", "#7d3c98")


def plot_soak(path: Path, samples: Sequence[Sample], kv_bytes: int, memory: MemoryTerms, title: str) -> None:
    """Arena by owner, who made room, host tier and process memory, over time.

    Raises:
        ConfigError: the file can't be written.
    """
    figure = Figure(figsize=(11, 10), layout="constrained")
    arena, room, host, process = figure.subplots(4, 1, sharex=True, gridspec_kw={"height_ratios": (3.2, 1.1, 1.8, 2.2)})
    minutes = [sample.time_s / 60 for sample in samples]
    figure.suptitle(title, fontsize=12)
    arena.stackplot(
        minutes,
        [_mib(samples, name) for name in OWNERS],
        labels=[label for label, _ in OWNERS.values()],
        colors=[color for _, color in OWNERS.values()],
        linewidth=0,
    )
    reserved = [(sample.device_reserved_bytes + sample.workspace_bytes) / MIB for sample in samples]
    arena.plot(minutes, reserved, color=BEFORE, linewidth=1.0, label="promised")
    arena.axhline(kv_bytes / MIB, color=BEFORE, linestyle="--", linewidth=1.0, label="--kv-bytes")
    arena.set_ylabel("arena, MiB")
    _plot_preemptions(room, minutes, samples)
    host.plot(minutes, _mib(samples, "host_bytes"), color="#3b6fb6", label="in use")
    host.plot(minutes, _mib(samples, "host_reserved_bytes"), color=BEFORE, linewidth=1.0, label="promised")
    host.set_ylabel("host tier, MiB")
    process.plot(minutes, _mib(samples, "rss_bytes"), color="#9aa0a6", label="resident")
    process.plot(minutes, _mib(samples, "anonymous_bytes"), color="#c0392b", label="of that anonymous")
    process.axhline(memory.bound_bytes / MIB, color=BEFORE, linestyle="--", linewidth=1.0, label="bound of anonymous")
    process.set_ylabel("process, MiB")
    process.set_xlabel("minutes")
    for axes in (arena, host, process):
        axes.set_ylim(bottom=0)
        axes.margins(x=0.01)
        _beside(axes)
    _save(figure, path)


def plot_intervals(path: Path, intervals: Mapping[str, Sequence[float]], limit_ms: float, title: str) -> None:
    """What part of the inter-token intervals is longer than so many milliseconds, one line a case.

    Args:
        path: of the PNG.
        intervals: seconds, by the name of the case.
        limit_ms: drawn as a line: the bar that the 99th percentile is to stay below.
        title: of the figure.

    Raises:
        ConfigError: the file can't be written.
    """
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for (name, seconds), color in zip(intervals.items(), LINES, strict=False):
        ordered = sorted(second * 1e3 for second in seconds)
        beyond = [1 - index / len(ordered) for index in range(len(ordered))]
        axes.step(ordered, beyond, where="pre", color=color, label=name)
    axes.axhline(0.01, color="#9aa0a6", linewidth=0.8)
    axes.text(1.0, 0.01, "p99 ", transform=axes.get_yaxis_transform(), ha="right", va="bottom", color="#666666")
    axes.axvline(limit_ms, color=BEFORE, linestyle="--", linewidth=1.0, label=f"1.3 x p99 alone: {limit_ms:.0f} ms")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda part, _: f"{part:.3%}".rstrip("0%").rstrip(".") + " %"))
    axes.set_xlabel("time between two tokens of a session, ms")
    axes.set_ylabel("part of the intervals that are longer")
    axes.set_title(title)
    axes.grid(visible=True, color="#eeeeee")
    axes.set_axisbelow(True)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def plot_contexts(path: Path, rows: Mapping[str, Sequence[ContextRow]], title: str) -> None:
    """Time of a decode step against the length of the context, one line a recipe.

    Raises:
        ConfigError: the file can't be written.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for (name, points), color in zip(rows.items(), LINES, strict=False):
        lengths = [point.context_tokens for point in points]
        axes.plot(lengths, [point.decode_ms_per_token for point in points], "o-", color=color, label=name)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens:,.0f}"))
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("ms a step")
    axes.set_ylim(bottom=0)
    axes.set_title(title)
    axes.grid(visible=True, color="#eeeeee")
    axes.set_axisbelow(True)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def plot_layer_groups(
    path: Path,
    similarity: Similarity,
    groups: LayerGroups,
    distant_mass: Sequence[Sequence[float]],
    title: str,
) -> None:
    """Similarity of every two layers, a panel for each KV head, with its groups outlined; below, the distant mass.

    Args:
        path: of the PNG.
        similarity: of the layers.
        groups: those of more than one layer are outlined.
        distant_mass: `[kv][l]`, share of attention that goes to distant tokens.
        title: of the figure.

    Raises:
        ConfigError: the file can't be written.
    """
    num_columns = min(4, len(similarity))
    num_rows = ceil(len(similarity) / num_columns)
    figure = Figure(figsize=(4.2 * num_columns + 1.2, 5.4 * num_rows + 0.6), layout="constrained")
    figure.suptitle(title, fontsize=12)
    grid = figure.subplots(
        2 * num_rows, num_columns, squeeze=False, sharex=True, gridspec_kw={"height_ratios": (4.0, 1.0) * num_rows}
    )
    image = None
    for kv_head, matrix in enumerate(similarity):
        row, column = divmod(kv_head, num_columns)
        heat, mass = grid[2 * row, column], grid[2 * row + 1, column]
        image = heat.imshow(matrix, vmin=0.0, vmax=1.0, origin="lower", cmap="viridis")
        for layers in groups.runs[kv_head]:
            if len(layers) > 1:
                corner, side = layers[0] - 0.5, len(layers)
                heat.add_patch(Rectangle((corner, corner), side, side, fill=False, edgecolor="#ff4d4d", linewidth=1.6))
        heat.set_title(f"KV head {kv_head}: {len(groups.runs[kv_head])} groups", fontsize=10)
        heat.yaxis.set_major_locator(MaxNLocator(integer=True))
        mass.bar(range(groups.num_layers), distant_mass[kv_head], color="#9aa0a6", width=0.8)
        mass.set_ylim(0.0, 1.0)
        mass.xaxis.set_major_locator(MaxNLocator(integer=True))
        mass.set_xlabel("layer")
        mass.spines[["top", "right"]].set_visible(False)
        if column == 0:
            heat.set_ylabel("layer")
            mass.set_ylabel("distant mass")
    for spare in range(len(similarity), num_rows * num_columns):
        for axes in grid[2 * (spare // num_columns) : 2 * (spare // num_columns) + 2, spare % num_columns]:
            axes.set_axis_off()
    if image is not None:
        figure.colorbar(image, ax=grid[0::2, :].ravel().tolist(), label="similarity of distant attention", shrink=0.8)
    _save(figure, path)


def plot_placement(path: Path, rows: Sequence[PolicyRow], title: str) -> None:
    """Time to first token, bytes moved and imbalance of each policy, side by side.

    Raises:
        ConfigError: the file can't be written.
    """
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    figure.suptitle(title, fontsize=12)
    names = [row.policy.replace("_", " ") for row in rows]
    panels = (
        ("time to first token, p99 (bar) and mean (line), s", [row.ttft_p99_s for row in rows]),
        ("read from the kv Redis, GB", [row.moved_bytes / 1e9 for row in rows]),
        ("busiest worker over the mean", [row.imbalance for row in rows]),
    )
    for axes, (label, values) in zip(figure.subplots(1, 3), panels, strict=True):
        axes.bar(names, values, color=LINES[: len(rows)])
        axes.set_title(label, fontsize=9)
        axes.tick_params(axis="x", labelsize=8, rotation=20)
        axes.grid(axis="y", alpha=0.3)
    for index, row in enumerate(rows):
        figure.axes[0].plot([index - 0.4, index + 0.4], [row.ttft_mean_s] * 2, color=BEFORE, linewidth=1.5)
    _save(figure, path)


def plot_recall(path: Path, lines: Mapping[str, Sequence[tuple[float, float]]], x_label: str, title: str) -> None:
    """How far from dense each way to choose distant tokens is, one line a recipe.

    Args:
        path: of the PNG.
        lines: points of (x, KL in nats), by the recipe's name.
        x_label: what x is.
        title: of the figure.

    Raises:
        ConfigError: the file can't be written.
    """
    figure = Figure(figsize=(9.5, 5.5), layout="constrained")
    axes = figure.subplots()
    for number, (name, points) in enumerate(lines.items()):
        color, mark = LINES[number % len(LINES)], MARKS[number // len(LINES) % len(MARKS)]
        # Dashed in turn, so that lines that lie on one another are both seen. A scale of logarithms has no 0.
        shown = [point for point in sorted(points) if point[0] > 0]
        axes.plot(
            [x for x, _ in shown],
            [kl for _, kl in shown],
            mark,
            color=color,
            label=name,
            linestyle=("-", "--")[number % 2],
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
    axes.set_xlabel(x_label)
    axes.set_ylabel("KL to dense, nats a token")
    axes.set_title(title)
    _beside(axes)
    _save(figure, path)


def plot_sharing(path: Path, lines: Mapping[str, Sequence[tuple[float, float]]], title: str) -> None:
    """How far from dense each way to save KV bytes is, one line a way.

    Args:
        path: of the PNG.
        lines: points of (share of all KV bytes saved, KL in nats), by the way's name.
        title: of the figure.

    Raises:
        ConfigError: the file can't be written.
    """
    figure = Figure(figsize=(9.5, 5.5), layout="constrained")
    axes = figure.subplots()
    for number, (name, points) in enumerate(lines.items()):
        color, mark = LINES[number % len(LINES)], MARKS[number // len(LINES) % len(MARKS)]
        # What saves nothing loses nothing, and a scale of logarithms has no 0.
        shown = sorted({(saved, kl) for saved, kl in points if kl > 0})
        style = ("-", "--")[number % 2]
        axes.plot([100 * x for x, _ in shown], [kl for _, kl in shown], style, marker=mark, color=color, label=name)
    axes.set_yscale("log")
    axes.set_xlabel("KV bytes saved, %")
    axes.set_ylabel("KL to dense, nats a token")
    axes.set_title(title)
    _beside(axes)
    _save(figure, path)


def plot_training(
    path: Path,
    trained: Sequence[tuple[int, float]],
    held: Mapping[int, tuple[float, float]],
    title: str,
) -> None:
    """How far from dense a model is while it is trained, one line for what it reads and two for what it doesn't.

    Args:
        path: of the PNG.
        trained: steps done, and KL in nats.
        held: KL and the change of NLL on texts held out, in nats, by steps done.
        title: of the figure.

    Raises:
        ConfigError: the file can't be written.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*trained, strict=True), color=LINES[0], linewidth=0.8, label="KL, texts trained on")
    if held:
        axes.plot(list(held), [kl for kl, _ in held.values()], "o-", color=LINES[1], label="KL, texts held out")
        axes.plot(list(held), [nll for _, nll in held.values()], "s--", color=LINES[2], label="NLL change, held out")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("steps")
    axes.set_ylabel("nats a token")
    axes.set_title(title)
    axes.legend()
    _save(figure, path)


def plot_churn(
    path: Path, minutes: Sequence[float], panels: Mapping[str, Mapping[str, Sequence[float]]], title: str
) -> None:
    """What processes have while sessions come and go, one panel a quantity, one line a process.

    Args:
        path: of the PNG.
        minutes: of the samples.
        panels: a value for each sample, by the quantity's name and the process's.
        title: of the figure.

    Raises:
        ConfigError: the file can't be written.
    """
    figure = Figure(figsize=(10, 2.4 * len(panels)), layout="constrained")
    figure.suptitle(title)
    for axes, (label, lines) in zip(figure.subplots(len(panels), sharex=True), panels.items(), strict=True):
        for number, (name, values) in enumerate(lines.items()):
            axes.plot(minutes, values, color=LINES[number % len(LINES)], linewidth=1.3, label=name)
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        _beside(axes)
    figure.axes[-1].set_xlabel("minutes")
    _save(figure, path)


def plot_fleet(path: Path, samples: Sequence[FleetSample], title: str) -> None:
    """Workers, admitted calls and held sessions, device and host bytes of a service over time.

    Raises:
        ConfigError: the file can't be written.
    """
    figure = Figure(figsize=(10, 8), layout="constrained")
    workers, sessions, device, host = figure.subplots(4, 1, sharex=True)
    figure.suptitle(title, fontsize=12)
    seconds = [sample.at_s for sample in samples]
    workers.step(seconds, [sample.workers for sample in samples], where="post", color=LINES[0])
    workers.set_ylabel("workers")
    sessions.plot(seconds, [sample.running_calls for sample in samples], color=LINES[1], label="admitted calls")
    sessions.plot(seconds, [sample.resident_sessions for sample in samples], color=LINES[2], label="held sessions")
    _beside(sessions)
    device.plot(seconds, [sample.device_bytes / MIB for sample in samples], color=LINES[0])
    device.set_ylabel("device MiB")
    host.plot(seconds, [sample.host_bytes / MIB for sample in samples], color=LINES[3])
    host.set(ylabel="host MiB", xlabel="seconds")
    for axes in (workers, sessions, device, host):
        axes.set_ylim(bottom=0)
        axes.grid(visible=True, alpha=0.3)
    _save(figure, path)


def _plot_preemptions(axes: Axes, minutes: Sequence[float], samples: Sequence[Sample]) -> None:
    """A row of marks for each kind; each mark is a second in which it happened."""
    for row, (name, (label, color)) in enumerate(PREEMPTIONS.items()):
        counts = [0, *(getattr(sample, name) for sample in samples)]
        times = [minute for minute, old, new in zip(minutes, counts, counts[1:], strict=False) if new > old]
        axes.plot(times, [row] * len(times), "|", color=color, markersize=9, markeredgewidth=1.4)
        axes.text(1.01, row, f"{label}: {counts[-1]}", transform=axes.get_yaxis_transform(), va="center", fontsize=9)
    axes.set_ylim(len(PREEMPTIONS) - 0.5, -0.5)
    axes.set_yticks([])
    axes.set_ylabel("made room")
    axes.spines[["top", "right"]].set_visible(False)


def _mib(samples: Sequence[Sample], name: str) -> list[float]:
    return [getattr(sample, name) / MIB for sample in samples]


def _beside(axes: Axes) -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9)
    axes.grid(visible=True, axis="y", color="#eeeeee")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path, dpi=DPI, format="png")
    except OSError as error:
        raise ConfigError(f"figure {path}: can't be written: {error.strerror}") from error
