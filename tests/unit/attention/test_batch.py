import pytest
import torch

from kvservice.attention.batch import BatchAttention, prepare
from kvservice.attention.reference import attend_visible
from kvservice.compression.protocols import RECALL_INDEXES
from kvservice.config.recipes import EXACT, RECALL
from kvservice.errors import InternalError
from kvservice.kv.arena import Arena
from kvservice.kv.layout import KVLayout
from kvservice.kv.ledger import Ledger
from kvservice.recall.distant import StagingRing, staging_blocks
from kvservice.recall.memory import SequenceMemory, Store
from kvservice.recall.reach import Reach
from kvservice.tier.host import HostTier
from kvservice.tier.swap import SwapSpace
from kvservice.types import Distant, Eviction, ModelShape, RecipeSpec

FP32_ROUNDING = 1e-5
SHAPE = ModelShape(2, 6, 2, 16, 96, 128, 256, 8192, dtype_bytes=4)
LAYOUT = KVLayout.of(SHAPE, torch.float32)


@pytest.fixture
def place():
    RECALL_INDEXES.discover("kvservice.methods")
    ledger = Ledger(1 << 30, 1 << 30)
    staging = staging_blocks(SHAPE.num_kv_heads)
    arena = Arena(LAYOUT, staging + 9000, staging, ledger, torch.device("cpu"))
    return arena, HostTier(LAYOUT, 128, ledger, pin=False), StagingRing(arena)


def step(place, memory, qkv, reach, *, deterministic=False):
    """One step of a sequence through all layers; returns the outputs and commits."""
    arena, _, ring = place
    num_tokens = qkv[0][0].shape[0]
    memory.state.tokens += [0] * num_tokens
    rows = prepare(memory, 0, num_tokens, reach)
    attention = BatchAttention(arena, ring, [rows], deterministic=deterministic)
    outs = [attention(layer, *qkv[layer]) for layer in range(SHAPE.num_layers)]
    memory.commit(num_tokens, reach)
    memory.check()
    return outs


def tokens(count, seed):
    generator = torch.Generator().manual_seed(seed)
    heads = (SHAPE.num_heads, SHAPE.num_kv_heads, SHAPE.num_kv_heads)
    return [
        [2 * torch.randn(count, h, SHAPE.head_dim, generator=generator) for h in heads] for _ in range(SHAPE.num_layers)
    ]


def joined(parts, layer, which):
    return torch.cat([part[layer][which] for part in parts])


@pytest.mark.parametrize("lengths", [[1], [16], [17, 1], [400, 1, 1], [100, 300, 500, 70, 1], [3000, 200, 1]])
def test_streaming_every_distant_token_equals_one_softmax(place, lengths):
    """The last has more distant tokens than a staging tile holds."""
    memory = SequenceMemory(EXACT, Store(place[0], place[1], SwapSpace(place[0], place[1])))
    read = []
    for seed, length in enumerate(lengths):
        read.append(tokens(length, seed))
        outs = step(place, memory, read[-1], Reach.FULL)
        total = memory.state.num_computed
        visible = torch.ones(length, total, dtype=torch.bool).tril(total - length)
        for layer in range(SHAPE.num_layers):
            k, v = (joined(read, layer, which).transpose(0, 1) for which in (1, 2))
            expected = attend_visible(read[-1][layer][0], k, v, visible.unsqueeze(1).expand(-1, SHAPE.num_kv_heads, -1))
            torch.testing.assert_close(outs[layer], expected, atol=FP32_ROUNDING, rtol=FP32_ROUNDING)


def test_recalling_as_many_tokens_as_there_are_equals_one_softmax(place):
    memory = SequenceMemory(RECALL, Store(place[0], place[1], SwapSpace(place[0], place[1])))
    read = [tokens(16 + 256 + 128, 1)]
    step(place, memory, read[0], Reach.FULL)
    assert memory.state.num_distant == RECALL.recalled_tokens
    for seed, count in ((2, 20), (3, 1), (4, 1)):
        read.append(tokens(count, seed))
        outs = step(place, memory, read[-1], Reach.SELECT)
        total = memory.state.num_computed
        visible = torch.ones(count, total, dtype=torch.bool).tril(total - count)
        for layer in range(SHAPE.num_layers):
            k, v = (joined(read, layer, which).transpose(0, 1) for which in (1, 2))
            expected = attend_visible(read[-1][layer][0], k, v, visible.unsqueeze(1).expand(-1, SHAPE.num_kv_heads, -1))
            torch.testing.assert_close(outs[layer], expected, atol=FP32_ROUNDING, rtol=FP32_ROUNDING)


