"""`kvservice bench gateway`, `bench quotas` and `bench admitted`, small: what they print and write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvservice.cli.main import main
from kvservice.models.tiny import write_tiny_checkpoint


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(("bench", *arguments))
    return int(ended.value.code or 0)


def test_bench_gateway_writes_the_promised_names(tmp_path: Path, capsys) -> None:
    report = tmp_path / "gateway.json"
    assert run("gateway", "--rate", "50", "--seconds", "0.5", "--streams", "20", "--json", str(report)) == 0
    figures = json.loads(report.read_text())["results"]
    assert {"added_latency_ms_p50", "added_latency_ms_p99", "open_streams", "unary_rpcs_per_s"} <= set(figures)
    assert (figures["open_streams"], figures["failed_streams"]) == (20, 0)
    assert 0.0 < figures["added_latency_ms_p50"] <= figures["added_latency_ms_p99"]
    assert figures["unary_rpcs_per_s"] > 0.0
    assert "open streams" in capsys.readouterr().out


def test_bench_quotas_lets_no_more_through_two_gateways_than_may(tmp_path: Path, capsys) -> None:
    report = tmp_path / "quotas.json"
    assert run("quotas", "--calls", "150", "--json", str(report)) == 0
    rows = {row["quota"]: row for row in json.loads(report.read_text())["results"]["rows"]}
    assert rows.keys() == {
        "requests_per_minute", "tokens_per_minute", "concurrent_calls", "document_tokens", "sessions",
    }  # fmt: skip
    for quota, row in rows.items():
        assert 0 < row["let_through"] <= row["at_most"]
        assert row["refused"] == {f"RESOURCE_EXHAUSTED {quota}": row["asked"] - row["let_through"]}
    assert rows["requests_per_minute"]["retry_after_s"] > 0
    assert "concurrent_calls" in capsys.readouterr().out


def test_bench_admitted_counts_alike_by_arithmetic_admission_and_decoding(tmp_path: Path, capsys) -> None:
    folder = str(write_tiny_checkpoint(tmp_path / "tiny"))
    report = tmp_path / "admitted.json"
    sizes = ("--contexts", "2000", "--kv-bytes", "8MiB", "--host-bytes", "64MiB", "--threads", "1")
    assert run("admitted", "--model", folder, *sizes, "--json", str(report)) == 0
    dense, recall = json.loads(report.read_text())["results"]["rows"]
    for row in (dense, recall):
        assert row["fitting"] == row["admitted"] == row["decoding_at_once"]
    assert recall["admitted"] > 2 * dense["admitted"] > 0
    assert "x dense" in capsys.readouterr().out
