"""Codecs: lossless ones give back every bit, lossy ones stay within half a step, and damage is found."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvservice.errors import CorruptFrame
from kvservice.tier import codecs
from kvservice.tier.groups import layer_memory
from kvservice.tier.header import FrameHeader, FrameRole
from kvservice.types import SessionId


def header_of(groups: torch.Tensor, codec: str, role: FrameRole = FrameRole.KV) -> FrameHeader:
    dtype = str(groups.dtype).removeprefix("torch.")
    return FrameHeader(
        bytes(16), SessionId("s"), bytes(16), 0, role, bytes(16), 16, 80, tuple(groups.shape), dtype, codec
    )


def through(groups: torch.Tensor, codec: str, role: FrameRole = FrameRole.KV) -> tuple[torch.Tensor, bytes]:
    header = header_of(groups, codec, role)
    stored = b"".join(map(bytes, codecs.encode(header, layer_memory(groups))))
    out = torch.zeros_like(groups)
    codecs.decode(header, memoryview(stored), layer_memory(out))
    return out, stored


def random_kv(dtype: torch.dtype = torch.bfloat16, num_groups: int = 3) -> torch.Tensor:
    return torch.randn(num_groups, 2, 64, 2, 16, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("codec", ["raw", "zstd"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lossless_codecs_give_back_every_bit(codec, dtype):
    groups = random_kv(dtype)
    groups[0, 0, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    out, stored = through(groups, codec)
    assert torch.equal(out.view(torch.uint8), groups.view(torch.uint8))
    assert codec == "raw" or len(stored) < groups.nbytes


@pytest.mark.parametrize(("codec", "steps"), [("values8", 255), ("values4", 15)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_are_half_a_step_off_at_most_and_keys_not_at_all(codec, steps, dtype):
    groups = random_kv(dtype)
    out, stored = through(groups, codec)
    assert torch.equal(out[..., 0, :], groups[..., 0, :])
    values = groups[..., 1, :].float()
    step = (values.amax(-1) - values.amin(-1)) / steps
    rounding = values.abs().amax(-1) * 2.0**-8 if dtype == torch.bfloat16 else values.abs().amax(-1) * 2.0**-10
    assert ((out[..., 1, :].float() - values).abs().amax(-1) <= step / 2 + rounding).all()
    name = str(dtype).removeprefix("torch.")
    assert len(stored) == codecs.expected_bytes(codec, FrameRole.KV, tuple(groups.shape), name)


def test_values_alone_are_coded_as_well():
    values = random_kv()[..., 1, :].contiguous()
    out, stored = through(values, "values8", FrameRole.VALUE)
    assert len(stored) == codecs.expected_bytes("values8", FrameRole.VALUE, tuple(values.shape), "bfloat16")
    assert (out - values).abs().max() < 0.05


@pytest.mark.parametrize("codec", ["values8", "values4"])
def test_rows_of_equal_values_come_back_as_they_are(codec):
    groups = torch.full((1, 1, 64, 2, 16), 3.5, dtype=torch.bfloat16)
    assert torch.equal(through(groups, codec)[0], groups)


@pytest.mark.parametrize("codec", ["zstd", "values8", "values4"])
@given(cut=st.integers(1, 500))
def test_cut_payloads_are_refused(codec, cut):
    groups = random_kv()
    header = header_of(groups, codec)
    stored = b"".join(map(bytes, codecs.encode(header, layer_memory(groups))))
    with pytest.raises(CorruptFrame):
        codecs.decode(header, memoryview(stored)[:-cut], layer_memory(torch.zeros_like(groups)))


@pytest.mark.parametrize(
    ("scale", "least"), [(-3e38, 0.0), (3e38, 0.0), (1e36, 3.4e38), (float("nan"), 0.0), (-1.0, 5.0)]
)
def test_scales_that_no_values_have_are_refused(scale, least):
    values = random_kv()[..., 1:, :].contiguous()
    header = header_of(values, "values8", FrameRole.VALUE)
    stored = bytearray(b"".join(map(bytes, codecs.encode(header, layer_memory(values)))))
    rows = values.numel() // values.shape[-1]
    stored[:4] = struct.pack("<f", scale)
    stored[4 * rows : 4 * rows + 4] = struct.pack("<f", least)
    with pytest.raises(CorruptFrame):
        codecs.decode(header, memoryview(bytes(stored)), layer_memory(torch.zeros_like(values)))


def test_zstd_that_unpacks_to_more_than_it_should_is_refused():
    groups = random_kv()
    header = header_of(groups, "zstd")
    bomb = codecs.zstd.compress(bytes(1 << 20))
    rest = bytes(groups.nbytes // 2)
    with pytest.raises(CorruptFrame):
        codecs.decode(header, memoryview(rest + bomb), layer_memory(groups))


def test_memory_of_another_size_is_refused():
    groups = random_kv()
    header = header_of(groups, "raw")
    with pytest.raises(CorruptFrame):
        codecs.decode(header, memoryview(bytes(groups.nbytes)), layer_memory(groups)[:-1])


def test_what_has_no_values_stays_raw():
    assert codecs.codec_for("values8", FrameRole.SHARED_KEY) == "raw"
    assert codecs.codec_for("zstd", FrameRole.SHARED_KEY) == "zstd"
    assert codecs.codec_for("values8", FrameRole.VALUE) == "values8"
