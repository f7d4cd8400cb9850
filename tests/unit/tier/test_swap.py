import threading

import pytest
import torch

from kvservice.kv.arena import Arena
from kvservice.kv.layout import KVLayout
from kvservice.kv.ledger import Ledger, Owner
from kvservice.tier import swap
from kvservice.tier.host import HostTier
from kvservice.tier.swap import SwapSpace

DTYPES = [torch.float32, torch.bfloat16]


class World:
    def __init__(self, dtype):
        layout = KVLayout(2, 2, 16, dtype)
        self.ledger = Ledger(1 << 30, 1 << 30)
        self.arena = Arena(layout, 300, 0, self.ledger, torch.device("cpu"))
        # Any bits may lie in a block: those of an index are no numbers.
        self.arena.cells.view(torch.int16).random_(-(2**15), 2**15)
        self.host = HostTier(layout, 8, self.ledger, pin=False)
        self.space = SwapSpace(self.arena, self.host)

    def bits(self, blocks):
        return self.arena.cells[blocks].view(torch.int16)


@pytest.fixture(params=DTYPES, ids=str)
def world(request):
    world = World(request.param)
    yield world
    world.space.close()


def finish(space):
    while space.wait(1.0):
        pass


@pytest.mark.parametrize("count", [1, 31, 32, 33, 100])
def test_blocks_come_back_bit_for_bit(world, count):
    blocks = world.arena.allocate(Owner.WINDOW, count)[torch.randperm(count)]
    before = world.bits(blocks).clone()
    swapped = world.space.swap_out(blocks)
    assert len(swapped.numbers) == -(-count // 32)
    finish(world.space)
    assert not swapped.is_moving
    world.arena.cells[blocks] = 0
    elsewhere = world.arena.allocate(Owner.WINDOW, count)
    world.space.swap_in(swapped, elsewhere)
    finish(world.space)
    assert not swapped.is_moving
    assert torch.equal(world.bits(elsewhere), before)
    world.space.drop(swapped)
    world.host.check([])


class Gate:
    """Holds the mover until it is opened."""

    def __init__(self, monkeypatch):
        self.open = threading.Event()
        copy = swap._copy_on_cpu

        def held(*args, **more):
            assert self.open.wait(10)
            copy(*args, **more)

        monkeypatch.setattr(swap, "_copy_on_cpu", held)


def test_moves_are_behind_the_caller_and_bounded(world, monkeypatch):
    gate = Gate(monkeypatch)
    monkeypatch.setattr(swap, "MAX_PENDING_BYTES", 40 * world.arena.layout.block_bytes)
    first = world.space.swap_out(world.arena.allocate(Owner.WINDOW, 32))
    assert first.is_moving
    assert world.space.has_room
    second = world.space.swap_out(world.arena.allocate(Owner.WINDOW, 32))
    assert not world.space.has_room
    assert world.space.wait(0.01)
    assert second.is_moving
    gate.open.set()
    finish(world.space)
    assert world.space.has_room
    assert not first.is_moving
    assert not second.is_moving


def test_dropping_waits_for_the_move_under_way(world, monkeypatch):
    """Else the memory would be somebody else's while the mover still writes to it."""
    gate = Gate(monkeypatch)
    swapped = world.space.swap_out(world.arena.allocate(Owner.WINDOW, 32))
    threading.Timer(0.05, gate.open.set).start()
    world.space.drop(swapped)
    assert gate.open.is_set()
    world.host.check([])


def test_a_move_that_fails_says_so(world, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no such memory")

    monkeypatch.setattr(swap, "_copy_on_cpu", broken)
    swapped = world.space.swap_out(world.arena.allocate(Owner.WINDOW, 32))
    finish(world.space)
    assert not swapped.is_moving
    assert "no such memory" in str(swapped.error)
    assert world.space.has_room
    world.space.drop(swapped)
    world.host.check([])


def test_without_moves_there_is_nothing_to_wait_for(world):
    assert not world.space.wait(10)
