from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from kvservice.drill.skewed import write_skew

DAY_S = 86_400.0

MODULE = """
import sys, time
print(time.time(), time.monotonic(), *sys.argv[1:], flush=True)
sys.stdin.readline()
print(time.time(), time.monotonic(), flush=True)
"""


def test_wall_clock_jumps_and_the_steady_one_does_not(tmp_path: Path):
    # Any package of this name may be run; ours would need a service.
    (tmp_path / "kvservice").mkdir()
    (tmp_path / "kvservice" / "__init__.py").touch()
    (tmp_path / "kvservice" / "__main__.py").write_text(MODULE)
    clock = tmp_path / "clock"
    write_skew(clock, DAY_S)
    script = Path(sys.modules[write_skew.__module__].__file__ or "")
    with subprocess.Popen(
        [sys.executable, str(script), str(clock), "gateway"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        wall, steady, argument = process.stdout.readline().split()
        assert argument == "gateway"
        assert abs(float(wall) - time.time() - DAY_S) < 60
        write_skew(clock, -2 * DAY_S)
        process.stdin.write("\n")
        process.stdin.flush()
        later, steady_later = (float(word) for word in process.stdout.readline().split())
        assert abs(later - time.time() + 2 * DAY_S) < 60
        assert 0 <= steady_later - float(steady) < 60
