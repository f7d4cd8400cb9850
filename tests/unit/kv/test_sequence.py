"""Sequences that share blocks, against an obvious model: for each KV head, a list of (position, what was written)."""

import copy

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvservice.errors import InternalError
from kvservice.kv.arena import Arena
from kvservice.kv.layout import KVLayout
from kvservice.kv.ledger import Ledger, Owner
from kvservice.kv.sequence import EMPTY, SequenceState
from kvservice.types import BLOCK_TOKENS, GROUP_TOKENS, SINK_TOKENS

LAYOUT = KVLayout(2, 2, 4, torch.float32)
ROWS = LAYOUT.num_layers * LAYOUT.num_kv_heads


def new_arena(num_blocks=2000):
    ledger = Ledger(1 << 30, 1 << 30)
    return Arena(LAYOUT, num_blocks, 0, ledger, torch.device("cpu")), ledger


def kept(row, flags):
    """What is kept of a row: the last ones take the places of dropped ones."""
    count = sum(flags)
    tail = iter([token for token, stays in zip(row[count:], flags[count:], strict=True) if stays])
    return [token if stays else next(tail) for token, stays in zip(row[:count], flags[:count], strict=True)]


class Pair:
    """A sequence and its model: for each (layer, KV head) the positions it holds and the number written at each."""

    def __init__(self, arena):
        self.state = SequenceState(arena)
        self.held = [[] for _ in range(ROWS)]

    def read_on(self, arena, count, numbers):
        """Writes a number of its own for each token; K and V of a head differ in sign, and heads in fraction."""
        state = self.state
        state.extend(count)
        slots = state.slots(count)
        for offset in range(count):
            number = next(numbers)
            for row in range(ROWS):
                layer, head = divmod(row, LAYOUT.num_kv_heads)
                arena.slots[slots[layer, 0, head, offset]] = number + row / 8
                arena.slots[slots[layer, 1, head, offset]] = -number - row / 8
                self.held[row].append((state.num_computed + offset, number))
        state.tokens += [0] * count
        state.commit(count)

    def keep(self, marked):
        """`marked` has a row of flags for each (layer, KV head)."""
        width = self.state.num_resident
        flags = torch.zeros(ROWS, width, dtype=torch.bool)
        for row, each in enumerate(marked):
            flags[row, : len(each)] = torch.tensor(each, dtype=torch.bool)
            self.held[row] = kept(self.held[row], each)
        self.state.keep(flags)

    def shrink(self, num_computed):
        self.state.shrink(num_computed)
        del self.state.tokens[num_computed:]
        self.held = [kept(row, [token[0] < num_computed for token in row]) for row in self.held]

    def fork(self):
        twin = copy.copy(self)
        twin.state, twin.held = self.state.fork(), copy.deepcopy(self.held)
        return twin

    def check(self):
        state = self.state
        positions = state.positions.expand(ROWS, -1)
        for layer in range(LAYOUT.num_layers):
            keys, values = state.read(layer, state.num_resident)
            for head in range(LAYOUT.num_kv_heads):
                row = layer * LAYOUT.num_kv_heads + head
                count = len(self.held[row])
                assert positions[row, :count].tolist() == [position for position, _ in self.held[row]]
                assert (positions[row, count:] == EMPTY).all()
                written = torch.tensor([number + row / 8 for _, number in self.held[row]])
                assert torch.equal(keys[head, :count], written.unsqueeze(1).expand(-1, LAYOUT.head_dim))
                assert torch.equal(values[head, :count], -written.unsqueeze(1).expand(-1, LAYOUT.head_dim))


class Sharing(RuleBasedStateMachine):
    """Whatever is forked, evicted, shrunk and read on in any order, nobody sees what another wrote."""

    @initialize()
    def start(self):
        self.arena, self.ledger = new_arena()
        self.numbers = iter(range(1, 10**6))
        self.pairs = [Pair(self.arena)]

    def one(self, data):
        return data.draw(st.sampled_from(self.pairs))

    @rule(data=st.data(), count=st.sampled_from([1, 1, 3, 16, 37]))
    def read_on(self, data, count):
        self.one(data).read_on(self.arena, count, self.numbers)

    @precondition(lambda self: len(self.pairs) < 4)
    @rule(data=st.data())
    def fork(self, data):
        self.pairs.append(self.one(data).fork())

    @rule(data=st.data(), share=st.floats(0, 1))
    def keep(self, data, share):
        pair = self.one(data)
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
        pair.keep([(torch.rand(len(row), generator=generator) < share).tolist() for row in pair.held])

    @rule(data=st.data(), part=st.floats(0, 1))
    def shrink(self, data, part):
        pair = self.one(data)
        pair.shrink(int(part * pair.state.num_computed))

    @precondition(lambda self: len(self.pairs) > 1)
    @rule(data=st.data())
    def close(self, data):
        pair = self.one(data)
        self.pairs.remove(pair)
        pair.state.close()

    @rule(data=st.data())
    def move(self, data):
        """To other blocks, as a swap out and in would."""
        state = self.one(data).state
        old = state.blocks()
        new = self.arena.allocate(Owner.WINDOW, old.numel())
        self.arena.cells[new] = self.arena.cells[old]
        self.arena.free(Owner.WINDOW, old)
        state.move_to(new)

    @invariant()
    def everyone_reads_what_was_written(self):
        for pair in self.pairs:
            pair.check()

    @invariant()
    def books_balance(self):
        held = torch.cat([pair.state.blocks() for pair in self.pairs])
        self.arena.check(held)
        told = self.ledger.used_bytes(Owner.WINDOW) + self.ledger.shared_bytes(Owner.WINDOW)
        assert told == sum(pair.state.window_bytes for pair in self.pairs)
        assert self.ledger.used_bytes(Owner.WINDOW) == torch.unique(held).numel() * LAYOUT.block_bytes


