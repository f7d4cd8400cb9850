from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvservice.compression.protocols import CLUSTER_INDEXES, RECALL_INDEXES
from kvservice.config.recipes import CLUSTERKV
from kvservice.kv.arena import Arena
from kvservice.kv.layout import KVLayout
from kvservice.kv.ledger import Ledger, Owner
from kvservice.recall.choosing import Query
from kvservice.recall.clusters import Run, SequenceClusters, runs
from kvservice.recall.memory import SequenceMemory, Store
from kvservice.recall.reach import Reach
from kvservice.tier.host import HostTier
from kvservice.tier.swap import SwapSpace
from kvservice.types import ModelShape, footprint, index_blocks, most_clusters

SHAPE = ModelShape(2, 4, 2, 16, 64, 128, 256, 4096, dtype_bytes=4)
LAYOUT = KVLayout.of(SHAPE, torch.float32)
RECIPE = replace(CLUSTERKV, recalled_tokens=96)
SCALE = 16**-0.5


@pytest.fixture(autouse=True)
def methods():
    RECALL_INDEXES.discover("kvservice.methods")


class World:
    def __init__(self):
        self.ledger = Ledger(1 << 30, 1 << 30)
        self.arena = Arena(LAYOUT, 9000, 16, self.ledger, torch.device("cpu"))
        self.host = HostTier(LAYOUT, 200, self.ledger, pin=False)
        self.store = Store(self.arena, self.host, SwapSpace(self.arena, self.host))
        torch.manual_seed(0)
        self.kv = torch.randn(LAYOUT.num_layers, 2, LAYOUT.num_kv_heads, 4000, LAYOUT.head_dim)

    def memory(self, recipe=RECIPE):
        return SequenceMemory(recipe, self.store)

    def fill(self, memory, stop, reach=Reach.FULL, step=100):
        """Computes positions up to `stop - 1`, whose KV is the same in every sequence."""
        state = memory.state
        while state.num_computed < stop:
            start, count = state.num_computed, min(stop - state.num_computed, step)
            state.tokens[start:] = range(start, start + count)
            state.extend(count)
            self.arena.slots[state.slots(count)] = self.kv[:, :, :, start : start + count]
            memory.commit(count, reach)
            memory.check()


@pytest.fixture
def world():
    world = World()
    yield world
    world.store.swap.close()


def query(num_queries=1, layer=1):
    torch.manual_seed(1)
    rows = 2 * num_queries
    return Query(layer, 3 * torch.randn(2, rows, 16), torch.randn(2, rows), num_queries, SCALE, seed=0)


def choices(memory):
    return torch.cat([memory.choose(query(2, layer)) for layer in range(LAYOUT.num_layers)])


# -- runs ------------------------------------------------------------------------------------------------------------


def test_the_first_run_is_all_that_was_there_and_each_next_has_320_tokens():
    assert runs(0, 7) == []
    assert runs(7, 7) == [Run(0, 7)]
    assert runs(18, 7) == [Run(0, 7), Run(7, 12), Run(12, 17), Run(17, 18)]
    assert runs(6, 0) == [Run(0, 5), Run(5, 6)]
    assert runs(4, 9) == [Run(0, 4)]


@pytest.mark.parametrize(("groups", "clusters"), [(1, 1), (2, 1), (3, 2), (5, 4), (100, 80)])
def test_a_run_has_a_cluster_for_80_tokens(groups, clusters):
    assert Run(3, 3 + groups).num_clusters(80) == clusters


@given(num_groups=st.integers(1, 300), first_groups=st.integers(0, 300))
def test_clusters_are_never_more_than_is_promised_room_for(num_groups, first_groups):
    made = runs(num_groups, first_groups)
    assert [run.start for run in made[1:]] == [run.stop for run in made[:-1]]
    assert (made[0].start, made[-1].stop) == (0, num_groups)
    assert sum(run.num_clusters(80) for run in made) <= most_clusters(num_groups, 80)


# -- choosing --------------------------------------------------------------------------------------------------------


