import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvservice.compression.protocols import RECALL_INDEXES, Selection
from kvservice.config.recipes import DENSE, RECALL, RECIPES
from kvservice.errors import InternalError
from kvservice.kv.arena import Arena
from kvservice.kv.layout import KVLayout
from kvservice.kv.ledger import Ledger, Owner
from kvservice.recall.memory import SequenceMemory, Store
from kvservice.recall.planner import select
from kvservice.recall.reach import Reach
from kvservice.recall.residency import EMPTY, place
from kvservice.tier.host import HostTier
from kvservice.tier.swap import SwapSpace
from kvservice.types import GROUP_TOKENS, Distant, ModelShape, footprint, index_blocks

SHAPE = ModelShape(2, 4, 2, 16, 64, 128, 256, 4096, dtype_bytes=4)
LAYOUT = KVLayout.of(SHAPE, torch.float32)


@pytest.fixture(autouse=True)
def methods():
    RECALL_INDEXES.discover("kvservice.methods")


@pytest.fixture
def ledger():
    return Ledger(1 << 30, 1 << 30)


@pytest.fixture
def arena(ledger):
    return Arena(LAYOUT, 6000, 16, ledger, torch.device("cpu"))


@pytest.fixture
def host(ledger):
    return HostTier(LAYOUT, 64, ledger, pin=False)


def new_memory(recipe, arena, host):
    return SequenceMemory(recipe, Store(arena, host, SwapSpace(arena, host)))


def fill(memory, arena, kv, stop):
    """Writes positions num_computed…stop-1 of `kv` `[layers, 2, kv, t, d]`, sliding as an engine would."""
    state = memory.state
    while state.num_computed < stop:
        count = min(stop - state.num_computed, 100)
        start = state.num_computed
        state.tokens[start:] = range(start, start + count)
        state.extend(count)
        arena.slots[state.slots(count)] = kv[:, :, :, start : start + count]
        memory.commit(count, Reach.FULL)
        memory.check()


def contents(memory, layer):
    """All K and V of a layer in order of position, from device and tier."""
    state = memory.state
    keys, values = state.read(layer, state.num_resident)
    if state.num_distant == 0:
        return torch.stack([keys, values])
    groups = memory.distant.load_last(memory.distant.num_groups)[:, layer]
    distant = groups.permute(3, 1, 0, 2, 4).reshape(2, LAYOUT.num_kv_heads, -1, LAYOUT.head_dim)
    resident = torch.stack([keys, values])
    return torch.cat([resident[:, :, :16], distant, resident[:, :, 16:]], dim=2)


def random_kv(tokens):
    torch.manual_seed(0)
    return torch.randn(LAYOUT.num_layers, 2, LAYOUT.num_kv_heads, tokens, LAYOUT.head_dim)


def test_what_left_the_window_is_in_the_tier_bit_for_bit(arena, host):
    memory = new_memory(RECALL, arena, host)
    kv = random_kv(900)
    fill(memory, arena, kv, 900)
    assert memory.state.window_start == RECALL.window_start(900) == 16 + 64 * 9
    for layer in range(LAYOUT.num_layers):
        assert torch.equal(contents(memory, layer), kv[layer])


@pytest.mark.parametrize("keep", [0, 5, 16, 300, 335, 336, 400, 700, 899, 900])
def test_truncate_restores_exactly_what_was_there_before(arena, host, ledger, keep):
    memory = new_memory(RECALL, arena, host)
    kv = random_kv(900)
    fill(memory, arena, kv, keep)
    before = (ledger.used_bytes(Owner.WINDOW), ledger.used_bytes(Owner.INDEX), ledger.used_bytes(Owner.HOST))
    codes = memory.index._codes.read(slice(None)).clone()
    fill(memory, arena, kv, 900)
    memory.truncate(keep)
    memory.check()
    assert memory.state.num_computed == keep == len(memory.state.tokens)
    assert (ledger.used_bytes(Owner.WINDOW), ledger.used_bytes(Owner.INDEX), ledger.used_bytes(Owner.HOST)) == before
    assert torch.equal(memory.index._codes.read(slice(None)), codes)
    for layer in range(LAYOUT.num_layers):
        assert torch.equal(contents(memory, layer), kv[layer][:, :, :keep])


def test_a_sequence_without_distant_tokens_keeps_no_slots_for_them(arena, host):
    memory = new_memory(RECALL, arena, host)
    fill(memory, arena, random_kv(400), 400)
    memory.slots()
    memory.truncate(340)
    assert memory.slot_bytes == footprint(SHAPE, RECALL, 340).slot_bytes > 0
    memory.truncate(100)
    assert memory.slot_bytes == footprint(SHAPE, RECALL, 100).slot_bytes == 0


