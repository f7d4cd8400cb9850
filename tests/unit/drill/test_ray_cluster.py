"""What the drill kills of Ray is all that one process has started, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys

from kvservice.drill.ray_cluster import descendants

PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=sys.stdin)
print(child.pid, flush=True)
child.wait()
"""


def test_descendants_are_found_down_to_the_last():
    command = [sys.executable, "-c", PARENT]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        grandchild = int(parent.stdout.readline())
        assert list(descendants(parent.pid)) == [parent.pid, grandchild]
        assert {parent.pid, grandchild} < set(descendants(os.getpid()))
        parent.communicate("\n")
    assert list(descendants(parent.pid)) == [parent.pid]