TestSharing = Sharing.TestCase
TestSharing.settings = settings(max_examples=25, stateful_step_count=20)


@pytest.fixture
def arena():
    return new_arena()[0]


def numbers():
    return iter(range(1, 10**6))


def columns(num_bytes):
    return num_bytes // (LAYOUT.num_cells * LAYOUT.block_bytes)


def test_a_fork_takes_nothing_until_it_writes_and_then_one_column(arena):
    pair = Pair(arena)
    pair.read_on(arena, 40, numbers())
    used = arena._ledger.used_bytes
    twin = pair.fork()
    assert columns(used(Owner.WINDOW)) == 3
    twin.read_on(arena, 1, iter([7]))
    assert columns(used(Owner.WINDOW)) == 4
    pair.read_on(arena, 1, iter([8]))
    assert columns(used(Owner.WINDOW)) == 4, "its last block is its own again"
    twin.check()
    pair.check()


def test_a_fork_at_a_full_block_copies_nothing(arena):
    pair = Pair(arena)
    pair.read_on(arena, 32, numbers())
    twin = pair.fork()
    twin.read_on(arena, 1, iter([7]))
    pair.read_on(arena, 1, iter([8]))
    assert columns(arena._ledger.used_bytes(Owner.WINDOW)) == 4
    assert twin.state.num_shared_from(0) == 2 * LAYOUT.num_cells


def test_heads_that_keep_less_free_their_blocks_and_no_other_ones(arena):
    pair = Pair(arena)
    pair.read_on(arena, 64, numbers())
    pair.keep([[True] * 64, [True] * 16 + [False] * 48, [False] * 64, [i % 4 == 0 for i in range(64)]])
    assert pair.state.is_ragged
    assert pair.state.counts.tolist() == [64, 16, 0, 16]
    # Of K and V.
    assert pair.state.blocks().numel() == 2 * (4 + 1 + 0 + 1)
    pair.check()
    pair.read_on(arena, 1, iter([9]))
    assert pair.state.blocks().numel() == 2 * (5 + 2 + 1 + 2)
    pair.check()


def test_positions_of_a_window_are_those_of_sinks_and_window(arena):
    pair = Pair(arena)
    pair.read_on(arena, 100, numbers())
    groups = pair.state.read_groups(1)
    pair.state.drop_groups(1)
    expected = [*range(SINK_TOKENS), *range(SINK_TOKENS + GROUP_TOKENS, 100)]
    assert pair.state.positions.tolist() == [expected]
    pair.state.restore_groups(groups)
    pair.check()


def test_a_window_that_slides_leaves_its_fork_untouched(arena):
    pair = Pair(arena)
    pair.read_on(arena, 150, numbers())
    twin = pair.fork()
    groups = twin.state.read_groups(2)
    twin.state.drop_groups(2)
    assert columns(arena._ledger.used_bytes(Owner.WINDOW)) == 10, "what slid out is still held by the other"
    pair.check()
    twin.state.restore_groups(groups)
    assert columns(arena._ledger.used_bytes(Owner.WINDOW)) == 10 + 2 * GROUP_TOKENS // BLOCK_TOKENS
    twin.check()
    pair.check()


def test_what_was_evicted_and_what_can_be_recalled_dont_mix(arena):
    pair = Pair(arena)
    pair.read_on(arena, 150, numbers())
    pair.state.drop_groups(1)
    with pytest.raises(InternalError, match="distant tokens can't evict"):
        pair.state.keep(torch.ones(ROWS, pair.state.num_resident, dtype=torch.bool))


def test_shrinking_before_the_window_is_found_out(arena):
    pair = Pair(arena)
    pair.read_on(arena, 150, numbers())
    pair.state.drop_groups(1)
    with pytest.raises(InternalError, match="position 20 lies before the window at 80"):
        pair.state.shrink(20)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17])
def test_positions_of_a_sequence_no_longer_than_the_sinks(arena, count):
    pair = Pair(arena)
    pair.read_on(arena, count, numbers())
    assert pair.state.positions.tolist() == [list(range(count))]
    pair.keep([[True] * count] * ROWS)
    pair.check()
