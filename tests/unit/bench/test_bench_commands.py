"""`kvservice bench` on a tiny model: what it prints, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvservice.cli.main import main
from kvservice.models.tiny import write_tiny_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_checkpoint(tmp_path_factory.mktemp("tiny")))


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(("bench", *arguments))
    return int(ended.value.code or 0)


def test_bench_engine_writes_the_promised_names(folder: str, tmp_path: Path, capsys) -> None:
    report = tmp_path / "engine.json"
    sizes = ("--prompt-tokens", "100,3000", "--batch", "1,2", "--new-tokens", "3", "--repeats", "1")
    assert run("engine", "--model", folder, *sizes, "--threads", "1", "--json", str(report)) == 0
    written = json.loads(report.read_text())
    assert set(written) == {"config", "environment", "results"}
    assert {"recipe", "model", "origin", "seed"} <= set(written["config"])
    rows = written["results"]["rows"]
    assert [(row["prompt_tokens"], row["batch"]) for row in rows] == [(100, 1), (100, 2)]
    names = {"prompt_tokens", "batch", "prefill_tokens_per_s", "decode_ms_per_token", "output_tokens_per_s"}
    assert all(set(row) == names for row in rows)
    assert [row["batch"] for row in written["results"]["skipped"]] == [1, 2]
    printed = capsys.readouterr()
    assert "decode ms/token" in printed.out
    assert "2,048 positions" in printed.err


def test_bench_sessions_writes_the_promised_names(folder: str, tmp_path: Path) -> None:
    report = tmp_path / "sessions.json"
    load = ("--sessions", "2", "--doc-tokens", "450", "--turns", "2", "--new-tokens", "3", "--recipe", "recall")
    sizes = ("--kv-bytes", "32MiB", "--host-bytes", "64MiB", "--threads", "1", "--random-ids")
    assert run("sessions", "--model", folder, *load, *sizes, "--json", str(report)) == 0
    results = json.loads(report.read_text())["results"]
    names = {"turn", "wall_s", "ttft_s_mean", "ttft_s_max", "output_tokens_per_s"}
    assert [set(turn) for turn in results["turns"]] == [names, names]
    for name in ("device_kv_bytes_peak", "host_kv_bytes_peak", "rss_bytes_peak", "tier_bytes_moved_per_token"):
        assert results[name] > 0
    assert 0 <= results["recall_hit_rate"] <= 1


@pytest.mark.parametrize("words", ["512,", "0", "many", "1.5"])
def test_sizes_that_are_no_whole_numbers_are_bad_usage(folder: str, words: str, capsys) -> None:
    assert run("engine", "--model", folder, "--prompt-tokens", words) == 2
    assert "whole numbers" in capsys.readouterr().err


def test_a_baseline_of_eval_is_not_served(folder: str, capsys) -> None:
    assert run("sessions", "--model", folder, "--recipe", "recall-oracle", "--random-ids") == 2
    assert "doesn't serve it" in capsys.readouterr().err


def test_an_empty_text_makes_no_documents(folder: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "empty.txt").touch()
    assert run("sessions", "--model", folder, "--text", str(tmp_path / "empty.txt")) == 2
    assert "it is empty" in capsys.readouterr().err
