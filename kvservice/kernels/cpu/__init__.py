"""CPU kernels in C++: packed linears, the halves of a decoder layer, attention over paged and contiguous KV.

This side checks tensors and hands their addresses over; it knows nothing of models, memory or scheduling. `isa()` is
"none" where the library isn't built or the machine is too old for it: then use torch.

A row's result depends on that row alone, bit for bit: not on how many rows a step has, on their order, or on the
number of threads; and where a `Step` is uniform, not on how a sequence's tokens were split into steps either. It does
depend on the instruction set.
"""

from __future__ import annotations

from kvservice.kernels.cpu.held import PACKED_TOKENS, HeldPart, PackedPart, attend_held
from kvservice.kernels.cpu.keys import encode_keys
from kvservice.kernels.cpu.layers import DecoderLayers, LayerTensors, Part
from kvservice.kernels.cpu.library import ISAS
from kvservice.kernels.cpu.linear import PackedLinear
from kvservice.kernels.cpu.partial import merge
from kvservice.kernels.cpu.runtime import (
    HEAD_DIM_STEP,
    empty_bytes,
    isa,
    limit_isa,
    num_threads,
    set_threads,
    set_waiting,
)
from kvservice.kernels.cpu.sampling import Draw, draw_tokens, highest
from kvservice.kernels.cpu.step import Step, StepRecall, StepSequence, StepSharing

__all__ = [
    "HEAD_DIM_STEP",
    "ISAS",
    "PACKED_TOKENS",
    "DecoderLayers",
    "Draw",
    "HeldPart",
    "LayerTensors",
    "PackedLinear",
    "PackedPart",
    "Part",
    "Step",
    "StepRecall",
    "StepSequence",
    "StepSharing",
    "attend_held",
    "draw_tokens",
    "empty_bytes",
    "encode_keys",
    "highest",
    "isa",
    "limit_isa",
    "merge",
    "num_threads",
    "set_threads",
    "set_waiting",
]