@pytest.mark.parametrize("length", [1, 16, 17, 80, 300, 500])
def test_truncating_far_back_takes_no_more_blocks_than_the_sequence_had(arena, host, ledger, length):
    memory = new_memory(RECALL, arena, host)
    kv = random_kv(2000)
    fill(memory, arena, kv, 2000)
    taken = []
    allocate = arena.allocate
    arena.allocate = lambda owner, count: taken.append(ledger.used_bytes(Owner.WINDOW)) or allocate(owner, count)
    memory.truncate(length)
    memory.check()
    assert ledger.used_bytes(Owner.WINDOW) <= footprint(SHAPE, RECALL, 2000).window_bytes
    # Before anything comes back, all but the sinks has gone.
    assert all(used == LAYOUT.num_cells * LAYOUT.block_bytes for used in taken)
    for layer in range(LAYOUT.num_layers):
        assert torch.equal(contents(memory, layer), kv[layer][:, :, :length])


def test_closing_gives_every_byte_back(arena, host, ledger):
    memory = new_memory(RECALL, arena, host)
    fill(memory, arena, random_kv(900), 900)
    memory.slots()
    memory.close()
    assert [ledger.used_bytes(o) for o in (Owner.WINDOW, Owner.INDEX, Owner.SLOTS, Owner.HOST)] == [0, 0, 0, 0]
    arena.check(torch.empty(0, dtype=torch.int32))
    host.check([])


# What drops tokens needs steps to drop them by: the conformance tests of methods have those.
WHOLE = sorted(
    name for name, recipe in RECIPES.items() if not recipe.shares_keys and recipe.distant is not Distant.EVICT
)


@given(tokens=st.integers(1, 1500), name=st.sampled_from(WHOLE))
def test_footprint_is_what_a_sequence_really_takes(tokens, name):
    recipe = RECIPES[name]
    if name == "recall-oracle":
        return  # keeps 16-bit keys; this layout is fp32
    ledger = Ledger(1 << 30, 1 << 30)
    arena = Arena(LAYOUT, 9000, 0, ledger, torch.device("cpu"))
    memory = new_memory(recipe, arena, HostTier(LAYOUT, 32, ledger, pin=False))
    fill(memory, arena, random_kv(tokens), tokens)
    promised = footprint(SHAPE, recipe, tokens)
    assert memory.state.window_bytes <= promised.window_bytes
    assert promised.window_bytes - memory.state.window_bytes <= 4 * SHAPE.num_cells * SHAPE.block_bytes
    if not recipe.tokens_per_cluster:  # Clusters are formed when they are first asked for.
        assert memory.index_bytes == promised.index_bytes
    assert memory.host_bytes == promised.host_bytes
    if promised.slot_bytes:
        memory.slots()
    assert memory.slot_bytes == promised.slot_bytes


def test_dense_keeps_everything_on_the_device(arena, host):
    memory = new_memory(DENSE, arena, host)
    fill(memory, arena, random_kv(900), 900)
    assert memory.distant.num_groups == 0
    assert memory.state.num_resident == 900


def test_sequence_that_lies_about_its_tier_is_found_out(arena, host):
    memory = new_memory(RECALL, arena, host)
    fill(memory, arena, random_kv(600), 600)
    memory.distant.drop_last(1)
    with pytest.raises(InternalError, match="groups in the tier"):
        memory.check()


def test_groups_are_encoded_alike_whatever_the_chunking(arena, host):
    kv = random_kv(900)
    whole, steps = (new_memory(RECALL, arena, host) for _ in range(2))
    fill(whole, arena, kv, 900)
    for stop in (1, 17, 337, 338, 500, 777, 900):
        fill(steps, arena, kv, stop)
    assert torch.equal(whole.index._codes.read(slice(None)), steps.index._codes.read(slice(None)))
    assert torch.equal(whole.index._params.read(slice(None)), steps.index._params.read(slice(None)))


# -- selection -------------------------------------------------------------------------------------------------------


def test_select_takes_the_tokens_of_most_mass():
    scores = torch.tensor([[[0.0, 5.0, 1.0, 4.0], [3.0, 0.0, 0.0, 0.0]]])
    # Head 1 looks elsewhere, so its favourite (token 0) doesn't count.
    chosen = select(scores, torch.tensor([[0.0, 50.0]]), num_queries=1, budget=2)
    assert sorted(chosen[0, 0].tolist()) == [1, 3]
    # When both look at distant tokens, it does.
    chosen = select(scores, torch.tensor([[50.0, -50.0]]), num_queries=1, budget=1)
    assert chosen[0, 0].tolist() == [0]


def test_select_lets_each_query_choose_for_itself():
    scores = torch.randn(2, 3 * 2, 50)
    together = select(scores, torch.zeros(2, 6), num_queries=3, budget=7)
    for query in range(3):
        alone = select(scores[:, 2 * query : 2 * query + 2], torch.zeros(2, 2), num_queries=1, budget=7)
        assert torch.equal(together[:, query].sort(-1).values, alone[:, 0].sort(-1).values)