def test_a_question_asked_at_once_or_token_by_token_recalls_the_same(place):
    document, question = tokens(850, 1), tokens(30, 2)
    together, apart = (
        SequenceMemory(RECALL, Store(place[0], place[1], SwapSpace(place[0], place[1]))) for _ in range(2)
    )
    step(place, together, document, Reach.FULL)
    step(place, apart, document, Reach.FULL)
    whole = step(place, together, question, Reach.SELECT)
    for position in range(30):
        one = [[part[position : position + 1] for part in layer] for layer in question]
        outs = step(place, apart, one, Reach.SELECT)
        for layer in range(SHAPE.num_layers):
            torch.testing.assert_close(outs[layer][0], whole[layer][position], atol=FP32_ROUNDING, rtol=FP32_ROUNDING)


def test_a_question_that_crosses_a_slide_in_one_step_is_refused(place):
    """Its first and last tokens would see different windows, so the answer would depend on the chunking."""
    memory = SequenceMemory(RECALL, Store(place[0], place[1], SwapSpace(place[0], place[1])))
    step(place, memory, tokens(900, 1), Reach.FULL)
    step(place, memory, tokens(12, 2), Reach.SELECT)
    with pytest.raises(InternalError, match="65 tokens as if all saw one window"):
        step(place, memory, tokens(65, 3), Reach.SELECT)


def test_host_kv_that_was_recalled_is_read_from_the_device(place):
    """Poison the host after a token's KV came to its slots: asked again, the answer is the same."""
    memory = SequenceMemory(RECALL, Store(place[0], place[1], SwapSpace(place[0], place[1])))
    step(place, memory, tokens(900, 1), Reach.FULL)
    arena, host, ring = place
    question = tokens(1, 2)

    def ask():
        rows = prepare(memory, 0, 1, Reach.SELECT)
        return BatchAttention(arena, ring, [rows])(0, *question[0])

    first = ask()
    hits = memory.counters.hits
    host._groups.fill_(float("nan"))
    assert torch.equal(ask(), first)
    assert memory.counters.hits - hits == SHAPE.num_kv_heads * RECALL.recalled_tokens
    memory.slots().clear()
    assert ask().isnan().any(), "a negative control: fetched anew, the poison shows"


# -- heads that hold different tokens --------------------------------------------------------------------------------


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_heads_that_hold_different_tokens_attend_to_those_alone(place, deterministic, shared):
    """Two evictions, with questions and single tokens between them; a fork goes on from the same blocks."""
    eviction = Eviction("streaming_llm", kept_tokens=5000, read_tokens=5001)
    plenty = RecipeSpec("plenty", Distant.EVICT, "", eviction=eviction)
    memory = SequenceMemory(plenty, Store(place[0], place[1], SwapSpace(place[0], place[1])))
    generator = torch.Generator().manual_seed(0)
    visible = torch.zeros(SHAPE.num_layers, SHAPE.num_kv_heads, 0, dtype=torch.bool)
    read = []
    for seed, (count, share) in enumerate([(150, 0.5), (20, None), (1, None), (33, 0.2), (1, None), (40, None)]):
        read.append(tokens(count, seed))
        outs = step(place, memory, read[-1], Reach.FULL, deterministic=deterministic)
        visible = torch.cat([visible, visible.new_ones(*visible.shape[:2], count)], 2)
        total = visible.shape[2]
        causal = torch.ones(count, total, dtype=torch.bool).tril(total - count)
        for layer in range(SHAPE.num_layers):
            k, v = (joined(read, layer, which).transpose(0, 1) for which in (1, 2))
            expected = attend_visible(read[-1][layer][0], k, v, causal.unsqueeze(1) & visible[layer])
            torch.testing.assert_close(outs[layer], expected, atol=FP32_ROUNDING, rtol=FP32_ROUNDING)
        if share is not None:
            positions = memory.state.positions.expand(SHAPE.num_layers * SHAPE.num_kv_heads, -1)
            marked = (torch.rand(positions.shape, generator=generator) < share) & (positions >= 0)
            marked[0] = False  # One head keeps nothing at all.
            stays = torch.zeros(positions.shape[0], total + 1, dtype=torch.bool)
            stays.scatter_(1, positions.masked_fill(~marked, total).long(), True)
            visible &= stays[:, :total].view(visible.shape)
            if shared:
                before = memory
                memory = memory.fork()
                memory.state.keep(marked)
                before.close()
            else:
                memory.state.keep(marked)
    assert memory.state.is_ragged
    memory.close()
    place[0].check(torch.empty(0, dtype=torch.int32))
