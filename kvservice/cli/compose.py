"""The composition root of a worker: model, tokenizer, tier and engine behind the internal service. Decides nothing.

Imports torch inside its functions, so that a gateway can do without.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import logging
import os
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvservice.cli.settings import Settings
from kvservice.config.engine import EngineConfig
from kvservice.config.service import ServiceConfig
from kvservice.config.worker import WorkerConfig
from kvservice.errors import ConfigError
from kvservice.store.base import StateStore
from kvservice.types import WorkerId

if TYPE_CHECKING:
    from kvservice.compression.sharing import SharingPlan
    from kvservice.engine import Engine
    from kvservice.engine.grammar import GrammarCompiler
    from kvservice.models.adapter import Adapter
    from kvservice.models.base import Model, ModelSpec
    from kvservice.tier.frame_sets import FrameSets
    from kvservice.tier.writer import WriteBehind
    from kvservice.worker.server import WorkerServer
    from kvservice.worker.stored import StoredKv

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 5.0
"""What the last frames get to reach Redis in when the worker ends."""


async def worker(config: WorkerConfig, store: StateStore, stack: AsyncExitStack) -> WorkerServer:
    """A worker that hasn't been started; its model is loaded when it is. It is stopped when `stack` is closed.

    Raises:
        ModelError: the model's folder or tokenizer can't be used.
        Unavailable: the kv Redis can't be reached.
    """
    from kvservice.models.fetch import resolve
    from kvservice.models.grammar import Grammars
    from kvservice.models.tokenizer import Tokenizer
    from kvservice.worker.server import WorkerServer

    folder = await asyncio.to_thread(resolve, config.model, None)
    tokenizer = await asyncio.to_thread(Tokenizer.load, folder)
    tier = await _open_tier(config, store, stack)
    grammars = Grammars(tokenizer, tokenizer.vocab_size)
    server = WorkerServer(
        config,
        lambda: (
            make_engine(config, folder, None, grammars)
            if tier is None
            else make_engine(config, folder, tier.frames, grammars, tier.frame_sets)
        ),
        tokenizer,
        store,
        compile_grammar=grammars.compile,
        stored=tier.stored if tier is not None else None,
    )
    stack.push_async_callback(server.stop)
    return server


def load_libraries() -> None:
    """Imports what an engine needs: seconds in which no other thread of the process runs. Before an event loop does."""
    importlib.import_module("kvservice.engine")
    importlib.import_module("kvservice.models.loader")


@dataclass(frozen=True, slots=True)
class Tier:
    """A worker's way to the kv Redis.

    Attributes:
        frames: writes.
        frame_sets: what frames look like, once the model is loaded.
        stored: publishes, and brings back.
    """

    frames: WriteBehind
    frame_sets: FrameSets
    stored: StoredKv


async def _open_tier(config: WorkerConfig, store: StateStore, stack: AsyncExitStack) -> Tier | None:
    """The way to the kv Redis, found to be there and fit, and what publishes it; none when no Redis was named."""
    from kvservice.store.blobs import RedisBlobs
    from kvservice.tier.base import open_source, open_tier
    from kvservice.tier.frame_sets import FrameSets
    from kvservice.tier.journal import FrameJournal, JournaledWriter
    from kvservice.tier.reader import FrameReader
    from kvservice.tier.restore import GroupReader
    from kvservice.tier.sealing import load_keyring
    from kvservice.worker.resuming import Resumer
    from kvservice.worker.stored import StoredKv

    if config.redis_url is None:
        return None
    url = config.redis_url.get_secret_value()
    blobs = RedisBlobs(url)
    stack.push_async_callback(blobs.aclose)
    for problem in await blobs.check():
        if problem.fatal:
            raise ConfigError(problem.message, reason="kv_server")
        logger.warning("kv_server_unfit", extra={"why": problem.message})
    frame_sets = FrameSets()
    journal = FrameJournal(frame_sets)
    keyring = load_keyring(config.kv_keys) if config.kv_keys is not None else None
    frames = JournaledWriter(open_tier(url), journal, ttl_s=config.kv_ttl_s, keyring=keyring)
    await asyncio.to_thread(frames.start)
    stack.push_async_callback(asyncio.to_thread, frames.close, CLOSE_TIMEOUT_S)
    frame_reader = FrameReader(open_source(url), keyring=keyring)
    stack.push_async_callback(asyncio.to_thread, frame_reader.close)
    stored = StoredKv(
        WorkerId(config.worker_id),
        store,
        blobs,
        journal,
        ttl_s=config.kv_ttl_s,
        scrub_interval_s=config.scrub_interval_s,
        resumer=Resumer(GroupReader(frame_reader), frame_sets, time.monotonic),
    )
    return Tier(frames, frame_sets, stored)


def num_threads(config: WorkerConfig) -> int:
    """How many threads compute: as configured, else one a core that this process may use."""
    return config.threads or len(os.sched_getaffinity(0))


def open_adapter(config: WorkerConfig) -> Adapter | None:
    """The adapter that a worker's model is to have; None without one.

    Raises:
        ConfigError: it can't be read, or is damaged.
    """
    from kvservice.models.adapter import read_adapter

    return None if config.adapter is None else read_adapter(config.adapter)


def open_model(config: WorkerConfig, folder: Path, adapter: Adapter | None = None) -> Model:
    """Loads a worker's model, and sets the threads that it computes with. Blocks for as long as that takes."""
    import torch

    from kvservice.kernels import cpu
    from kvservice.models.loader import load_model

    threads = num_threads(config)
    if config.device == "cpu" and cpu.isa() != "none":
        # What is left to torch are many small operations: threads would cost more than they save, and where another
        # process is busy, many times more.
        cpu.set_threads(threads)
        torch.set_num_threads(1)
    else:
        torch.set_num_threads(threads)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[config.dtype]
    device = torch.device(config.device)
    return load_model(folder, dtype=dtype, device=device, deterministic=config.deterministic, adapter=adapter)


