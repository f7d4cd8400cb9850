"""`kvservice chat`: loads a document into a session and talks about it. Knows the public client only."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvservice.cli.options import KvBytes, Recipe, api_key, client_tls
from kvservice.cli.output import hint, human_bytes, progress_bar
from kvservice.cli.settings import read_file
from kvservice.errors import ConfigError, KVServiceError
from kvservice.types import PromptFormat

if TYPE_CHECKING:
    from kvservice.client import Client, Finished, Sampling

RAW_QUESTION = "\n\nQuestion: {}\nAnswer:"
RAW_STOP = ("\nQuestion:", "\n\n")
"""Where a raw answer without a grammar ends: a model that only completes text would ask itself the next question."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """What the user asked for."""

    document: bytes
    questions: tuple[str, ...]
    prompt_format: PromptFormat
    recipe: str
    sampling: Sampling


def chat(
    document: Annotated[Path, typer.Option("--document", metavar="FILE", help="The text to talk about, UTF-8.")],
    question: Annotated[
        list[str] | None,
        typer.Option("--question", help="Ask this and end; may be repeated. Unset: ask for questions."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option("--address", metavar="HOST:PORT", help="The gateway. Unset: start a service for this chat."),
    ] = None,
    prompt_format: Annotated[
        PromptFormat,
        typer.Option("--format", help="raw: the model completes `Question: … Answer:`; chat: its chat template."),
    ] = PromptFormat.RAW,
    recipe: Recipe = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="The longest answer.")] = 128,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0: the likeliest answer.")] = 0.0,
    top_p: Annotated[
        float, typer.Option("--top-p", help="Draw from the likeliest tokens that have this share of the probability.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Of the draws. Unset: another each time.")] = None,
    json_schema: Annotated[
        Path | None, typer.Option("--json-schema", metavar="FILE", help="Answer in JSON that fits this schema.")
    ] = None,
    regex: Annotated[str | None, typer.Option("--regex", help="Answer with a text that this matches, whole.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME|FOLDER", help="Model of the service that is started here.")
    ] = None,
    kv_bytes: KvBytes = None,
) -> None:
    """Load a document into a session and ask about it. Answers stream; figures of each go to standard error."""
    text = read_file(document, "--document")
    if not text.strip():
        raise ConfigError(f"--document {document}: it is empty; give a file with text")
    if address is not None and (model is not None or kv_bytes is not None):
        raise typer.BadParameter("--model and --kv-bytes are for a service started here: leave out --address, or them")
    if json_schema is not None and regex is not None:
        raise typer.BadParameter("--json-schema and --regex: give one of them")
    sampling: Sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    if seed is not None:
        sampling["seed"] = seed
    if json_schema is not None:
        sampling["json_schema"] = _read_schema(json_schema)
    elif regex is not None:
        sampling["regex"] = regex
    elif prompt_format is PromptFormat.RAW:
        sampling["stop"] = RAW_STOP
    conversation = Conversation(text, tuple(question or ()), prompt_format, recipe or "", sampling)
    serve_arguments = ["--log-level", "WARNING"]
    if model is not None:
        serve_arguments += ["--model", model]
    if kv_bytes is not None:
        serve_arguments += ["--kv-bytes", str(kv_bytes)]
    asyncio.run(_chat(conversation, address, serve_arguments))


def _read_schema(path: Path) -> str:
    data = read_file(path, "--json-schema")
    try:
        json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--json-schema {path}: it isn't JSON ({error}); give a file with a JSON schema") from None
    return data.decode()


async def _chat(conversation: Conversation, address: str | None, serve_arguments: list[str]) -> None:
    from kvservice.client import Client, LocalService

    async with AsyncExitStack() as stack:
        if address is None:
            hint("starting a service for this chat")
            address = (await stack.enter_async_context(LocalService(serve_arguments))).address
        client = await stack.enter_async_context(Client(address, api_key(), tls=client_tls()))
        await _talk(client, conversation)


async def _talk(client: Client, conversation: Conversation) -> None:
    session = await client.create_session(recipe=conversation.recipe, prompt_format=conversation.prompt_format)
    try:
        await _load(client, session.session_id, conversation.document)
        async for question in _questions(conversation.questions):
            await _answer(client, session.session_id, question, conversation)
    finally:
        # If this fails, as it does when the service has gone, the session expires by itself.
        with suppress(KVServiceError):
            await client.close_session(session.session_id)


async def _load(client: Client, session_id: str, document: bytes) -> None:
    with progress_bar() as bar:
        task = bar.add_task("reading the document", total=None)
        result = await client.append(
            session_id, document, on_progress=lambda done, total: bar.update(task, completed=done, total=total)
        )
    kv = result.kv
    on_device = human_bytes(kv.window_bytes + kv.index_bytes + kv.slot_bytes)
    hint(
        f"{result.num_tokens:,} tokens read in {result.timings.prefill_ms / 1000:.1f} s; "
        f"KV: {on_device} on the device, {human_bytes(kv.host_bytes)} in host memory"
    )


async def _answer(client: Client, session_id: str, question: str, conversation: Conversation) -> None:
    from kvservice.client import Finished, Tokens

    raw = conversation.prompt_format is PromptFormat.RAW
    events = client.generate(
        session_id,
        RAW_QUESTION.format(question) if raw else question,
        **conversation.sampling,
    )
    if conversation.questions:
        typer.echo(f"> {question}")
    async with aclosing(events):
        async for event in events:
            match event:
                case Tokens(text=text):
                    typer.echo(text, nl=False)
                    sys.stdout.flush()
                case Finished():
                    typer.echo()
                    hint(_figures(event))


def _figures(finished: Finished) -> str:
    usage, timings, kv = finished.usage, finished.timings, finished.kv
    parts = [f"{usage.completion_tokens} tokens", f"first after {timings.ttft_ms:.0f} ms"]
    if usage.completion_tokens > 1:
        parts.append(f"{timings.decode_ms / (usage.completion_tokens - 1):.1f} ms a token")
    if kv.recall_lookups:
        parts.append(f"recall hit rate {kv.recall_hits / kv.recall_lookups:.0%}")
    if usage.reused_tokens:
        parts.append(f"{usage.reused_tokens:,} tokens reused")
    if usage.recomputed_tokens:
        parts.append(f"{usage.recomputed_tokens:,} tokens recomputed")
    if finished.degraded:
        parts.append(f"degraded: {finished.degraded}")
    return f"  [{', '.join(parts)}]"


async def _questions(given: tuple[str, ...]) -> AsyncIterator[str]:
    """The questions given as options, or else those that the user types until the end of input."""
    for question in given:
        yield question
    while not given:
        typed = await _typed_line("> ")
        if typed is None:
            return
        if typed.strip():
            yield typed.strip()


async def _typed_line(prompt: str) -> str | None:
    """A line from the user; None at the end of input. In a thread that Ctrl-C needn't wait for."""
    loop = asyncio.get_running_loop()
    line: asyncio.Future[str | None] = loop.create_future()

    def resolve(text: str | None) -> None:
        if not line.done():
            line.set_result(text)

    def read() -> None:
        try:
            text: str | None = input(prompt if sys.stdin.isatty() else "")
        except EOFError:
            text = None
        loop.call_soon_threadsafe(resolve, text)

    threading.Thread(target=read, name="prompt", daemon=True).start()
    return await line
