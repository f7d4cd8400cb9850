"""Every instruction set of the CPU kernels against torch, and against itself where bits must not differ."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kvservice.kernels import cpu, reference
from kvservice.kernels.cpu.library import LIBRARY_FILE
from kvservice.kv.partial import AttnPartial, merge_partials

pytestmark = pytest.mark.skipif(
    not LIBRARY_FILE.exists() and shutil.which("g++") is None and shutil.which("c++") is None,
    reason="the CPU kernels aren't built, and there is no C++ compiler to build them",
)

# A bf16 result is rounded to 8 bits; an fp32 one differs by the order of additions.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 2e-5}
DTYPES = [torch.bfloat16, torch.float32]
EPS = 1e-5


@pytest.fixture(params=["amx", "avx512", "avx2"], autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    assert LIBRARY_FILE.exists(), "the CPU kernels aren't built: run `make kernels`"
    cpu.limit_isa(request.param)
    if cpu.isa() != request.param:
        pytest.skip(f"this machine or compiler has no {request.param}")
    cpu.set_threads(2)
    yield request.param
    cpu.limit_isa(cpu.ISAS[0])


@dataclass(frozen=True)
class Shape:
    hidden: int
    intermediate: int
    heads: int
    kv: int
    dim: int
    rotary: int
    dtype: torch.dtype
    with_biases: bool = False
    with_head_norms: bool = False
    layers: int = 2


SHAPES = [
    Shape(64, 96, 3, 1, 32, 32, torch.bfloat16),
    Shape(192, 160, 9, 3, 64, 64, torch.bfloat16, with_biases=True),
    Shape(96, 64, 8, 1, 128, 64, torch.bfloat16, with_head_norms=True),
    Shape(40, 56, 4, 4, 8, 8, torch.bfloat16),
    Shape(72, 88, 6, 2, 40, 24, torch.bfloat16, with_biases=True, with_head_norms=True),
    Shape(33, 47, 2, 1, 24, 24, torch.float32, with_biases=True),
    Shape(192, 160, 9, 3, 64, 64, torch.float32, with_head_norms=True),
    Shape(64, 64, 20, 1, 96, 96, torch.bfloat16),
]
IDS = [f"h{s.heads}kv{s.kv}d{s.dim}{'bf16' if s.dtype is torch.bfloat16 else 'fp32'}" for s in SHAPES]


@dataclass(frozen=True)
class Layer:
    norm1: Tensor
    qkv: Tensor
    o: Tensor
    norm2: Tensor
    gate_up: Tensor
    down: Tensor
    qkv_bias: Tensor | None
    o_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None


class Model:
    """Random layers, an arena and sequences whose tables name its blocks in random order."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        self.shape = shape
        self.rng = torch.Generator().manual_seed(seed)
        self.layers = [self._layer() for _ in range(shape.layers)]
        self.kernels = cpu.DecoderLayers(self.layers, shape.heads, shape.kv, shape.dim, EPS)
        angles = torch.outer(torch.arange(4096.0), 1e4 ** (-torch.arange(0, shape.rotary, 2) / shape.rotary))
        self.cos, self.sin = angles.cos(), angles.sin()
        self.scale = shape.dim**-0.5

    def randn(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.rng)

    def weights(self, out: int, width: int) -> Tensor:
        return (self.randn(out, width) / math.sqrt(width)).to(self.shape.dtype)

    def _layer(self) -> Layer:
        s, dtype = self.shape, self.shape.dtype
        width = (s.heads + 2 * s.kv) * s.dim
        return Layer(
            norm1=(1 + 0.1 * self.randn(s.hidden)).to(dtype),
            qkv=self.weights(width, s.hidden),
            o=self.weights(s.hidden, s.heads * s.dim),
            norm2=(1 + 0.1 * self.randn(s.hidden)).to(dtype),
            gate_up=self.weights(2 * s.intermediate, s.hidden),
            down=self.weights(s.hidden, s.intermediate),
            qkv_bias=self.randn(width).to(dtype) if s.with_biases else None,
            o_bias=self.randn(s.hidden).to(dtype) if s.with_biases else None,
            q_norm=(1 + 0.1 * self.randn(s.dim)).to(dtype) if s.with_head_norms else None,
            k_norm=(1 + 0.1 * self.randn(s.dim)).to(dtype) if s.with_head_norms else None,
        )

    def arena(self, num_blocks: int) -> Tensor:
        # What nobody wrote must not show: in real memory it may be anything.
        return torch.full((num_blocks, 16, self.shape.dim), math.nan, dtype=self.shape.dtype)

    def tables(self, lengths: list[int]) -> tuple[list[Tensor], int]:
        cells = 2 * self.shape.layers * self.shape.kv
        columns = [-(-length // 16) + 1 for length in lengths]
        order = torch.randperm(cells * sum(columns), generator=self.rng).to(torch.int32)
        return [part.view(cells, -1) for part in order.split([cells * c for c in columns])], order.numel()

    def begin(self, step: cpu.Step, chunks: list[tuple[Tensor, int, int]], window_start: int = 16) -> None:
        """chunks: (table, tokens in the arena, new tokens) of each sequence."""
        sequences, positions, row = [], [], 0
        for table, resident, count in chunks:
            sequences.append(cpu.StepSequence(table, resident, count, row, window_start))
            local = torch.arange(resident, resident + count)
            positions.append(torch.where(local < 16, local, local + window_start - 16))
            row += count
        step.begin(torch.cat(positions), sequences)

    def step(self, arena: Tensor, max_rows: int = 1024, *, uniform: bool = True) -> cpu.Step:
        return cpu.Step(self.kernels, max_rows, arena, self.cos, self.sin, self.scale, uniform=uniform)

    # The same in torch, in fp32, from one sequence's embeddings.

    def qkv(self, layer: Layer, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s = self.shape
        normed = F.rms_norm(x, (s.hidden,), layer.norm1.float(), EPS)
        qkv = F.linear(normed, layer.qkv.float(), None if layer.qkv_bias is None else layer.qkv_bias.float())
        q, k, v = qkv.view(-1, s.heads + 2 * s.kv, s.dim).split([s.heads, s.kv, s.kv], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = F.rms_norm(q, (s.dim,), layer.q_norm.float(), EPS)
            k = F.rms_norm(k, (s.dim,), layer.k_norm.float(), EPS)
        cos, sin = self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)

        def rotate(heads: Tensor) -> Tensor:
            a, b = heads[..., : s.rotary].chunk(2, dim=-1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin, heads[..., s.rotary :]], dim=-1)

        return rotate(q), rotate(k), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, num_before: int) -> AttnPartial:
        """q `[m, h, d]`, k and v `[t, kv, d]`; query i sees the first num_before + i + 1. Out `[m, h, d]`."""
        s, m, t = self.shape, q.shape[0], k.shape[0]
        mask = torch.zeros(m, t).masked_fill(torch.arange(t) > num_before + torch.arange(m).unsqueeze(1), -math.inf)
        group = s.heads // s.kv
        rows = q.view(m, s.kv, group, s.dim).transpose(0, 1).reshape(s.kv, m * group, s.dim)
        part = reference.attend(
            rows, k.transpose(0, 1), v.transpose(0, 1), self.scale, mask.repeat_interleave(group, dim=0)
        )
        out = part.out.view(s.kv, m, group, s.dim).transpose(0, 1).reshape(m, s.heads, s.dim)
        return AttnPartial(out, part.lse.view(s.kv, m, group).transpose(0, 1).reshape(m, s.heads))

    def post(self, layer: Layer, x: Tensor, attended: Tensor) -> Tensor:
        s = self.shape
        x = x + F.linear(
            attended.reshape(-1, s.heads * s.dim),
            layer.o.float(),
            None if layer.o_bias is None else layer.o_bias.float(),
        )
        normed = F.rms_norm(x, (s.hidden,), layer.norm2.float(), EPS)
        gate, up = F.linear(normed, layer.gate_up.float()).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * up, layer.down.float())

    def reference_run(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            q, k, v = self.qkv(layer, x, torch.arange(x.shape[0]))
            x = self.post(layer, x, self.attend(q, k, v, 0).out)
        return x


def assert_close(ours: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """By the largest difference, as a fraction of the largest number."""
    assert ours.shape == expected.shape
    if expected.numel() == 0:
        return
    assert ours.isfinite().all()
    error = (ours.float() - expected.float()).abs().max() / expected.float().abs().max()
    assert error <= TOLERANCE[dtype], f"off by {error:.1e} of the largest number"


class TestLinear:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("rows", "width", "out"),
        [(0, 32, 32), (1, 64, 960), (3, 576, 48), (7, 33, 50), (16, 96, 31), (17, 40, 130), (33, 1, 1), (300, 100, 70)],
    )
    def test_product_equals_torch(self, dtype: torch.dtype, rows: int, width: int, out: int) -> None:
        rng = torch.Generator().manual_seed(rows)
        weight = torch.randn(out, width, generator=rng).to(dtype)
        x, bias = torch.randn(rows, width, generator=rng).to(dtype), torch.randn(out, generator=rng)
        expected = (x.double() @ weight.double().T).float()
        assert_close(cpu.PackedLinear(weight)(x), expected, dtype)
        assert_close(cpu.PackedLinear(weight, bias)(x, torch.float32), expected + bias, torch.float32)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("out", [16, 47, 160])
    def test_a_gated_pair_is_silu_of_the_gate_times_up(self, dtype: torch.dtype, out: int) -> None:
        rng = torch.Generator().manual_seed(out)
        weight, x = torch.randn(2 * out, 72, generator=rng).to(dtype), torch.randn(9, 72, generator=rng).to(dtype)
        gate, up = (x.float() @ weight.float().T).chunk(2, dim=-1)
        assert_close(cpu.PackedLinear(weight, is_gated=True)(x), F.silu(gate) * up, dtype)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_row_depends_on_neither_its_place_nor_the_other_rows_nor_the_threads(self, dtype: torch.dtype) -> None:
        rng = torch.Generator().manual_seed(5)
        linear = cpu.PackedLinear(torch.randn(200, 336, generator=rng).to(dtype))
        x = torch.randn(600, 336, generator=rng).to(dtype)
        whole = linear(x, torch.float32)
        for rows in (1, 2, 5, 16, 21, 40, 299):
            for start in (0, 3, 300):
                assert torch.equal(linear(x[start : start + rows], torch.float32), whole[start : start + rows])
        for threads in (1, 3):
            cpu.set_threads(threads)
            assert torch.equal(linear(x, torch.float32), whole)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_the_head_norms_the_wanted_rows_and_multiplies(self, dtype: torch.dtype) -> None:
        rng = torch.Generator().manual_seed(6)
        weight = torch.randn(90, 50, generator=rng).to(dtype)
        x, norm, rows = torch.randn(20, 50, generator=rng), torch.rand(50, generator=rng), torch.tensor([19, 0, 7])
        expected = F.rms_norm(x, (50,), norm, EPS)[rows] @ weight.float().T
        assert_close(cpu.PackedLinear(weight).of_normed(x, norm, EPS, rows), expected, dtype)

    def test_nan_stays_nan(self) -> None:
        x = torch.ones(2, 32, dtype=torch.bfloat16)
        x[1, 3] = math.nan
        out = cpu.PackedLinear(torch.ones(8, 32, dtype=torch.bfloat16))(x)
        assert out[0].eq(32).all()
        assert out[1].isnan().all()

    def test_wrong_tensors_are_refused(self) -> None:
        with pytest.raises(ValueError, match="float16"):
            cpu.PackedLinear(torch.ones(4, 4, dtype=torch.float16))
        linear = cpu.PackedLinear(torch.ones(4, 8))
        with pytest.raises(ValueError, match="x is "):
            linear(torch.ones(2, 9))
        with pytest.raises(ValueError, match="not contiguous"):
            linear(torch.ones(8, 2).T)


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
class TestLayers:
    def test_a_prompt_runs_as_in_torch(self, shape: Shape) -> None:
        model = Model(shape)
        x = model.randn(150, shape.hidden)
        assert_close(_run_in_chunks(model, x, [150]), model.reference_run(x), shape.dtype)

    def test_chunks_and_single_tokens_give_the_same_bits(self, shape: Shape) -> None:
        model = Model(shape, seed=1)
        # Crosses a split, at 16 + 64 * 8 - 64 = 464 tokens.
        x = model.randn(500, shape.hidden)
        whole = _run_in_chunks(model, x, [500])
        assert torch.equal(_run_in_chunks(model, x, [1, 2, 30, 31, 400, *[1] * 36]), whole)
        for threads in (1, 3):
            cpu.set_threads(threads)
            assert torch.equal(_run_in_chunks(model, x, [463, 1, 36]), whole)

    def test_sequences_of_a_batch_give_the_bits_they_give_alone(self, shape: Shape) -> None:
        model = Model(shape, seed=2)
        lengths = [(0, 1), (5, 3), (100, 1), (0, 70), (600, 1), (15, 1), (16, 2), (520, 30)]
        tables, blocks = model.tables([a + b for a, b in lengths])
        arena = model.arena(blocks)
        step = model.step(arena)
        chunks = [(table, a, b) for table, (a, b) in zip(tables, lengths, strict=True)]
        for table, resident, _ in chunks:
            if resident:
                model.begin(step, [(table, 0, resident)])
                step.x.copy_(model.randn(resident, shape.hidden))
                model.kernels.run(step, range(model.kernels.num_layers))
        x = model.randn(sum(b for _, b in lengths), shape.hidden)
        model.begin(step, chunks)
        step.x.copy_(x)
        model.kernels.run(step, range(model.kernels.num_layers))
        together = step.x.clone()
        row = 0
        for chunk in chunks:
            model.begin(step, [chunk])
            step.x.copy_(x[row : row + chunk[2]])
            model.kernels.run(step, range(model.kernels.num_layers))
            assert torch.equal(step.x, together[row : row + chunk[2]])
            row += chunk[2]

    def test_pre_writes_queries_keys_and_values(self, shape: Shape) -> None:
        model = Model(shape, seed=3)
        (first, second), blocks = model.tables([40, 7])
        arena = model.arena(blocks)
        step = model.step(arena)
        model.begin(step, [(first, 0, 40), (second, 0, 7)])
        x = model.randn(47, shape.hidden)
        step.x.copy_(x)
        model.kernels.pre(1, step)
        for table, rows in ((first, slice(0, 40)), (second, slice(40, 47))):
            count = rows.stop - rows.start
            q, k, v = model.qkv(model.layers[1], x[rows], torch.arange(count))
            assert_close(step.q[rows], q, shape.dtype)
            keys, values = _read(arena, table, shape, layer=1, count=count)
            assert_close(keys, k, shape.dtype)
            assert_close(values, v, shape.dtype)

    def test_attention_and_its_lse_equal_the_reference(self, shape: Shape) -> None:
        model = Model(shape, seed=4)
        lengths = [(1300, 1), (0, 1), (30, 100), (700, 3), (15, 1), (79, 2)]
        step, cached = _with_random_kv(model, lengths, window_start=16)
        model.kernels.attend(0, step)
        _assert_attends(model, step, cached, lengths)

    def test_a_window_that_has_slid_attends_to_the_same_tokens(self, shape: Shape) -> None:
        model = Model(shape, seed=5)
        lengths = [(900, 1), (16, 40), (200, 2)]
        step, cached = _with_random_kv(model, lengths, window_start=16 + 64 * 5)
        model.kernels.attend(0, step)
        _assert_attends(model, step, cached, lengths)

    def test_parts_merge_to_the_attention_over_all(self, shape: Shape) -> None:
        model = Model(shape, seed=6)
        lengths = [(100, 1), (20, 60), (3, 2)]
        step, cached = _with_random_kv(model, lengths, window_start=16)
        model.kernels.attend(0, step)
        sizes = [[700, 0], [64, 33], [1, 600]]
        outs, lses = [step.attended], [step.lse]
        expected = []
        parts_of = [
            [model.randn(shape.kv, max(t, 1), 2, shape.dim).to(shape.dtype)[:, :t] for t in counts] for counts in sizes
        ]
        starts = [0, 1, 61]
        for place in range(2):
            out, lse = torch.full_like(step.attended, math.nan), torch.full_like(step.lse, -math.inf)
            parts = [
                cpu.Part(part[place][:, :, 0], part[place][:, :, 1], count, start)
                for part, (_, count), start in zip(parts_of, lengths, starts, strict=True)
            ]
            # The last sequence has no second part.
            model.kernels.attend_parts(parts[: 3 - place], step, out, lse)
            outs.append(out)
            lses.append(lse)
        for (keys, values), pair, (resident, count), start in zip(cached, parts_of, lengths, starts, strict=True):
            q = step.q[start : start + count].float()
            merged = [model.attend(q, keys.float(), values.float(), resident)]
            for part in pair[: 1 if start == 61 else 2]:
                k, v = part[:, :, 0].transpose(0, 1).float(), part[:, :, 1].transpose(0, 1).float()
                if k.shape[0]:
                    merged.append(model.attend(q, k, v, k.shape[0]))
            lse = torch.stack([part.lse for part in merged]).logsumexp(0)
            expected.append(AttnPartial(merge_partials(merged), lse))
        cpu.merge(outs, lses)
        assert_close(step.attended, torch.cat([part.out for part in expected]), shape.dtype)
        assert_close(step.lse, torch.cat([part.lse for part in expected]), shape.dtype)


def test_a_row_that_saw_nothing_has_no_mass() -> None:
    model = Model(SHAPES[0])
    step, _ = _with_random_kv(model, [(3, 1)], window_start=16)
    out, lse = torch.full_like(step.attended, math.nan), torch.zeros_like(step.lse)
    nothing = torch.empty(1, 0, 32, dtype=torch.bfloat16)
    model.kernels.attend_parts([cpu.Part(nothing, nothing, 1, 0)], step, out, lse)
    assert out.eq(0).all()
    assert lse.eq(-math.inf).all()
    cpu.merge([out, out.clone()], [lse, lse.clone()])
    assert out.eq(0).all()
    assert lse.eq(-math.inf).all()


@pytest.mark.parametrize("tiles_gone", [0, 5, 20])
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_few_queries_attend_as_many_do(shape: Shape, tiles_gone: int) -> None:
    model = Model(shape)
    lengths = [(0, 1), (15, 1), (16, 1), (47, 1), (700, 1), (333, 4), (90, 2)]
    if tiles_gone:
        lengths = lengths[2:]  # a window that has moved leaves all sinks behind
    step, cached = _with_random_kv(model, lengths, window_start=16 + 64 * tiles_gone, uniform=False)
    model.kernels.attend(0, step)
    _assert_attends(model, step, cached, lengths)
    first = step.attended.clone()
    model.kernels.attend(0, step)
    assert torch.equal(step.attended, first)


@pytest.mark.parametrize("factor", [4, 100])
@pytest.mark.parametrize("uniform", [False, True])
def test_large_scores_stay_finite_and_right(uniform: bool, factor: int) -> None:
    model = Model(SHAPES[1])
    step, cached = _with_random_kv(model, [(600, 40), (600, 1)], window_start=16, uniform=uniform)
    step.q.mul_(factor)
    model.kernels.attend(0, step)
    _assert_attends(model, step, cached, [(600, 40), (600, 1)])


def test_a_step_that_does_not_fit_is_refused() -> None:
    model = Model(SHAPES[0])
    (table,), blocks = model.tables([40])
    step = model.step(model.arena(blocks), max_rows=32)
    with pytest.raises(ValueError, match="at most 32"):
        model.begin(step, [(table, 0, 33)])
    with pytest.raises(ValueError, match="in order"):
        step.begin(torch.arange(2), [cpu.StepSequence(table, 0, 1, 0, 16)])
    with pytest.raises(ValueError, match=r"torch.int32 \(4, 7 or more\)"):
        model.begin(step, [(table, 100, 1)])
    with pytest.raises(ValueError, match=r"\[0, 4096\)"):
        step.begin(torch.tensor([5000]), [cpu.StepSequence(table, 0, 1, 0, 16)])


def _run_in_chunks(model: Model, x: Tensor, counts: list[int]) -> Tensor:
    assert sum(counts) == x.shape[0]
    (table,), blocks = model.tables([x.shape[0]])
    step = model.step(model.arena(blocks))
    outs, start = [], 0
    for count in counts:
        model.begin(step, [(table, start, count)])
        step.x.copy_(x[start : start + count])
        model.kernels.run(step, range(model.kernels.num_layers))
        outs.append(step.x.clone())
        start += count
    return torch.cat(outs)


def _read(arena: Tensor, table: Tensor, shape: Shape, layer: int, count: int) -> tuple[Tensor, Tensor]:
    """K and V of a sequence's tokens, `[t, kv, d]` each."""
    rows = table.view(shape.layers, 2, shape.kv, -1)[layer].long()
    cells = arena[rows].flatten(2, 3)[:, :, :count]
    return cells[0].transpose(0, 1), cells[1].transpose(0, 1)


def _with_random_kv(
    model: Model, lengths: list[tuple[int, int]], window_start: int, *, uniform: bool = True
) -> tuple[cpu.Step, list[tuple[Tensor, Tensor]]]:
    """A begun step with random queries, whose sequences' tokens all lie in layer 0; K and V of each."""
    shape = model.shape
    tables, blocks = model.tables([a + b for a, b in lengths])
    arena = model.arena(blocks)
    cached = []
    for table, (resident, count) in zip(tables, lengths, strict=True):
        total = resident + count
        for token in range(total):
            slots = table.view(shape.layers, 2, shape.kv, -1)[0, :, :, token // 16].long()
            arena[slots.reshape(-1), token % 16] = model.randn(2 * shape.kv, shape.dim).to(shape.dtype)
        cached.append(_read(arena, table, shape, 0, total))
    step = model.step(arena, uniform=uniform)
    chunks = [(table, a, b) for table, (a, b) in zip(tables, lengths, strict=True)]
    model.begin(step, chunks, window_start)
    step.q.copy_(model.randn(*step.q.shape))
    return step, cached


def _assert_attends(
    model: Model, step: cpu.Step, cached: list[tuple[Tensor, Tensor]], lengths: list[tuple[int, int]]
) -> None:
    row = 0
    for (keys, values), (resident, count) in zip(cached, lengths, strict=True):
        rows = slice(row, row + count)
        expected = model.attend(step.q[rows].float(), keys.float(), values.float(), resident)
        assert_close(step.attended[rows], expected.out, model.shape.dtype)
        assert_close(step.lse[rows], expected.lse, model.shape.dtype)
        row += count