def make_engine(
    config: WorkerConfig,
    folder: Path,
    frames: WriteBehind | None = None,
    grammars: GrammarCompiler | None = None,
    frame_sets: FrameSets | None = None,
) -> Engine:
    """Loads the model and makes its engine. Blocks for as long as that takes; called in the engine's thread.

    Args:
        config: of the worker.
        folder: of the model.
        frames: where KV is written behind to; None: nowhere.
        grammars: for answers held to one; without it such calls are refused.
        frame_sets: told what the frames look like, before the first is written.

    Raises:
        ModelError: the model can't be used, or its layers can't share keys and a map was named.
        ConfigError: the map or the adapter is damaged or another model's, or they aren't for one another.
    """
    from kvservice.engine import Engine
    from kvservice.engine.ports import NoWriter
    from kvservice.kernels.memory import give_back_big_blocks
    from kvservice.kv.layout import KVLayout
    from kvservice.recall.sharing import shared_frames
    from kvservice.tier.frame_sets import FrameSet, FrameSets, kv_fingerprint
    from kvservice.tier.groups import GroupFrames

    give_back_big_blocks()
    adapter = open_adapter(config)
    model = open_model(config, folder, adapter)
    spec = model.spec
    sharing = sharing_plan(config, folder, spec)
    if adapter is not None and sharing is not None:
        adapter.check_plan(sharing)
    if frames is None:
        return Engine(model, engine_config(config), NoWriter(), grammars, sharing=sharing)
    layout = KVLayout.of(spec.shape, model.dtype)
    fingerprint = kv_fingerprint(
        weights=spec.digest if spec.adapter is None else f"{spec.digest} {spec.adapter}",
        origin=spec.origin,
        dtype=config.dtype,
        rope_theta=spec.rope_theta,
        keys_rotated=layout.keys_rotated,
        tokenizer=hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest(),
    )
    whole = FrameSet(fingerprint, layout.group_shape, layout.dtype, config.kv_codec)
    frame_sets = frame_sets or FrameSets()
    frame_sets.describe(whole, shared_frames(whole, sharing, layout) if sharing is not None else None)
    writer = GroupFrames(frames, frame_sets)
    return Engine(model, engine_config(config), writer, grammars, sharing=sharing)


def sharing_plan(config: WorkerConfig, folder: Path, spec: ModelSpec) -> SharingPlan | None:
    """How a worker shares distant keys between the model's layers; None without a map.

    Raises:
        ModelError: the model's layers can't.
        ConfigError: the map can't be read, is damaged, or was made for another model; or a setting is wrong.
    """
    from kvservice.compression.sharing import SharingMode, SharingPlan
    from kvservice.compression.sharing_map import read_map
    from kvservice.models.sharing import check_shareable, model_facts

    if config.sharing_map is None:
        return None
    check_shareable(folder)
    groups = read_map(config.sharing_map, model_facts(spec)).layer_groups
    return SharingPlan(groups, SharingMode(config.sharing), config.skip_above)


def engine_config(config: WorkerConfig) -> EngineConfig:
    """The engine's part of a worker's settings."""
    return EngineConfig(
        kv_bytes=config.kv_bytes,
        host_bytes=config.host_bytes,
        step_tokens=config.step_tokens,
        deterministic=config.deterministic,
        max_prefills=config.max_prefills,
        max_batch=config.max_batch,
        host_link_bytes_per_s=config.host_link_bytes_per_s,
    )


def ray_settings(config: ServiceConfig) -> Settings:
    """The settings of the process that runs the workers on Ray, secrets included."""
    settings: Settings = config.model_dump(mode="json", include={"workers", "ray", "log_level"})
    worker = config.worker.model_dump(mode="json", exclude={"redis_url", "worker_id"})
    return {
        **settings,
        "worker": {**worker, "redis_url": config.worker.redis_url and config.worker.redis_url.get_secret_value()},
        "state_url": config.state_url and config.state_url.get_secret_value(),
    }


def worker_settings(config: ServiceConfig) -> list[Settings]:
    """The settings of each worker process of a service, secrets included. They share the cores."""
    worker = config.worker
    threads = worker.threads or max(1, len(os.sched_getaffinity(0)) // config.workers)
    common: Settings = {
        **worker.model_dump(mode="json", exclude={"redis_url", "port"}),
        "threads": threads,
        "redis_url": worker.redis_url.get_secret_value() if worker.redis_url is not None else None,
    }
    state_url = config.state_url.get_secret_value() if config.state_url is not None else None
    return [
        {
            "worker": {**common, "worker_id": f"worker-{index}"},
            "state_url": state_url,
            "log_level": config.log_level,
            "telemetry": {**config.telemetry.model_dump(), "metrics_port": _worker_metrics_port(config, index)},
        }
        for index in range(config.workers)
    ]


def _worker_metrics_port(config: ServiceConfig, index: int) -> int | None:
    """The ports after the gateway's, or free ones if that is free."""
    port = config.telemetry.metrics_port
    return port + 1 + index if port else port
