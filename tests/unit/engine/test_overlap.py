"""What of followers' bytes a simulated link brings while other layers compute."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kvservice.config.recipes import POD, RECALL
from kvservice.engine.overlap import FetchOverlap
from kvservice.models.tiny import tiny_model
from kvservice.types import SessionId
from tests.unit.engine.driving import tokens
from tests.unit.engine.test_sharing import WHOLE, make_engine, read

RATE = 100.0
"""Bytes a second."""


class Timeline:
    """Two layers, the second a follower of the first, on a clock that moves only when it is told to, or waited on."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept = 0.0
        shared = SimpleNamespace(
            groups=SimpleNamespace(key_layers=torch.tensor([[0], [0]])), owns=torch.tensor([[True], [False]])
        )
        self.counters = SimpleNamespace(recalled_bytes=0, follower_bytes=0, arrived_bytes=0)
        rows = [SimpleNamespace(memory=SimpleNamespace(counters=self.counters, shared=shared))]
        self.overlap = FetchOverlap(rows, RATE, clock=lambda: self.now, sleep=self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds

    def layer(self, number: int, *, own: int = 0, followers: int = 0) -> None:
        self.overlap.begins(number)
        self.counters.recalled_bytes += own + followers
        self.counters.follower_bytes += followers
        self.overlap.ends(number)


@pytest.mark.parametrize(
    ("seconds", "arrived", "waited"), [(0.0, 0, 0.5), (0.2, 20, 0.3), (0.5, 50, 0.0), (9.0, 50, 0.0)]
)
def test_what_a_follower_needs_is_under_way_since_its_anchor_chose(seconds, arrived, waited) -> None:
    line = Timeline()
    line.layer(0)
    line.now += seconds
    line.layer(1, followers=50)
    assert line.counters.arrived_bytes == arrived
    assert line.slept == pytest.approx(waited)


def test_what_an_anchor_itself_needs_is_waited_for_in_full() -> None:
    line = Timeline()
    line.now = 5.0
    line.layer(0, own=30)
    assert line.slept == pytest.approx(0.3)
    assert line.counters.arrived_bytes == 0


def test_in_an_engine_followers_bytes_overlap_and_are_counted() -> None:
    model = tiny_model(seed=0, num_layers=4)
    engine = make_engine(model, WHOLE, host_link_bytes_per_s=10 << 30)
    read(engine, POD, tokens(700))
    engine.score(SessionId("s"), tokens(4, 1))
    kv = engine.telemetry(SessionId("s"))
    assert 0 < kv.follower_bytes < kv.recalled_bytes
    # A follower fetches values, an anchor keys too, and here half the cells follow.
    assert kv.follower_bytes == pytest.approx(kv.recalled_bytes / 3, rel=0.2)
    assert 0.8 * kv.follower_bytes <= kv.arrived_bytes <= kv.follower_bytes
    plain = make_engine(model, None, host_link_bytes_per_s=10 << 30)
    read(plain, RECALL, tokens(700))
    plain.score(SessionId("s"), tokens(1, 1))
    assert plain.telemetry(SessionId("s")).follower_bytes == 0
