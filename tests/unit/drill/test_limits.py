from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvservice.drill.limits import limit_files, limit_memory

CHILD = """
import sys
for line in sys.stdin:
    try:
        exec(line)
        print("done", flush=True)
    except (OSError, MemoryError) as error:
        print(type(error).__name__, flush=True)
"""


class Child:
    """A process that does as it is told, a line at a time."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.told("import os")

    def told(self, line: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(line, file=self.process.stdin, flush=True)
        return self.process.stdout.readline().strip()


@pytest.fixture
def child() -> Iterator[Child]:
    child = Child()
    yield child
    child.process.kill()
    child.process.communicate()


def test_file_grows_to_its_limit_and_on_when_that_is_gone(child, tmp_path: Path):
    path = tmp_path / "file"
    write = f"f = os.open({str(path)!r}, os.O_CREAT | os.O_WRONLY | os.O_APPEND); os.write(f, b'x' * 1000); os.close(f)"
    assert child.told(write) == "done"
    limit_files(child.process.pid, 1000)
    assert child.told(write) == "OSError"
    assert path.stat().st_size == 1000
    limit_files(child.process.pid, None)
    assert child.told(write) == "done"


def test_memory_is_refused_and_given_again(child):
    limit_memory(child.process.pid, 1 << 20)
    assert child.told("x = bytearray(64 << 20)") == "MemoryError"
    limit_memory(child.process.pid, None)
    assert child.told("x = bytearray(64 << 20)") == "done"
