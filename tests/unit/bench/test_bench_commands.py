"""`kvservice bench` on a tiny model: what it prints, writes and refuses."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kvservice.bench import roofline
from kvservice.cli.main import main
from kvservice.models.tiny import tiny_model, write_tiny_checkpoint


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
    names |= {"arrived_fraction", "skipped_fraction"}
    assert all(set(row) == names for row in rows)
    assert [row["batch"] for row in written["results"]["skipped"]] == [1, 2]
    printed = capsys.readouterr()
    assert "decode ms/token" in printed.out
    assert "2,048 positions" in printed.err


def test_bench_engine_measures_transformers_beside_it(folder: str, tmp_path: Path, capsys) -> None:
    report = tmp_path / "engine.json"
    sizes = ("--prompt-tokens", "100", "--batch", "1,2", "--new-tokens", "3", "--repeats", "1", "--threads", "1")
    assert run("engine", "--model", folder, *sizes, "--transformers", "--json", str(report)) == 0
    results = json.loads(report.read_text())["results"]
    assert [(row["prompt_tokens"], row["batch"]) for row in results["transformers"]] == [(100, 1), (100, 2)]
    assert set(results["transformers"][0]) == set(results["rows"][0])
    assert "transformers" in capsys.readouterr().out


def test_bench_roofline_splits_a_step_into_parts(folder: str, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(roofline, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(roofline, "PRODUCT_SIZE", 64)
    report = tmp_path / "roofline.json"
    sizes = ("--batch", "1,3", "--contexts", "300,200", "--new-tokens", "3", "--threads", "1")
    assert run("roofline", "--model", folder, *sizes, "--json", str(report)) == 0
    results = json.loads(report.read_text())["results"]
    assert [(step["batch"], step["context_tokens"]) for step in results["steps"]] == [(1, 300), (3, 200)]
    names = [part["name"] for part in results["steps"][0]["parts"]]
    assert names == ["products of the layers", "attention", "head", "tables, drawing, output"]
    shape = replace(tiny_model(seed=0).spec.shape, dtype_bytes=2)
    attention = results["steps"][1]["parts"][1]
    assert attention["num_bytes"] == 3 * 200 * shape.kv_bytes_per_token
    assert results["limits"]["bytes_per_s"] > 0
    assert "whole step" in capsys.readouterr().out


def test_bench_roofline_wants_a_context_for_every_batch(folder: str, capsys) -> None:
    assert run("roofline", "--model", folder, "--batch", "1,2", "--contexts", "300") == 2
    assert "as many of each" in capsys.readouterr().err


def test_bench_context_measures_beyond_the_positions_of_the_model(folder: str, tmp_path: Path, capsys) -> None:
    report, figure = tmp_path / "context.json", tmp_path / "context.png"
    sizes = ("--contexts", "600,4000", "--new-tokens", "2", "--repeats", "1", "--batch", "2", "--threads", "1")
    files = ("--json", str(report), "--plot", str(figure))
    assert run("context", "--model", folder, "--recipes", "dense,exact,recall", *sizes, *files) == 0
    rows = json.loads(report.read_text())["results"]["rows"]
    assert list(rows) == ["dense", "exact", "recall"]
    for recipe in rows.values():
        assert [row["context_tokens"] for row in recipe] == [600, 4000]
        assert all(row["decode_ms_per_token"] > 0 for row in recipe)
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert "speed alone" in capsys.readouterr().out


def test_bench_context_refuses_recipes_that_are_not_served(folder: str, capsys) -> None:
    assert run("context", "--model", folder, "--recipes", "dense,recall-oracle") == 2
    assert "choose from dense" in capsys.readouterr().err


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


def test_bench_start_ends_with_a_first_token(folder: str, tmp_path: Path, capsys) -> None:
    report = tmp_path / "start.json"
    assert run("start", "--model", folder, "--repeats", "1", "--threads", "1", "--json", str(report)) == 0
    (start,) = json.loads(report.read_text())["results"]["starts"]
    assert 0 < start["ready_s"] < start["first_token_s"]
    assert "first token" in capsys.readouterr().out


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


PNG = b"\x89PNG\r\n\x1a\n"
SOAK = (
    "--sessions",
    "3",
    "--doc-tokens",
    "60-400",
    "--minutes",
    "0.03",
    "--kv-bytes",
    "32MiB",
    "--host-bytes",
    "32MiB",
)


def test_bench_soak_writes_the_promised_names_and_a_picture(folder: str, tmp_path: Path, capsys) -> None:
    report, picture = tmp_path / "soak.json", tmp_path / "soak.png"
    files = ("--json", str(report), "--plot", str(picture))
    assert run("soak", "--model", folder, *SOAK, "--threads", "1", *files) == 0
    written = json.loads(report.read_text())
    assert {"sessions", "minutes", "document_tokens", "recipes", "origin", "seed"} <= set(written["config"])
    assert written["config"]["recipes"] == ["dense", "exact", "recall"]
    results = written["results"]
    assert set(results) == {
        *("seconds", "faults", "left", "checks", "counts", "preemptions", "drift_mib_per_min", "memory"),
        *("steps", "full_batch_steps", "overhead", "samples"),
    }
    assert results["faults"] == []
    assert {"rss", "anonymous", "other"} == set(results["drift_mib_per_min"])
    assert results["memory"]["peak_bytes"] <= results["memory"]["bound_bytes"]
    samples = results["samples"]
    assert {"time_s", "window_bytes", "host_bytes", "rss_bytes", "free_blocks", "running", "waiting"} <= set(samples)
    assert len({len(column) for column in samples.values()}) == 1
    assert results["overhead"]["steps"]["num_steps"] == 60
    assert picture.read_bytes().startswith(PNG)
    printed = capsys.readouterr().out
    assert "bound: the sum" in printed
    assert "3 sessions that only decode" in printed


def test_bench_soak_exits_1_and_says_what_drifted(folder: str, monkeypatch, capsys) -> None:
    from kvservice.engine import Engine
    from kvservice.types import SessionId

    release = Engine.release

    def leaking(self: Engine, session_id: SessionId, *more: object, **options: object) -> tuple[int, int]:
        return (0, 0) if session_id.startswith("session") else release(self, session_id, *more, **options)

    monkeypatch.setattr(Engine, "release", leaking)
    assert run("soak", "--model", folder, *SOAK, "--recipe", "dense", "--threads", "1") == 1
    assert "not back at zero after everything was released: window_bytes" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["600-500", "0-5", "1-2-3", "many"])
def test_a_range_that_is_none_is_bad_usage(folder: str, words: str, capsys) -> None:
    assert run("soak", "--model", folder, "--doc-tokens", words) == 2
    assert words in capsys.readouterr().err


def test_a_soak_of_a_baseline_is_bad_usage(folder: str, capsys) -> None:
    assert run("soak", "--model", folder, "--recipe", "recall-oracle") == 2
    assert "mixed" in capsys.readouterr().err


def test_bench_interference_writes_the_promised_names_and_a_picture(folder: str, tmp_path: Path, capsys) -> None:
    report, picture = tmp_path / "interference.json", tmp_path / "interference.png"
    load = ("--decoding", "2", "--doc-tokens", "60", "--prefill-tokens", "700", "--rounds", "1", "--threads", "1")
    files = ("--json", str(report), "--plot", str(picture))
    sizes = ("--kv-bytes", "32MiB", "--host-bytes", "64MiB")
    assert run("interference", "--model", folder, *load, *sizes, *files) == 0
    rows = json.loads(report.read_text())["results"]["rows"]
    assert [row["case"] for row in rows] == ["alone", "offload", "write_behind", "control"]
    names = {
        *("case", "num_intervals", "interval_ms", "to_alone", "to_control", "prefill_tokens_per_s", "written_frames"),
    }
    assert all(set(row) == names for row in rows)
    assert all(set(row["interval_ms"]) == {"p50", "p90", "p99", "max"} for row in rows)
    # 700 tokens: 16 sinks, a window of at least 256, and 6 groups of 64 that leave it: a chunk, in frames of a layer.
    assert [row["written_frames"] > 0 for row in rows] == [False, False, True, False]
    assert picture.read_bytes().startswith(PNG)
    printed = capsys.readouterr().out
    for words in ("alone", "offloaded to host memory", "written to Redis", "of a dense session"):
        assert words in printed


@pytest.mark.parametrize("option", ["--json", "--plot"])
@pytest.mark.parametrize("command", ["soak", "interference"])
def test_a_file_in_no_folder_is_refused_before_anything_is_measured(
    folder: str, tmp_path: Path, command: str, option: str, capsys
) -> None:
    assert run(command, "--model", folder, option, str(tmp_path / "none" / "file")) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_a_plot_without_matplotlib_says_what_to_install(folder: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.delitem(sys.modules, "kvservice.bench.plots", raising=False)
    for name in [name for name in sys.modules if name == "matplotlib" or name.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run("soak", "--model", folder, "--plot", str(tmp_path / "soak.png")) == 2
    assert "pip install 'kvservice[plots]'" in capsys.readouterr().err


def test_bench_tier_starts_a_redis_and_writes_the_promised_names(tmp_path: Path, capsys) -> None:
    report = tmp_path / "tier.json"
    sizes = ("--value-bytes", "20000,50000", "--connections", "1,2", "--read-bytes", "1000000", "--rounds", "1")
    assert run("tier", *sizes, "--json", str(report)) == 0
    rows = json.loads(report.read_text())["results"]["rows"]
    assert [(row["value_bytes"], row["connections"]) for row in rows] == [
        (20000, 1),
        (20000, 2),
        (50000, 1),
        (50000, 2),
    ]
    figures = ("read_gb_per_s", "write_gb_per_s", "read_ms_p50", "read_ms_p99")
    assert all(row[name] > 0 for row in rows for name in figures)
    assert "Frames to and from Redis" in capsys.readouterr().out
