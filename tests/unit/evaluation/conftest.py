from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvservice.config.engine import EngineConfig
from kvservice.engine import Engine
from kvservice.engine.ports import NoWriter
from kvservice.models.tiny import tiny_model, write_tiny_checkpoint


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_checkpoint(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    letters = random.Random(5)
    for name, length in (("a.txt", 600), ("b.txt", 700), ("short.txt", 50)):
        (folder / name).write_text("".join(letters.choice("abcdefgh .\n") for _ in range(length)))
    return folder
