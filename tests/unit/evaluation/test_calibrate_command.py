"""`kvservice calibrate pod` on a tiny model: what it prints, writes and refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from kvservice.cli.main import main
from kvservice.compression.sharing_map import ModelFacts, read_map
from kvservice.models.tiny import write_tiny_checkpoint

SIZES = ("--context", "500", "--queries", "16", "--threads", "1", "--dtype", "fp32")
PNG = b"\x89PNG\r\n\x1a\n"


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(("calibrate", "pod", *arguments))
    return int(ended.value.code or 0)


def facts_in(path: Path) -> ModelFacts:
    return ModelFacts.model_validate(json.loads(path.read_text())["model"])


def test_it_writes_a_map_a_picture_and_the_promised_names(folder: str, texts: Path, tmp_path: Path, capsys) -> None:
    out, report = tmp_path / "pod.json", tmp_path / "report.json"
    files = ("--text", str(texts), "--out", str(out), "--json", str(report))
    assert run("--model", folder, *SIZES, "--delta", "0.1", *files) == 0
    read = read_map(out, facts_in(out))
    assert [text.name for text in read.measurement.texts] == ["a.txt", "b.txt"]
    assert read.measurement.distant_tokens == 192
    assert out.with_suffix(".png").read_bytes().startswith(PNG)
    written = json.loads(report.read_text())
    assert {"model", "origin", "threads", "delta", "linkage", "per", "texts", "queries"} <= set(written["config"])
    results = written["results"]
    assert results["groups_digest"] == read.layer_groups.digest
    assert results["distant_bytes_saved_fraction"] == read.layer_groups.saved_fraction()
    # Seven deltas, two linkages, per KV head and per layer.
    assert len(results["curve"]) == 28
    captured = capsys.readouterr()
    assert "short.txt: skipped" in captured.err
    assert "KV head 1" in captured.out


def test_it_writes_the_same_map_again(folder: str, texts: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    for out in (first, second):
        assert run("--model", folder, *SIZES, "--text", str(texts), "--out", str(out)) == 0
    assert first.read_bytes() == second.read_bytes()
    assert run("--model", folder, *SIZES, "--text", str(texts), "--out", str(second), "--seed", "8") == 0
    assert read_map(first, facts_in(first)).text_digest != read_map(second, facts_in(second)).text_digest


def test_a_saving_finds_its_delta(folder: str, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "pod.json"
    wanted = ("--save-fraction", "0.2", "--per", "layer", "--linkage", "complete")
    assert (
        run("--model", folder, *SIZES, *wanted, "--text", str(texts / "a.txt"), str(texts / "b.txt"), "--out", str(out))
        == 0
    )
    read = read_map(out, facts_in(out))
    # Two layers in one group: half the keys, a quarter of the KV.
    assert read.layer_groups.saved_fraction() == 0.25
    assert read.grouping.delta == pytest.approx(sum(matrix[0][1] for matrix in read.similarity) / 2)
    assert read.grouping.save_fraction == 0.2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--delta", "0.5", "--save-fraction", "0.2"), "exclude each other"),
        (("--save-fraction", "0.3"), "saves 0.250"),
        (("--context", "340"), "leave no distant token"),
        (("--context", "5000"), "none of 3 has 5,000 tokens"),
        (("--dtype", "fp8"), "choose bf16 or fp32"),
        (("--out", "none/pod.json"), "there is no folder"),
        (("--out", "pod.png"), "the heat map takes"),
        (("--text", "none.txt"), "there is no such file"),
    ],
)
def test_what_does_not_fit_is_bad_usage(
    folder: str, texts: Path, tmp_path: Path, monkeypatch, capsys, arguments: tuple[str, ...], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("--model", folder, *SIZES, "--text", str(texts), "--out", "pod.json", *arguments) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "pod.json").exists()


def test_more_context_than_positions_is_bad_usage(folder: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "long.txt").write_text("a few words. " * 200)
    files = ("--text", str(tmp_path / "long.txt"), "--out", str(tmp_path / "pod.json"))
    assert run("--model", folder, "--context", "2100", "--threads", "1", *files) == 2
    assert "has 2,048 positions" in capsys.readouterr().err


def test_a_model_with_sliding_windows_is_refused(texts: Path, tmp_path: Path, capsys) -> None:
    folder = write_tiny_checkpoint(tmp_path / "windowed")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sliding_window": 128}))
    assert run("--model", str(folder), *SIZES, "--text", str(texts), "--out", str(tmp_path / "pod.json")) == 2
    assert "model 'windowed' can't share distant keys" in capsys.readouterr().err


def test_without_matplotlib_it_says_what_to_install(
    folder: str, texts: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.delitem(sys.modules, "kvservice.bench.plots", raising=False)
    for name in [name for name in sys.modules if name == "matplotlib" or name.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run("--model", folder, *SIZES, "--text", str(texts), "--out", str(tmp_path / "pod.json")) == 2
    assert "pip install 'kvservice[plots]'" in capsys.readouterr().err
