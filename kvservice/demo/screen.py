"""How the demonstration looks, on a terminal of 80 columns or in a log. Knows nothing of what is shown when."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

from rich import box
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvservice.client import AppendResult
from kvservice.config.recipes import RECIPES
from kvservice.demo.reader import Reader
from kvservice.types import ModelInfo

WIDTH = 96
NAME_WIDTH = 9

STYLES = {"dense": "cyan", "exact": "magenta", "recall": "green"}

Show = Callable[[str, str], None]
"""Adds the next piece of text to the answer of a recipe."""


class Screen:
    """Prints the demonstration. Bars and spinners only where there is a terminal to draw them on."""

    def __init__(self, console: Console) -> None:
        self._console = console
        console.width = min(console.width, WIDTH)

    def opening(self) -> None:
        """Says what will be shown."""
        self._heading("kvservice: a long document, read once, answered from three kinds of memory")
        rows = Table.grid(padding=(0, 2))
        for name, style in STYLES.items():
            rows.add_row(f"[{style}]{name}[/]", escape(RECIPES[name].summary))
        self._console.print(Padding(rows, (0, 2)))

    def scene(self, address: str, start_s: float, info: ModelInfo, num_tokens: int, pass_key: str) -> None:
        """Says what runs, and on what document."""
        self._heading("What runs")
        rows = Table.grid(padding=(0, 2))
        rows.add_row("service", f"{address}, ready after {start_s:.1f} s: gateway, worker, two redis-servers")
        rows.add_row(
            "model",
            f"{info.name}, tiny, of 4-bit origin ({info.origin}). Don't expect wit: what is shown is the memory.",
        )
        rows.add_row("document", f'"Northanger Abbey", chapters 1 and 2: {num_tokens:,} tokens, one session a recipe')
        rows.add_row("hidden", f'half-way through it: "The pass key is {pass_key}. Remember it. ..."')
        self._console.print(Padding(rows, (0, 2)))
        self._heading("Reading the document")

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """A spinner while something takes its time."""
        if not self._console.is_terminal:
            yield
            return
        with self._console.status(f"{what} ..."):
            yield

    @contextmanager
    def reading(self, recipe: str) -> Iterator[Callable[[int, int], None]]:
        """A progress bar of a prefill; gives what takes done and total tokens."""
        bar = Progress(
            TextColumn(f"  [{STYLES[recipe]}]{recipe:<{NAME_WIDTH}}[/]"),
            BarColumn(bar_width=40),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        with bar:
            task = bar.add_task(recipe, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)

    def has_read(self, recipe: str, read: AppendResult) -> None:
        """Says how long the prefill took."""
        seconds = read.timings.prefill_ms / 1e3
        self._line(recipe, f"{read.num_tokens:,} tokens in {seconds:.1f} s, {read.num_tokens / seconds:,.0f} tokens/s")

    @contextmanager
    def answers(self, number: int, question: str, lead: str, recipes: Sequence[str]) -> Iterator[Show]:
        """The answers to one question side by side, growing as they are streamed."""
        self._heading(f"Question {number}: {question}")
        self._console.print(Padding(f"[dim]{escape(lead)} ...[/]", (0, 2)))
        texts = dict.fromkeys(recipes, "")

        def table() -> Padding:
            columns = Table(box=box.ROUNDED, width=min(self._console.width - 4, WIDTH - 4))
            for recipe in recipes:
                columns.add_column(recipe, ratio=1, header_style=f"bold {STYLES[recipe]}")
            columns.add_row(*(escape(text.strip()) for text in texts.values()))
            return Padding(columns, (0, 2))

        live = Live(table(), console=self._console, auto_refresh=False, transient=True)

        def show(recipe: str, piece: str) -> None:
            texts[recipe] += piece
            live.update(table(), refresh=True)

        with live if self._console.is_terminal else nullcontext():
            yield show
        self._console.print(table())

    def bytes_by_owner(self, readers: Sequence[Reader], weight_bytes: int, workspace_bytes: int) -> None:
        """Where each session's KV was when it had answered last, and what that cost."""
        self._heading("Where the bytes were")
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("one session of each recipe")
        for reader in readers:
            table.add_column(reader.recipe, justify="right", header_style=f"bold {STYLES[reader.recipe]}")
        for name, values in _rows(readers):
            table.add_row(name, *values, end_section=name.startswith(("Redis", "recall hit")))
        self._console.print(Padding(table, (0, 2)))
        self._console.print(
            Padding(
                f"[dim]Besides: {_mb(weight_bytes)} of weights and {_mb(workspace_bytes)} of prefill "
                "workspace. Device and host are the same memory on a machine without a GPU.[/]",
                (0, 2),
            )
        )

    def success(self, message: str) -> None:
        """The good end."""
        self._console.print(f"\n[bold green]✓[/] {escape(message)}\n")

    def failure(self, message: str) -> None:
        """What went wrong."""
        self._console.print(f"\n[bold red]✗[/] {escape(message)}")

    def _heading(self, text: str) -> None:
        self._console.print(f"\n[bold]{escape(text)}[/]")

    def _line(self, recipe: str, text: str) -> None:
        self._console.print(f"  [{STYLES[recipe]}]{recipe:<{NAME_WIDTH}}[/]{escape(text)}")


def _rows(readers: Sequence[Reader]) -> list[tuple[str, list[str]]]:
    return [
        ("device: sinks and window, exact KV", [_mb(reader.kv.window_bytes) for reader in readers]),
        ("device: recall slots, exact KV", [_mb(reader.kv.slot_bytes) for reader in readers]),
        ("device: index of the distant keys", [_mb(reader.kv.index_bytes) for reader in readers]),
        ("device, together", [_mb(reader.device_bytes) for reader in readers]),
        ("host memory", [_mb(reader.kv.host_bytes) for reader in readers]),
        ("Redis", [_mb(reader.kv.redis_bytes) for reader in readers]),
        ("exact KV off the device", [f"{reader.off_device:.1%}" for reader in readers]),
        ("recall hit rate", ["-" if reader.hit_rate is None else f"{reader.hit_rate:.1%}" for reader in readers]),
        ("time to first token, mean", [f"{reader.ttft_ms:,.0f} ms" for reader in readers]),
        ("time per token", [f"{reader.ms_per_token:,.1f} ms" for reader in readers]),
    ]


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes else "-"
