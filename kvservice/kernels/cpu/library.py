"""The shared library of CPU kernels: where it is, its records and functions, as in `src/abi.h`. Knows no tensors."""

from __future__ import annotations

import ctypes
import functools
import os
from ctypes import POINTER, Structure, c_double, c_float, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path

LIBRARY_FILE = Path(__file__).with_name("libkvservice_cpu.so")
SOURCE_FOLDER = Path(__file__).with_name("src")
ISAS = ("amx", "avx512", "avx2", "none")
"""Instruction sets, the best first. The environment variable KVSERVICE_CPU_ISA caps what is used."""


class KvLinear(Structure):
    """A packed matrix."""

    _fields_ = (
        ("packed", c_void_p),
        ("bias", c_void_p),
        ("in_features", c_int32),
        ("out_features", c_int32),
        ("dtype", c_int32),
        ("is_gated", c_int32),
    )


class KvLayer(Structure):
    """A decoder layer's weights."""

    _fields_ = (
        ("qkv", KvLinear),
        ("o", KvLinear),
        ("gate_up", KvLinear),
        ("down", KvLinear),
        ("norm1", c_void_p),
        ("norm2", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("eps", c_float),
        ("num_heads", c_int32),
        ("num_kv", c_int32),
        ("head_dim", c_int32),
    )


class KvRecall(Structure):
    """What a sequence recalls from."""

    _fields_ = (
        ("codes", c_void_p),
        ("codes_stride", c_int64),
        ("params", c_void_p),
        ("params_stride", c_int64),
        ("groups", c_void_p),
        ("slots", c_void_p),
        ("slots_stride", c_int64),
        ("resident", c_void_p),
        ("counters", c_void_p),
        ("num_groups", c_int32),
        ("bits", c_int32),
        ("budget", c_int32),
    )


class KvSharing(Structure):
    """How a sequence shares distant keys between layers."""

    _fields_ = (
        ("cells", c_void_p),
        ("far_queries", c_void_p),
        ("chosen", c_void_p),
        ("key_slots", c_void_p),
        ("fetched", c_void_p),
        ("until_slide", c_int32),
    )


class KvSequence(Structure):
    """A sequence's share of a step."""

    _fields_ = (
        ("table", c_void_p),
        ("table_stride", c_int64),
        ("num_resident", c_int32),
        ("num_queries", c_int32),
        ("first_row", c_int32),
        ("window_start", c_int32),
        ("groups", c_void_p),
        ("num_groups", c_int32),
        ("recall", POINTER(KvRecall)),
        ("sharing", POINTER(KvSharing)),
    )


class KvPart(Structure):
    """Keys and values of a sequence outside the arena."""

    _fields_ = (
        ("keys", c_void_p),
        ("values", c_void_p),
        ("head_stride", c_int64),
        ("token_stride", c_int64),
        ("num_tokens", c_int32),
        ("num_queries", c_int32),
        ("first_row", c_int32),
    )


class KvStep(Structure):
    """What all layers of a step share."""

    _fields_ = (
        ("x", c_void_p),
        ("q", c_void_p),
        ("attended", c_void_p),
        ("lse", c_void_p),
        ("arena", c_void_p),
        ("sequences", POINTER(KvSequence)),
        ("positions", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("scale", c_float),
        ("rows", c_int32),
        ("num_sequences", c_int32),
        ("rotary_dim", c_int32),
        ("is_uniform", c_int32),
    )


class KvDraw(Structure):
    """How a row's token is drawn."""

    _fields_ = (
        ("draw", c_uint64),
        ("typical_p", c_double),
        ("top_p", c_double),
        ("min_p", c_double),
        ("temperature", c_float),
        ("top_k", c_int32),
    )


class KvHeld(Structure):
    """What each KV head of a sequence holds in one layer, and a query of it."""

    _fields_ = (
        ("queries", c_void_p),
        ("arena", c_void_p),
        ("table", c_void_p),
        ("table_stride", c_int64),
        ("visible", c_void_p),
        ("moves", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("codes", c_void_p),
        ("key_params", c_void_p),
        ("value_params", c_void_p),
        ("logits", c_void_p),
        ("weights", c_void_p),
        ("out", c_void_p),
        ("scale", c_float),
        ("num_kv", c_int32),
        ("group", c_int32),
        ("head_dim", c_int32),
        ("width", c_int32),
        ("num_groups", c_int32),
        ("bits", c_int32),
        ("dtype", c_int32),
    )


_PROTOTYPES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "kv_isa": (ctypes.c_char_p, ()),
    "kv_limit_isa": (None, (ctypes.c_char_p,)),
    "kv_num_threads": (c_int32, ()),
    "kv_set_threads": (None, (c_int32,)),
    "kv_set_waiting": (None, (c_int32, c_int32)),
    "kv_advise_huge": (None, (c_void_p, c_int64)),
    "kv_packed_bytes": (c_int64, (c_int32, c_int32, c_int32, c_int32)),
    "kv_pack": (None, (c_void_p, c_int32, c_int32, c_int32, c_int32, c_void_p)),
    "kv_linear": (None, (POINTER(KvLinear), c_void_p, c_int64, c_int32, c_void_p, c_int64, c_int32)),
    "kv_norm_linear": (None, (POINTER(KvLinear), c_void_p, c_float, c_void_p, c_void_p, c_int32, c_void_p)),
    "kv_rms_norm": (None, (c_void_p, c_void_p, c_float, c_int32, c_int32, c_void_p, c_int32)),
    "kv_layer_pre": (None, (POINTER(KvLayer), c_int32, POINTER(KvStep))),
    "kv_attend": (None, (POINTER(KvLayer), c_int32, POINTER(KvStep))),
    "kv_recall": (None, (POINTER(KvLayer), c_int32, POINTER(KvStep))),
    "kv_layer_post": (None, (POINTER(KvLayer), POINTER(KvStep))),
    "kv_layers": (None, (POINTER(KvLayer), c_int32, c_int32, POINTER(KvStep))),
    "kv_attend_parts": (None, (POINTER(KvLayer), POINTER(KvPart), c_int32, POINTER(KvStep))),
    "kv_attend_held": (None, (POINTER(KvHeld),)),
    "kv_encode_groups": (None, (c_void_p, c_int64, c_int64, c_int32, c_int32, c_int32, c_void_p, c_void_p)),
    "kv_highest": (None, (c_void_p, c_int64, c_int32, c_int32, c_void_p, c_void_p)),
    "kv_draw": (None, (c_void_p, c_int64, POINTER(KvDraw), c_int32, c_int32, c_void_p)),
    "kv_merge": (None, (POINTER(c_void_p), POINTER(c_void_p), c_int32, c_int64, c_int32, c_int32)),
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, or None where it isn't built. Calls release the interpreter's lock.

    Raises:
        ValueError: KVSERVICE_CPU_ISA names no instruction set.
    """
    wish = os.environ.get("KVSERVICE_CPU_ISA", ISAS[0])
    if wish not in ISAS:
        raise ValueError(f"KVSERVICE_CPU_ISA={wish!r}: must be one of {', '.join(ISAS)}")
    if not LIBRARY_FILE.exists():
        return None
    loaded = ctypes.CDLL(str(LIBRARY_FILE))
    for name, (result, arguments) in _PROTOTYPES.items():
        function = getattr(loaded, name)
        function.restype = result
        function.argtypes = arguments
    loaded.kv_limit_isa(wish.encode())
    return loaded