def test_select_takes_all_when_there_are_fewer_than_the_budget():
    chosen = select(torch.randn(1, 2, 5), torch.zeros(1, 2), num_queries=1, budget=128)
    assert sorted(chosen[0, 0].tolist()) == [0, 1, 2, 3, 4]


@given(seed=st.integers(0, 2**16), slots=st.integers(1, 12), total=st.integers(1, 30), steps=st.integers(1, 6))
def test_slots_hold_exactly_what_was_chosen(seed, slots, total, steps):
    generator = torch.Generator().manual_seed(seed)
    resident = torch.stack([torch.full((3, slots), EMPTY), torch.arange(slots).expand(3, -1)], 1).int()
    held = torch.full((3, slots), EMPTY, dtype=torch.int64)
    count = min(slots, total)
    for _ in range(steps):
        chosen = torch.stack([torch.randperm(total, generator=generator)[:count].sort().values for _ in range(3)])
        before = held.clone()
        placed = place(resident, chosen)
        held[placed.heads, placed.slots] = placed.offsets
        assert torch.equal(held.gather(1, placed.where), chosen)
        assert torch.equal(held.gather(1, resident[:, 1, :count].long()), resident[:, 0, :count].long())
        assert torch.equal(resident[:, 1].long().sort(-1).values, torch.arange(slots).expand(3, -1))
        for head in range(3):
            kept = set(before[head].tolist()) & set(chosen[head].tolist())
            assert int((placed.heads == head).sum()) == count - len(kept), "only the difference moves"


# -- indexes ---------------------------------------------------------------------------------------------------------


def ask(index, keys, bits, q):
    codes, params = index.encode(keys.view(-1, GROUP_TOKENS, keys.shape[-1]), bits)
    num_kv, total, _ = keys.shape
    groups = total // GROUP_TOKENS
    return index.scores(
        Selection(
            q,
            codes.view(num_kv, groups, -1),
            params.view(num_kv, groups, -1, keys.shape[-1]),
            total,
            keys.shape[-1] ** -0.5,
            seed=3,
        )
    )


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_low_bit_scores_equal_those_of_keys_rounded_one_by_one(bits):
    torch.manual_seed(4)
    keys, q = torch.randn(2, 128, 32), torch.randn(2, 3, 32)
    rounded = torch.empty_like(keys)
    for group in range(2):
        part = keys[:, group * 64 : group * 64 + 64]
        low, high = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
        step = (high - low) / (2**bits - 1)
        rounded[:, group * 64 : group * 64 + 64] = ((part - low) / step).round() * step + low
    expected = q @ rounded.transpose(1, 2) * 32**-0.5
    ours = ask(RECALL_INDEXES.get("key_index"), keys, bits, q)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_constant_channels_survive_quantisation():
    keys = torch.full((1, 64, 16), 0.75)
    scores = ask(RECALL_INDEXES.get("key_index"), keys, 2, torch.ones(1, 1, 16))
    torch.testing.assert_close(scores, torch.full((1, 1, 64), 3.0))


def test_oracle_gives_the_true_scores():
    torch.manual_seed(5)
    keys, q = torch.randn(2, 128, 32), torch.randn(2, 3, 32)
    torch.testing.assert_close(ask(RECALL_INDEXES.get("oracle"), keys, 32, q), q @ keys.transpose(1, 2) * 32**-0.5)


def test_recency_ranks_by_position():
    scores = ask(RECALL_INDEXES.get("recency"), torch.randn(2, 128, 16), 0, torch.randn(2, 3, 16))
    chosen = select(scores, torch.zeros(2, 3), num_queries=1, budget=10)
    assert sorted(chosen[0, 0].tolist()) == list(range(118, 128))


@pytest.mark.parametrize("num_groups", [1, 2, 3, 7, 8, 9, 60])
def test_index_bytes_are_those_of_the_formula(arena, ledger, num_groups):
    from kvservice.recall.index import SequenceIndex

    index = SequenceIndex(RECALL_INDEXES.get("key_index"), 2, arena)
    index.append(torch.randn(num_groups, *LAYOUT.group_shape))
    assert index.num_bytes == index_blocks(SHAPE, RECALL, num_groups) * SHAPE.block_bytes
    assert index.num_bytes == ledger.used_bytes(Owner.INDEX)


def test_room_for_tokens_under_way_doesnt_move_to_the_host(arena, host):
    memory = new_memory(DENSE, arena, host)
    memory.state.tokens = list(range(100))
    memory.state.extend(40)
    memory.state.commit(40)
    held = memory.device_bytes
    memory.state.extend(60)
    assert memory.device_bytes > held
    memory.swap_out()
    assert memory.device_bytes == held
    memory.forget()