class ByFirstNumber:
    """Clusters keys by their first number, so that tests know where each belongs."""

    paper = summary = ""

    def cluster(self, keys, num_clusters, seed):
        labels = keys[..., 0].long()
        return labels, torch.arange(num_clusters).float().view(1, -1, 1).expand(keys.shape[0], -1, keys.shape[2])

    def scores(self, q, centroids):
        return q @ centroids.transpose(1, 2)


def test_whole_clusters_are_taken_and_the_last_is_trimmed_in_order_of_position(world):
    labels = torch.randint(0, 4, (2, 320))
    index = SequenceClusters(ByFirstNumber(), 80, world.arena)
    index.append(torch.empty(5, *LAYOUT.group_shape))
    index.form(5, lambda layer, start, stop: labels[:, start:stop, None].float().expand(-1, -1, 16))
    liking = torch.tensor([0.3, 0.1, 0.9, 0.5]).view(1, 1, 1, 4).expand(2, 1, 1, -1)
    best = index.best_first(0, liking, 200)[:, 0, 0]
    for head in range(2):
        expected = [int(t) for c in (2, 3, 0, 1) for t in (labels[head] == c).nonzero().flatten()]
        assert best[head].tolist() == expected[:200]
    q = torch.randn(2, 3, 16)
    expected = (q @ torch.ones(16)).unsqueeze(-1) * labels.unsqueeze(1) * SCALE
    torch.testing.assert_close(index.scores(0, q, SCALE, 0), expected)


def test_together_heads_weigh_a_cluster_by_the_attention_mass_of_its_tokens(world):
    memory = world.memory(replace(RECIPE, per_query_head=False))
    world.fill(memory, 1200)
    asked = query(num_queries=1)
    chosen = memory.choose(asked)[:, 0]
    scores = memory.index.scores(1, asked.q, SCALE, 0)
    norm = torch.logaddexp(scores.logsumexp(-1), asked.proximal_lse)
    mass = (scores - norm.unsqueeze(-1)).exp().sum(1)
    for head in range(2):
        taken = torch.zeros(mass.shape[1], dtype=torch.bool)
        taken[chosen[head]] = True
        assert mass[head][taken].min() >= mass[head][~taken].max() * (1 - 1e-5)


def test_every_budget_is_met_exactly(world):
    for per_query_head in (False, True):
        memory = world.memory(replace(RECIPE, per_query_head=per_query_head))
        world.fill(memory, 900)
        chosen = memory.choose(query(num_queries=3))
        assert chosen.shape == (2, 3, 96)
        assert (chosen.diff(dim=-1) > 0).all()
        assert 0 <= chosen.min() <= chosen.max() < 64 * 9
        memory.close()


def test_tokens_that_leave_the_window_can_be_recalled_at_once(world):
    memory = world.memory(replace(RECIPE, recalled_tokens=16 * 64))
    world.fill(memory, 900)
    memory.choose(query())
    for stop in (964, 1028, 1300):
        world.fill(memory, stop, Reach.SELECT)
        assert memory.choose(query())[0, 0].tolist() == list(range(memory.state.num_distant))


# -- the same, whatever happened before ------------------------------------------------------------------------------


def test_clusters_don_t_depend_on_the_chunks(world):
    whole, steps = world.memory(), world.memory()
    world.fill(whole, 1100)
    for stop in (17, 400, 401, 777, 1100):
        world.fill(steps, stop)
    assert torch.equal(choices(whole), choices(steps))


def test_clusters_don_t_depend_on_when_they_are_asked_for(world):
    often, once = world.memory(), world.memory()
    world.fill(often, 900)
    world.fill(once, 900)
    for stop in range(910, 1700, 70):
        world.fill(often, stop, Reach.SELECT)
        often.choose(query())
    world.fill(once, often.num_computed, Reach.SELECT)
    assert torch.equal(choices(often), choices(once))


