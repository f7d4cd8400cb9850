"""Every Triton kernel compiles for a GPU. That needs none: Triton brings the assembler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvservice.kernels import triton

PROGRAM = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvservice.kernels.triton import gating, merge, norm, paged, rope, staged

POINTERS = {
    "arena": "*bf16", "delta": "*bf16", "gate_up": "*bf16", "out": "*bf16", "q": "*bf16", "qkv": "*bf16",
    "cos": "*fp32", "sin": "*fp32", "key_norm": "*fp32", "query_norm": "*fp32", "weight": "*fp32", "x": "*fp32",
    "lse": "*fp32", "lses": "*fp32", "outs": "*fp32",
    "addresses": "*i64", "positions": "*i64", "records": "*i64", "rows": "*i64", "sequence_of_row": "*i64",
    "spans": "*i64", "tiles": "*i64", "eps": "fp32", "scale": "fp32",
}
HEADS = {"HEADS": 32, "DIM": 128, "DIM_BLOCK": 128}
TILE = {**HEADS, "GROUP": 4, "TOKENS": 64, "UPCAST": False}
PAGED = {**TILE, "KV_HEADS": 8, "BLOCK_TOKENS": 16}
ROPE = {"HEADS": 32, "DIM": 128, "KV_HEADS": 8, "BLOCK": 64, "HEADS_AT_ONCE": 8, "BLOCK_TOKENS": 16}


def compile_for_gpu(kernel, constants, types=None):
    types = POINTERS | (types or {})
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["cubin"]
    assert "st.local" not in compiled.asm["ptx"], f"{kernel.__name__} spills registers"
    print(kernel.__name__)


compile_for_gpu(norm._add_rms_norm, {"BLOCK": 4096, "ADDS": True})
compile_for_gpu(gating._silu_mul, {"BLOCK": 1024})
compile_for_gpu(merge._merge, {**HEADS, "PARTS_BLOCK": 64})
compile_for_gpu(rope._rotate_and_store, {**ROPE, "NORMS": True})
compile_for_gpu(paged._attend, {**PAGED, "ROWS": 16, "SPLITS": 16}, {"out": "*fp32"})
compile_for_gpu(paged._attend, {**PAGED, "ROWS": 64, "SPLITS": 1})
compile_for_gpu(staged._stage, {"WORDS": 4096, "AT_ONCE": 1024}, {"staged": "*i64"})
compile_for_gpu(staged._attend_staged, {**TILE, "ROWS": 64}, {"staged": "*bf16"})
"""


@pytest.mark.slow
@pytest.mark.skipif(not triton.is_installed(), reason="Triton isn't installed: pip install 'kvservice[cuda]'")
def test_kernels_compile_for_a_gpu_and_keep_to_its_registers(tmp_path: Path) -> None:
    program = tmp_path / "compile_kernels.py"
    program.write_text(PROGRAM)
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, str(program)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 8
