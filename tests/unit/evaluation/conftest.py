from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kvservice.config.engine import EngineConfig
from kvservice.engine import Engine
from kvservice.engine.ports import NoWriter
from kvservice.models.tiny import tiny_model


@pytest.fixture(scope="session")
def model():
    return tiny_model(seed=0)


@pytest.fixture
def engine(model) -> Iterator[Engine]:
    engine = Engine(model, EngineConfig(kv_bytes=64 << 20, host_bytes=64 << 20, step_tokens=128), NoWriter())
    yield engine
    engine.check()
    assert engine.headroom().resident_sessions == 0


@pytest.fixture
def text() -> list[int]:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(3, 250, (700 + 40 + 1,), generator=generator).tolist()
