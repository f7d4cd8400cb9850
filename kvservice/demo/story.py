"""What the demonstration does: a service, a document, three recipes, three questions. Knows the public client only."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from contextlib import aclosing

from kvservice.client import Client, Finished, LocalService, Tokens
from kvservice.config.recipes import DENSE, EXACT, RECALL
from kvservice.demo.document import plant, shipped_text
from kvservice.demo.reader import Question, Reader
from kvservice.demo.screen import Screen
from kvservice.errors import InternalError

RECIPES = (DENSE.name, EXACT.name, RECALL.name)
DEPTH = 0.5
KV_BYTES = "256MiB"
"""Holds the dense session too."""
HOST_BYTES = "1GiB"
LEAST_OFF_DEVICE = 0.8
"""Of the exact KV bytes of the `recall` session."""


PASS_KEY_QUESTION = Question("What is the pass key?", "The pass key is", 8)
QUESTIONS = (
    PASS_KEY_QUESTION,
    Question("Where did they live in Bath?", "They were soon settled in comfortable lodgings in", 12),
    Question("What did Mrs. Allen say of her gown?", "It is such a", 12),
)
STOP = (".", "\n")


async def run(screen: Screen, seed: int | None, serve_arguments: Sequence[str]) -> bool:
    """Tells the whole story; whether every recipe found the pass key and `recall` kept the KV off the device.

    Args:
        screen: where it is shown.
        seed: of the pass key; None: another one each time.
        serve_arguments: for `kvservice serve`, beside the budgets.

    Raises:
        KVServiceError: the service didn't start, or a call failed; the message says why.
    """
    pass_key = str(random.Random(seed).randint(10_000, 99_999))
    document = plant(shipped_text(), pass_key, DEPTH)
    screen.opening()
    started = time.perf_counter()
    budgets = ["--log-level", "WARNING", "--kv-bytes", KV_BYTES, "--host-bytes", HOST_BYTES]
    with screen.busy("starting gateway, worker and two redis-servers"):
        service = LocalService([*budgets, *serve_arguments])
        await service.start()
    try:
        async with Client(service.address) as client:
            info = (await client.list_models())[0]
            count = await client.count_tokens(document)
            screen.scene(service.address, time.perf_counter() - started, info, count.num_tokens, pass_key)
            readers = [await _read(client, recipe, document, screen) for recipe in RECIPES]
            for number, question in enumerate(QUESTIONS, start=1):
                await _ask(client, readers, number, question, screen)
            worker = (await client.stats()).workers[0]
            screen.bytes_by_owner(readers, worker.weight_bytes, worker.workspace_bytes)
    finally:
        with screen.busy("stopping the service"):
            await service.stop()
    return is_as_promised(screen, readers, pass_key)


async def _read(client: Client, recipe: str, document: str, screen: Screen) -> Reader:
    session = await client.create_session(recipe=recipe)
    with screen.reading(recipe) as on_progress:
        read = await client.append(session.session_id, document, on_progress=on_progress)
    screen.has_read(recipe, read)
    return Reader(recipe, session.session_id, read)


async def _ask(client: Client, readers: Sequence[Reader], number: int, question: Question, screen: Screen) -> None:
    """Asks all readers, one after the other: none waits for another's step, so the times are each recipe's own."""
    with screen.answers(number, question.text, question.lead, [reader.recipe for reader in readers]) as show:
        for reader in readers:
            events = client.generate(
                reader.session_id, question.prompt, max_new_tokens=question.max_new_tokens, stop=STOP
            )
            answer = ""
            async with aclosing(events):
                async for event in events:
                    if isinstance(event, Tokens):
                        answer += event.text
                        show(reader.recipe, event.text)
                    if isinstance(event, Finished):
                        reader.finished.append(event)
            reader.answers.append(answer.strip())
            if len(reader.finished) != number:
                raise InternalError("an answer ended without its last event")


def is_as_promised(screen: Screen, readers: Sequence[Reader], pass_key: str) -> bool:
    """Whether every recipe found the pass key, and `recall` with its KV off the device; says which did not."""
    missed = [reader.recipe for reader in readers if not reader.has_answered(pass_key)]
    recall = next(reader for reader in readers if reader.recipe == RECALL.name)
    is_off_device = recall.off_device >= LEAST_OFF_DEVICE
    if missed:
        screen.failure(f"The pass key {pass_key} was not answered by: {', '.join(missed)}.")
    if not is_off_device:
        screen.failure(f"recall kept only {recall.off_device:.1%} of the exact KV off the device.")
    if missed or not is_off_device:
        return False
    screen.success(
        f"All three answered {pass_key}; recall did so with {recall.off_device:.1%} of the exact KV off the device."
    )
    return True
