import pytest
import torch

from kvservice.errors import InternalError
from kvservice.kv.arena import Arena
from kvservice.kv.layout import KVLayout
from kvservice.kv.ledger import Ledger, Owner
from kvservice.recall.parking import Parking, Place
from kvservice.tier.host import HostTier
from kvservice.tier.swap import SwapSpace

LAYOUT = KVLayout(2, 2, 16, torch.float32)
NOBODY = torch.empty(0, dtype=torch.int32)


class World:
    def __init__(self):
        self.ledger = Ledger(1 << 30, 1 << 30)
        self.arena = Arena(LAYOUT, 200, 0, self.ledger, torch.device("cpu"))
        self.host = HostTier(LAYOUT, 8, self.ledger, pin=False)
        self.space = SwapSpace(self.arena, self.host)

    def blocks(self, owner, count, first):
        blocks = self.arena.allocate(owner, count)
        self.arena.cells[blocks] = torch.arange(first, first + count).float().view(-1, 1, 1).expand(-1, 16, 16)
        return blocks

    def settle(self, parking):
        while self.space.wait(1.0):
            pass
        return parking.poll()


@pytest.fixture
def world():
    world = World()
    yield world
    world.space.close()


def test_blocks_go_to_the_host_and_come_back_in_other_places_as_they_were(world):
    parking = Parking(world.arena, world.space)
    window, index = world.blocks(Owner.WINDOW, 40, 1), world.blocks(Owner.INDEX, 5, 100)
    parking.leave({Owner.WINDOW: window, Owner.INDEX: index})
    assert parking.place is Place.LEAVING
    assert (parking.held_bytes(Owner.WINDOW), parking.held_bytes(Owner.INDEX)) == (40 * 1024, 5 * 1024)
    assert world.settle(parking) is None
    assert parking.place is Place.PARKED
    assert parking.held_bytes(Owner.WINDOW) == 0
    assert parking.num_groups == 2, "45 blocks, 32 a group"
    assert world.arena._pool.num_used == 0
    assert parking.num_blocks == 45
    # Others use the blocks meanwhile.
    others = world.blocks(Owner.SLOTS, 60, 7)
    parking.come_back()
    assert parking.place is Place.RETURNING
    blocks = world.settle(parking)
    assert parking.place is Place.DEVICE
    assert world.arena.cells[blocks[Owner.WINDOW], 0, 0].tolist() == list(range(1, 41))
    assert world.arena.cells[blocks[Owner.INDEX], 15, 15].tolist() == list(range(100, 105))
    assert world.ledger.used_bytes(Owner.HOST) == 0
    world.arena.check(torch.cat([others, *blocks.values()]))
    world.host.check([])


@pytest.mark.parametrize("stage", ["leaving", "parked", "returning"])
def test_it_can_be_closed_wherever_it_is(world, stage):
    parking = Parking(world.arena, world.space)
    parking.leave({Owner.WINDOW: world.blocks(Owner.WINDOW, 40, 1)})
    if stage != "leaving":
        world.settle(parking)
    if stage == "returning":
        parking.come_back()
    parking.close()
    assert parking.place is Place.DEVICE
    world.arena.check(NOBODY)
    world.host.check([])
    assert world.ledger.used_bytes(Owner.WINDOW) == world.ledger.used_bytes(Owner.HOST) == 0


def test_blocks_that_somebody_shares_stay_where_they_are_for_him(world):
    parking = Parking(world.arena, world.space)
    window = world.blocks(Owner.WINDOW, 4, 1)
    world.arena.share(Owner.WINDOW, window[:3])
    parking.leave({Owner.WINDOW: window})
    world.settle(parking)
    world.arena.check(window[:3])
    assert world.arena.cells[window[:3], 0, 0].tolist() == [1, 2, 3]


def test_a_move_in_the_wrong_place_is_found_out(world):
    parking = Parking(world.arena, world.space)
    with pytest.raises(InternalError, match="is device, not parked"):
        parking.come_back()
    parking.leave({Owner.WINDOW: world.blocks(Owner.WINDOW, 4, 1)})
    with pytest.raises(InternalError, match="is leaving, not device"):
        parking.leave({})
    parking.close()


def test_nothing_happens_to_what_is_on_the_device(world):
    parking = Parking(world.arena, world.space)
    assert parking.poll() is None
    assert parking.blocks().numel() == parking.num_groups == parking.num_blocks == 0
    parking.close()
