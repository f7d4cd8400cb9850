import subprocess
import sys

import pytest

# Blocks of the size of a step's buffers, and small ones between them that stay.
HOLES = """
import sys
import torch
from kvservice.bench.process import read_memory
from kvservice.kernels.memory import give_back_big_blocks
if sys.argv[1] == "given back":
    give_back_big_blocks()
first = torch.ones(4 << 20)  # 16 MiB: freed, it makes malloc put all that is smaller on its heap
del first
before = read_memory().anonymous_bytes
big, small = [], []
for _ in range(60):
    big.append(torch.ones(3 << 18))
    small.append(torch.ones(100 << 10))
big.clear()
print((read_memory().anonymous_bytes - before) >> 20)
"""


def left_mib(mode):
    run = subprocess.run([sys.executable, "-c", HOLES, mode], capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_blocks_of_a_step_leave_no_holes_in_the_heap():
    # 180 MiB of them in big blocks, 24 in small ones.
    assert left_mib("kept") > 150, "a negative control"
    assert left_mib("given back") < 60
