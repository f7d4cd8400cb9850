"""What the package of Triton kernels does without Triton, without a GPU, and before kernels are loaded."""

from __future__ import annotations

import os
import subprocess
import sys

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # as if it weren't installed
import torch
import kvservice.cli.main, kvservice.engine, kvservice.models.loader
from kvservice.kernels import triton
assert not triton.is_installed()
assert not triton.can_run(torch.device("cpu")) and not triton.can_run(torch.device("cuda"))
assert not [name for name in sys.modules if name.startswith("kvservice.kernels.triton.")]
"""

TOO_LATE = """
import kvservice.kernels.triton.norm
from kvservice.kernels import triton
try:
    triton.use_interpreter()
except RuntimeError as error:
    assert "before it is imported" in str(error), error
else:
    raise AssertionError("compiled kernels can't become interpreted ones")
"""


def run(program: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_everything_loads_without_triton() -> None:
    run(WITHOUT_TRITON)


def test_compiled_kernels_do_not_become_interpreted_ones() -> None:
    run(TOO_LATE)
