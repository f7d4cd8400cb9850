import pytest
import torch
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
