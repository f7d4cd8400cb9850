"""Recall by the CPU kernels, on every instruction set, against torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kvservice.compression.protocols import Selection
from kvservice.kernels import cpu
from kvservice.methods import key_index
from kvservice.methods.key_index import KeyIndex
from kvservice.recall.planner import select
from kvservice.recall.residency import EMPTY
from kvservice.types import GROUP_TOKENS
from tests.conformance.test_kernels import SHAPES, Model, Shape, assert_close, isa, pytestmark  # noqa: F401

LAYER = 1
NEAR = 48
"""Tokens of each sequence in the arena, besides the step's own."""


@dataclass
class Case:
    """A begun step of sequences that recall, and what a reference needs to know of them."""

    model: Model
    step: cpu.Step
    sequences: list[cpu.StepSequence]
    distant: list[Tensor]
    """Of each sequence `[groups, layers, kv, 64, 2, d]`; kept alive, as kernels know its address alone."""
    arena: Tensor

    def run(self) -> None:
        self.model.kernels.attend(LAYER, self.step)
        self.model.kernels.recall(LAYER, self.step)


def entries(model: Model, arena: Tensor, free: list[int], records: Tensor) -> Tensor:
    """Puts records `[rows, n, bytes]` into blocks of the arena; returns their table."""
    blocks = arena.view(torch.uint8).view(arena.shape[0], -1)
    rows, count, size = records.shape
    piece = min(size, blocks.shape[1])
    pieces = records.reshape(rows, count * size // piece, piece)
    per_block = blocks.shape[1] // piece
    columns = max(1, -(-pieces.shape[1] // per_block))
    table = torch.tensor([[free.pop() for _ in range(columns)] for _ in range(rows)], dtype=torch.int32)
    for row in range(rows):
        for i in range(pieces.shape[1]):
            blocks[table[row, i // per_block], i % per_block * piece :][:piece] = pieces[row, i]
    return table


def case(
    shape: Shape,
    *,
    groups: list[int],
    queries: list[int],
    bits: int = 2,
    budget: int = 16,
    with_slots: bool = False,
    seed: int = 0,
    loudness: float = 1.0,
) -> Case:
    model = Model(shape, seed)
    arena = model.arena(4096)
    free = torch.randperm(4096, generator=model.rng).tolist()
    cells, heads = 2 * shape.layers * shape.kv, shape.layers * shape.kv
    sequences, distant, positions, row = [], [], [], 0
    for count, num_queries in zip(groups, queries, strict=True):
        kv = model.randn(count, shape.layers, shape.kv, GROUP_TOKENS, 2, shape.dim).to(shape.dtype)
        keys = kv[..., 0, :].permute(1, 2, 0, 3, 4).reshape(heads * count, GROUP_TOKENS, shape.dim)
        codes, params = KeyIndex().encode(keys, bits)
        columns = -(-(NEAR + num_queries) // 16)
        table = torch.tensor([[free.pop() for _ in range(columns)] for _ in range(cells)], dtype=torch.int32)
        arena[table.long()] = model.randn(cells, columns, 16, shape.dim).to(shape.dtype)
        slots = None
        if with_slots:
            slots = torch.tensor([[free.pop() for _ in range(budget // 16)] for _ in range(cells)], dtype=torch.int32)
        recall = cpu.StepRecall(
            codes=entries(model, arena, free, codes.view(heads, count, -1)),
            params=entries(model, arena, free, params.reshape(heads, count, -1).view(torch.uint8)),
            bits=bits,
            groups=torch.tensor([kv[g].data_ptr() for g in range(count)], dtype=torch.int64),
            budget=budget,
            slots=slots,
            resident=nothing_resident(shape, budget) if with_slots else None,
            counters=torch.zeros(3, dtype=torch.int64),
        )
        window_start = 16 + count * GROUP_TOKENS
        sequences.append(cpu.StepSequence(table, NEAR, num_queries, row, window_start, recall=recall))
        positions.append(torch.arange(num_queries) + NEAR + count * GROUP_TOKENS)
        distant.append(kv)
        row += num_queries
    step = model.step(arena)
    step.begin(torch.cat(positions), sequences)
    step.q.copy_(model.randn(*step.q.shape) * loudness)
    return Case(model, step, sequences, distant, arena)


def nothing_resident(shape: Shape, budget: int) -> Tensor:
    resident = torch.empty(shape.layers, shape.kv, 2, budget, dtype=torch.int32)
    resident[:, :, 0] = EMPTY
    resident[:, :, 1] = torch.arange(budget, dtype=torch.int32)
    return resident


def near(case: Case) -> tuple[Tensor, Tensor]:
    case.model.kernels.attend(LAYER, case.step)
    return case.step.attended.clone(), case.step.lse.clone()


def index_scores(case: Case, number: int, q: Tensor, bits: int) -> Tensor:
    """What the reference scores for queries `[kv, r, d]` of a sequence."""
    shape, kv = case.model.shape, case.distant[number]
    keys = kv[:, LAYER, :, :, 0].transpose(0, 1)
    codes, params = KeyIndex().encode(keys.reshape(-1, GROUP_TOKENS, shape.dim), bits)
    ask = Selection(
        q=q.float(),
        codes=codes.view(shape.kv, kv.shape[0], -1),
        params=params.float().view(shape.kv, kv.shape[0], 2, -1),
        num_distant=kv.shape[0] * GROUP_TOKENS,
        scale=case.model.scale,
        seed=0,
    )
    return KeyIndex().scores(ask)


def by_kv_head(rows: Tensor, shape: Shape) -> Tensor:
    """`[h, ...]` of one query to `[kv, group, ...]`."""
    return rows.reshape(shape.kv, shape.heads // shape.kv, *rows.shape[1:])


RECALL_SHAPES = [SHAPES[i] for i in (0, 1, 2, 3, 4, 5, 6, 7)]
IDS = [f"h{s.heads}kv{s.kv}d{s.dim}{'bf16' if s.dtype is torch.bfloat16 else 'fp32'}" for s in RECALL_SHAPES]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", RECALL_SHAPES, ids=IDS)
def test_recalls_the_tokens_of_most_mass_and_attends_to_exactly_those(shape: Shape, bits: int) -> None:
    work = case(shape, groups=[3, 9], queries=[1, 1], bits=bits, budget=32, with_slots=True, seed=bits)
    before, before_lse = near(work)
    work.run()
    for number, sequence in enumerate(work.sequences):
        assert sequence.recall is not None
        assert sequence.recall.resident is not None
        chosen = sequence.recall.resident[LAYER, :, 0].long()
        assert (chosen.diff(dim=1) > 0).all(), "in order of position, each once"
        q = by_kv_head(work.step.q[number], shape).float()
        lse = by_kv_head(before_lse[number], shape)
        assert_chosen_well(index_scores(work, number, q, bits), lse, chosen)
        kv = work.distant[number][:, LAYER].transpose(0, 1).flatten(1, 2).float()
        picked = torch.stack([kv[head, chosen[head]] for head in range(shape.kv)])
        scores = q @ picked[:, :, 0].transpose(1, 2) * work.model.scale
        recalled, recalled_lse = scores.softmax(-1) @ picked[:, :, 1], scores.logsumexp(-1)
        both = torch.logaddexp(lse, recalled_lse)
        out = by_kv_head(before[number], shape).float() * (lse - both).exp().unsqueeze(-1)
        out = out + recalled * (recalled_lse - both).exp().unsqueeze(-1)
        assert_close(by_kv_head(work.step.attended[number], shape), out, shape.dtype)
        assert_close(by_kv_head(work.step.lse[number], shape), both, shape.dtype)


def assert_chosen_well(scores: Tensor, lse: Tensor, chosen: Tensor) -> None:
    """Queries are rounded to 8 bits, so tokens whose mass is about that of the last chosen may go either way."""
    budget = chosen.shape[1]
    best = select(scores, lse, 1, budget)[:, 0]
    norm = torch.logaddexp(scores.logsumexp(-1), lse)
    mass = (scores - norm.unsqueeze(-1)).exp().sum(1)
    least = mass.gather(1, best).amin(1, keepdim=True)
    assert (mass.gather(1, chosen) >= least * 0.8).all()
    overlap = sum(len(set(a.tolist()) & set(b.tolist())) for a, b in zip(best, chosen, strict=True))
    assert overlap >= 0.85 * chosen.numel()


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[6], SHAPES[4]], ids=["bf16", "fp32", "d40"])
def test_a_query_gives_the_same_bits_alone_or_among_others_with_or_without_slots(shape: Shape) -> None:
    together = case(shape, groups=[5, 4], queries=[3, 1], budget=16)
    together.run()
    for row, number, query in [(0, 0, 0), (1, 0, 1), (2, 0, 2), (3, 1, 0)]:
        sequence = together.sequences[number]
        assert sequence.recall is not None
        slots = torch.arange(2 * shape.layers * shape.kv, dtype=torch.int32).view(-1, 1)
        spare = slots.clone()
        arena = torch.cat([together.arena, torch.zeros(slots.numel(), *together.arena.shape[1:]).to(shape.dtype)])
        spare += together.arena.shape[0]
        recall = cpu.StepRecall(
            sequence.recall.codes,
            sequence.recall.params,
            sequence.recall.bits,
            sequence.recall.groups,
            16,
            spare,
            nothing_resident(shape, 16),
            torch.zeros(3, dtype=torch.int64),
        )
        step = together.model.step(arena)
        alone = cpu.StepSequence(sequence.table, NEAR + query, 1, 0, sequence.window_start, recall=recall)
        step.begin(torch.tensor([NEAR + query]), [alone])
        step.q.copy_(together.step.q[row : row + 1])
        for _ in range(2):
            together.model.kernels.attend(LAYER, step)
            together.model.kernels.recall(LAYER, step)
            assert torch.equal(step.attended[0], together.step.attended[row])
            assert torch.equal(step.lse[0], together.step.lse[row])


def test_only_the_difference_between_two_choices_is_fetched() -> None:
    shape = SHAPES[1]
    work = case(shape, groups=[8], queries=[1], budget=32, with_slots=True)
    recall = work.sequences[0].recall
    assert recall is not None
    assert recall.resident is not None
    work.run()
    pair_bytes = 2 * shape.dim * 2
    assert recall.counters.tolist() == [96, 0, 96 * pair_bytes]
    # What is resident isn't read from the host again.
    wanted = work.step.attended.clone()
    host = work.distant[0].clone()
    work.distant[0].fill_(math.nan)
    work.run()
    assert recall.counters.tolist() == [192, 96, 96 * pair_bytes]
    assert torch.equal(work.step.attended, wanted)
    work.distant[0].copy_(host)
    before = [set(head.tolist()) for head in recall.resident[LAYER, :, 0]]
    work.step.q.add_(work.model.randn(*work.step.q.shape).to(shape.dtype))
    work.run()
    after = [set(head.tolist()) for head in recall.resident[LAYER, :, 0]]
    found = sum(len(a & b) for a, b in zip(before, after, strict=True))
    assert 0 < found < 96
    assert recall.counters.tolist() == [288, 96 + found, (192 - found) * pair_bytes]


def test_what_is_recalled_comes_from_the_host_and_stays_on_the_device() -> None:
    shape = SHAPES[1]
    work = case(shape, groups=[8], queries=[1], budget=16, with_slots=True)
    recall = work.sequences[0].recall
    assert recall is not None
    assert recall.slots is not None
    work.run()
    good = work.step.attended.clone()
    keys = work.arena[recall.slots.long()]
    work.distant[0].neg_()
    work.run()
    assert torch.equal(work.step.attended, good), "host memory isn't read while the slots hold the choice"
    work.arena[recall.slots.long()] = -keys
    work.run()
    assert not torch.equal(work.step.attended, good), "the slots are"


def test_all_distant_tokens_are_recalled_where_the_budget_holds_them() -> None:
    shape = SHAPES[6]
    work = case(shape, groups=[1], queries=[1], budget=128, with_slots=True)
    before, lse = near(work)
    work.run()
    kv = work.distant[0][:, LAYER].transpose(0, 1).flatten(1, 2)
    q = by_kv_head(work.step.q[0], shape)
    scores = q @ kv[:, :, 0].transpose(1, 2) * work.model.scale
    old = by_kv_head(lse[0], shape)
    both = torch.logaddexp(old, scores.logsumexp(-1))
    out = by_kv_head(before[0], shape) * (old - both).exp().unsqueeze(-1)
    out = out + (scores - both.unsqueeze(-1)).exp() @ kv[:, :, 1]
    assert_close(by_kv_head(work.step.attended[0], shape), out, shape.dtype)


def test_loud_queries_and_equal_keys_stay_finite() -> None:
    loud = case(SHAPES[1], groups=[4], queries=[2], loudness=1000.0)
    loud.run()
    assert loud.step.attended.isfinite().all()
    equal = case(SHAPES[1], groups=[40], queries=[1], budget=16, with_slots=True)
    equal.step.q.zero_()
    equal.run()
    recall = equal.sequences[0].recall
    assert recall is not None
    assert recall.resident is not None
    assert recall.resident[LAYER, :, 0].tolist() == [list(range(16))] * 3, "of equals, the first"


def test_queries_that_are_no_numbers_crash_nothing() -> None:
    work = case(SHAPES[1], groups=[40], queries=[1], budget=16, with_slots=True)
    work.step.q.fill_(math.nan)
    work.run()
    recall = work.sequences[0].recall
    assert recall is not None
    assert recall.resident is not None
    assert recall.resident[LAYER, :, 0].tolist() == [list(range(16))] * 3


@pytest.mark.parametrize("change", ["bits", "budget", "slots", "groups"])
def test_a_recall_that_fits_nothing_is_refused(change: str) -> None:
    shape = SHAPES[1]
    work = case(shape, groups=[2], queries=[2])
    sequence = work.sequences[0]
    recall = sequence.recall
    assert recall is not None
    groups = None
    match change:
        case "bits":
            recall, match = replaced(recall, bits=3), "must be 1, 2, 4 or 8"
        case "budget":
            recall, match = replaced(recall, budget=17), "multiple of 16"
        case "slots":
            slots = torch.zeros(12, 1, dtype=torch.int32)
            recall, match = replaced(recall, slots=slots, resident=nothing_resident(shape, 16)), "one query"
        case _:
            groups, match = recall.groups, "recalls nothing"
    again = cpu.StepSequence(sequence.table, NEAR, 2, 0, sequence.window_start, groups, recall)
    with pytest.raises(ValueError, match=match):
        work.step.begin(torch.arange(2), [again])


def replaced(recall: cpu.StepRecall, **changes: object) -> cpu.StepRecall:
    fields = {name: getattr(recall, name) for name in cpu.StepRecall.__slots__}
    return cpu.StepRecall(**{**fields, **changes})


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [8, 40, 64, 128])
def test_codes_of_keys_equal_those_of_torch_bit_for_bit(bits: int, dtype: torch.dtype, dim: int) -> None:
    rng = torch.Generator().manual_seed(bits * dim)
    keys = (torch.randn(5, GROUP_TOKENS, dim, generator=rng) * 3).to(dtype)
    keys[1] = keys[1, :1]
    keys[2, :, 0] = 0
    for ours, expected in zip(cpu.encode_keys(keys, bits), key_index.encode(keys, bits), strict=True):
        assert torch.equal(ours, expected)


def test_keys_that_make_no_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="must be 1, 2, 4 or 8"):
        cpu.encode_keys(torch.zeros(1, 63, 64), 2)
