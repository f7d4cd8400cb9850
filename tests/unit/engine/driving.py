"""Drives an engine of known room, looks at its books after every step, and gathers what its calls gave."""

from __future__ import annotations

import torch

from kvservice.config.engine import EngineConfig
from kvservice.config.recipes import DENSE
from kvservice.engine import Engine
from kvservice.engine.ports import NoWriter
from kvservice.kv.layout import KVLayout
from kvservice.recall.distant import staging_blocks
from kvservice.types import (
    BLOCK_TOKENS,
    CallId,
    EngineCall,
    FailedEvent,
    FinishedEvent,
    ProgressEvent,
    SamplingParams,
    SessionId,
    TokenEvent,
    footprint,
)

PLENTY = 8 << 20


def tokens(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, 250, (count,), generator=generator).tolist())


def device_bytes(model, *lengths, recipe=DENSE):
    """What sequences of these lengths take, each for itself."""
    return sum(footprint(model.spec.shape, recipe, length).device_bytes for length in lengths)


def group_bytes(model, count=1):
    return count * KVLayout.of(model.spec.shape, model.dtype).group_bytes


def make_engine(model, room=PLENTY, host_bytes=PLENTY, clock=None, **settings):
    """An engine whose sequences have `room` device bytes."""
    settings = {"step_tokens": 128, "max_prefills": 2, "deterministic": model.is_deterministic, **settings}
    shape = model.spec.shape
    blocks = staging_blocks(shape.num_kv_heads)
    blocks += (settings["step_tokens"] // BLOCK_TOKENS + settings["max_prefills"]) * shape.num_cells
    config = EngineConfig(kv_bytes=room + blocks * shape.block_bytes, host_bytes=host_bytes, **settings)
    engine = Engine(model, config, NoWriter()) if clock is None else Engine(model, config, NoWriter(), clock=clock)
    assert engine.headroom().device_capacity_bytes == room // shape.block_bytes * shape.block_bytes
    return engine


class Drive:
    """Steps an engine; `check` holds after each."""

    def __init__(self, engine):
        self.engine = engine
        self.finished = {}
        self.failed = {}
        self.answers = {}
        """By (call, index): tokens and their log-probabilities."""
        self.progress = {}

    def submit(self, session, recipe=DENSE, base=(), document=(), prompt=(), call=None, sampling=None, **more):
        call = CallId(call or session)
        self.engine.submit(
            EngineCall(call, SessionId(session), recipe, base, document, prompt, sampling=sampling, **more)
        )
        self.engine.check()
        return call

    def step(self):
        events = self.engine.step()
        self.engine.check()
        for event in events:
            if isinstance(event, FinishedEvent):
                self.finished[event.call_id] = event
            elif isinstance(event, FailedEvent):
                self.failed[event.call_id] = event.error
            elif isinstance(event, TokenEvent):
                answer = self.answers.setdefault((event.call_id, event.index), [])
                answer.append((event.token_id, event.logprobs))
            elif isinstance(event, ProgressEvent):
                self.progress.setdefault(event.call_id, []).append((event.done_tokens, event.total_tokens))
        return events

    def until(self, condition, at_most=3000):
        """Steps until something holds."""
        for _ in range(at_most):
            if condition():
                return
            assert self.engine.has_work, "nothing to do, and it still doesn't hold"
            self.step()
        raise AssertionError(f"it doesn't hold after {at_most} steps")

    def run(self):
        """Steps until nothing is left to do."""
        self.until(lambda: not self.engine.has_work)
        return self

    def ask(self, session, recipe=DENSE, base=(), document=(), prompt=(), **more):
        """One call alone, to its end."""
        call = self.submit(session, recipe, base, document, prompt, **more)
        self.until(lambda: call in self.finished or call in self.failed)
        if call in self.failed:
            raise self.failed.pop(call)
        return self.finished.pop(call)

    def place(self, session):
        return self.engine._sequences.get(SessionId(session)).place


def answering(new, **more):
    return SamplingParams(max_new_tokens=new, ignore_eos=True, **more)