@pytest.mark.parametrize("keep", [300, 400, 600, 899, 900, 905, 1100, 1499])
def test_truncate_leaves_the_choices_of_a_sequence_that_never_had_more(world, keep):
    memory, fresh = world.memory(), world.memory()
    for each, stop in ((fresh, keep), (memory, 1500)):
        world.fill(each, min(900, stop))
        world.fill(each, stop, Reach.SELECT)
    choices(memory)
    memory.truncate(keep)
    memory.check()
    assert memory.index_bytes <= footprint(SHAPE, RECIPE, keep).index_bytes
    for stop in (keep, keep + 200):
        world.fill(memory, stop, Reach.SELECT)
        world.fill(fresh, stop, Reach.SELECT)
        if memory.state.num_distant:
            assert torch.equal(choices(memory), choices(fresh))
            assert memory.index_bytes == fresh.index_bytes


def test_a_prefix_of_another_sequence_is_clustered_as_if_it_had_been_read(world):
    donor, fresh = world.memory(), world.memory()
    world.fill(donor, 900)
    world.fill(donor, 1000, Reach.SELECT)
    before = choices(donor)
    twin = donor.fork()
    twin.truncate(848)
    for each in (twin, fresh):
        world.fill(each, 1400)
        world.fill(each, 1450, Reach.SELECT)
    assert torch.equal(choices(twin), choices(fresh))
    assert torch.equal(choices(donor), before), "a fork changes nothing of the one it comes from"


def test_what_was_forgotten_and_computed_again_is_clustered_as_before(world):
    memory = world.memory()
    world.fill(memory, 900)
    world.fill(memory, 1300, Reach.SELECT)
    before = choices(memory)
    memory.forget()
    memory.state.tokens = []
    world.fill(memory, 900)
    choices(memory)
    world.fill(memory, 1300, Reach.SELECT)
    assert torch.equal(choices(memory), before)


# -- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "stop"), [(337, 337), (400, 1000), (2000, 2000), (1500, 2400), (100, 900)])
def test_clusters_take_what_the_ledger_is_told_and_no_more_than_was_promised(world, first, stop):
    memory = world.memory()
    world.fill(memory, first)
    world.fill(memory, stop, Reach.SELECT)
    assert memory.index_bytes == 0, "formed when they are asked for"
    choices(memory)
    assert memory.index_bytes == world.ledger.used_bytes(Owner.INDEX)
    promised = index_blocks(SHAPE, RECIPE, memory.distant.num_groups)
    assert promised * SHAPE.block_bytes == footprint(SHAPE, RECIPE, stop).index_bytes
    spare = promised * SHAPE.block_bytes - memory.index_bytes
    assert 0 <= spare <= SHAPE.num_layers * SHAPE.num_kv_heads * SHAPE.block_bytes
    memory.close()
    assert world.ledger.used_bytes(Owner.INDEX) == 0
    world.arena.check(torch.empty(0, dtype=torch.int32))


def test_a_fork_shares_its_blocks_until_one_of_the_two_forms_others(world):
    memory = world.memory()
    world.fill(memory, 900)
    choices(memory)
    alone = world.ledger.used_bytes(Owner.INDEX)
    twin = memory.fork()
    assert world.ledger.used_bytes(Owner.INDEX) == alone
    assert twin.index.num_shared_from(9) == twin.index.blocks().numel(), "any of them may be formed anew"
    world.fill(twin, 1200)
    choices(twin)
    assert world.ledger.used_bytes(Owner.INDEX) == alone + twin.index_bytes
    assert twin.index.num_shared_from(0) == 0


def test_clusters_move_with_their_sequence(world):
    memory = world.memory()
    world.fill(memory, 900)
    before = choices(memory)
    memory.swap_out()
    while world.store.swap.wait(1.0):
        pass
    memory.poll()
    taken = world.arena.allocate(Owner.SLOTS, 500)
    memory.swap_in()
    while world.store.swap.wait(1.0):
        pass
    memory.poll()
    world.arena.cells[taken] = 7.0
    assert torch.equal(choices(memory), before)


def test_reading_keys_back_counts_as_bytes_moved(world):
    memory = world.memory()
    world.fill(memory, 900)
    choices(memory)
    assert memory.counters.streamed_bytes == 9 * LAYOUT.group_bytes
    choices(memory)
    assert memory.counters.streamed_bytes == 9 * LAYOUT.group_bytes


def test_the_method_of_the_recipe_is_published():
    assert "2412.03213" in CLUSTER_INDEXES.get(RECIPE.index).paper
