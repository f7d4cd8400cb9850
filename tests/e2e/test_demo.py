"""`python -m kvservice.demo` as `make demo` runs it, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvservice.models.tiny import write_tiny_checkpoint


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvservice.demo", "--threads", "1", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=550)


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.timeout(600)
def test_the_demo_finds_the_planted_sentence_with_the_kv_off_the_device(real_model_folder: Path) -> None:
    ended = demo("--model", str(real_model_folder), "--seed", "3")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count("Pulteney Street") == 3
    assert "All three answered" in ended.stdout
    assert max(len(line) for line in ended.stdout.splitlines()) <= 96
    assert "Traceback" not in ended.stderr


def test_a_model_that_cannot_hold_the_document_ends_the_demo_with_a_sentence(tmp_path: Path) -> None:
    ended = demo("--model", str(write_tiny_checkpoint(tmp_path / "tiny")))
    assert ended.returncode == 1
    assert "has 2048 positions; send fewer tokens" in " ".join(ended.stdout.split())
    assert "Traceback" not in ended.stdout + ended.stderr


def test_a_model_that_is_not_there_ends_the_demo_with_a_sentence() -> None:
    ended = demo("--model", "no-such-model")
    assert ended.returncode == 1
    assert "'no-such-model' is neither a folder nor a known model" in " ".join(ended.stdout.split())
