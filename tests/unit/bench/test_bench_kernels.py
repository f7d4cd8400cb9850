"""`kvservice bench kernels` in a tiny shape: compiled on a GPU, interpreted without one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kvservice.cli.main import main
from kvservice.kernels import triton

HAS_GPU = torch.cuda.is_available()
SIZES = ("--context", "20", "--prefill-tokens", "2", "--repeats", "1")

pytestmark = pytest.mark.skipif(not triton.is_installed(), reason="Triton isn't installed")


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(("bench", "kernels", *arguments))
    return int(ended.value.code or 0)


def test_every_size_is_measured_or_skipped_with_the_bytes_it_needs(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not HAS_GPU:
        triton.use_interpreter()
    from kvservice.bench import kernels

    # KV of 20 tokens in the tiny shape is 5,120 bytes.
    monkeypatch.setattr(kernels, "_free_bytes", lambda device: 8000)
    report, device = tmp_path / "kernels.json", "cuda" if HAS_GPU else "cpu"
    assert run("--device", device, "--models", "tiny", *SIZES, "--batch", "1,2", "--json", str(report)) == 0
    results = json.loads(report.read_text())["results"]
    assert results["copy_gb_per_s"] > 0
    (row,) = results["rows"]
    assert (row["model"], row["context_tokens"], row["batch"]) == ("tiny", 20, 1)
    for name in ("decode_ms_per_token", "output_tokens_per_s", "prefill_tokens_per_s", "attention_ms", "copy_fraction"):
        assert row[name] > 0
    assert [size["batch"] for size in results["skipped"]] == [2]
    printed = capsys.readouterr()
    assert "decode ms/token" in printed.out
    assert "10,240 bytes of KV" in printed.err


@pytest.mark.skipif(HAS_GPU, reason="there is a CUDA device")
def test_without_a_gpu_it_says_what_is_needed(capsys) -> None:
    assert run("--models", "tiny", *SIZES) == 2
    assert "compute capability" in capsys.readouterr().err


def test_unknown_shapes_are_bad_usage(capsys) -> None:
    device = "cuda" if HAS_GPU else "cpu"
    assert run("--device", device, "--models", "huge", *SIZES) == 2
    assert "must be one of" in capsys.readouterr().err
