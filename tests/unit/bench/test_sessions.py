from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from kvservice.bench.sessions import Peaks, SessionLoad, peak_rss_bytes, run_sessions
from kvservice.client import LocalService, ServiceStats
from kvservice.models.tiny import write_tiny_checkpoint

LOAD = SessionLoad(
    sessions=3,
    document_tokens=600,
    question_tokens=8,
    new_tokens=4,
    turns=2,
    recipe="recall",
    text=None,
    seed=7,
)


@pytest.mark.slow
async def test_sessions_load_a_document_and_take_every_turn_together(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "tiny")
    answers: list[None] = []
    arguments = ["--model", str(folder), "--dtype", "fp32", "--threads", "1", "--kv-bytes", "32MiB"]
    async with asyncio.timeout(100), LocalService([*arguments, "--host-bytes", "64MiB"]) as service:
        result = await run_sessions(service.address, service.pid, LOAD, lambda: answers.append(None))
    assert len(answers) == LOAD.sessions * LOAD.turns
    assert [turn.turn for turn in result.turns] == [1, 2]
    for turn in result.turns:
        assert 0 < turn.ttft_s_mean <= turn.ttft_s_max <= turn.wall_s
        assert turn.output_tokens_per_s == pytest.approx(3 * 4 / turn.wall_s)
    # 600 tokens and two questions with their answers: distant tokens were recalled, and some were there already.
    assert result.recall_hit_rate is not None
    assert 0 < result.recall_hit_rate < 1
    assert result.tier_bytes_moved_per_token > 0
    assert result.peaks.device_kv_bytes > 0
    assert result.peaks.host_kv_bytes > 0
    assert result.rss_bytes_peak > 50 << 20
    assert result.recomputed_tokens == 0


def test_peaks_are_the_highest_of_all_polls() -> None:
    peaks = Peaks()
    peaks.see(ServiceStats())
    assert peaks == Peaks(0, 0, 0, 0)


def test_the_peak_memory_of_a_process_is_read_from_proc() -> None:
    assert peak_rss_bytes(os.getpid()) > 10 << 20
