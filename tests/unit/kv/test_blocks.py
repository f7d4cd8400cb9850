import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvservice.errors import InternalError
from kvservice.kv.blocks import BlockPool


class PoolMachine(RuleBasedStateMachine):
    """Any order of allocations and frees keeps every block in exactly one place."""

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(40, first=8)
        self.held = []

    @precondition(lambda self: self.pool.num_free)
    @rule(data=st.data())
    def allocate(self, data):
        count = data.draw(st.integers(1, self.pool.num_free))
        self.held.append(self.pool.allocate(count))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data):
        self.pool.free(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @invariant()
    def every_block_is_free_or_held_once(self):
        self.pool.check()
        held = sorted(int(block) for blocks in self.held for block in blocks)
        assert len(held) == len(set(held)) == self.pool.num_used
        assert all(8 <= block < 40 for block in held)


TestPool = PoolMachine.TestCase


def test_freeing_twice_is_found_out():
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    pool.free(blocks)
    with pytest.raises(InternalError, match="twice"):
        pool.free(blocks)


def test_a_block_named_twice_in_one_free_is_found_out():
    pool = BlockPool(4)
    block = pool.allocate(1)
    with pytest.raises(InternalError, match="twice"):
        pool.free(torch.cat([block, block]))


def test_asking_for_more_than_is_free_takes_nothing():
    pool = BlockPool(4)
    with pytest.raises(InternalError, match="5 blocks asked for, 4 of 4 free"):
        pool.allocate(5)
    assert pool.num_free == 4


class SharingMachine(RuleBasedStateMachine):
    """A block is free again when the last of its holders has given it back, and not before."""

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(24, first=2)
        self.holders = []

    @precondition(lambda self: self.pool.num_free)
    @rule(data=st.data())
    def allocate(self, data):
        self.holders.append(self.pool.allocate(data.draw(st.integers(1, self.pool.num_free))))

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def share(self, data):
        blocks = data.draw(st.sampled_from(self.holders))
        some = blocks[: data.draw(st.integers(1, blocks.numel()))].clone()
        self.pool.share(some)
        self.holders.append(some)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def free(self, data):
        blocks = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        others = {int(block) for held in self.holders for block in held}
        assert self.pool.free(blocks) == sum(int(block) in others for block in blocks)

    @invariant()
    def each_block_is_counted_as_often_as_it_is_held(self):
        held = [int(block) for blocks in self.holders for block in blocks]
        self.pool.check(torch.tensor(held, dtype=torch.int64))
        assert self.pool.num_used == len(set(held))
        for blocks in self.holders:
            assert self.pool.shared(blocks).tolist() == [held.count(int(block)) > 1 for block in blocks]


TestSharedPool = SharingMachine.TestCase
TestSharedPool.settings = settings(max_examples=15)


def test_a_holder_that_nobody_counts_is_found_out():
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    with pytest.raises(InternalError, match="is counted 1 times and held 2"):
        pool.check(torch.cat([blocks, blocks[:1]]))
