"""`kvservice eval sharing` on a tiny model: what it prints, writes, keeps and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvservice.cli.main import main

SIZES = ("--context", "420", "--new-tokens", "6", "--fit-tokens", "430", "--threads", "1", "--dtype", "fp32")
PNG = b"\x89PNG\r\n\x1a\n"


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0)


@pytest.fixture
def shared_map(folder: str, texts: Path, tmp_path: Path) -> Path:
    out = tmp_path / "map.json"
    sizes = ("--context", "500", "--queries", "16", "--threads", "1", "--dtype", "fp32")
    assert run("calibrate", "pod", "--model", folder, "--text", str(texts), "--out", str(out), *sizes) == 0
    return out


def test_it_writes_the_tables_and_goes_on_with_what_is_kept(
    folder: str, texts: Path, shared_map: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr("kvservice.evaluation.bootstrap.DRAWS", 20)
    report, kept, plot, page = (tmp_path / name for name in ("s.json", "kept.jsonl", "s.png", "s.md"))
    files = ("--texts", str(texts), "--fit-texts", str(texts / "b.txt"), "--map", str(shared_map), "--keep", str(kept))
    outs = ("--json", str(report), "--plot", str(plot), "--markdown", str(page))
    asked = ("eval", "sharing", "--model", folder, *files, *SIZES, "--deltas", "0.1,1.1", "--random", "2", *outs)
    assert run(*asked) == 0
    results = json.loads(report.read_text())["results"]
    rows = {(row["method"], row["mode"], row["delta"]): row for row in results["rows"]}
    methods = {"similarity", "per layer", "random", "uniform", "mass", "offset", "key map", "streaming"}
    assert {method for method, _, _ in rows} == methods
    for (method, _, delta), row in rows.items():
        if delta == 1.1 and method != "mass":
            assert (row["saved_fraction"], row["top1_agreement"]) == (0, 1), method
    shared = rows["similarity", "score", 0.1]
    assert shared["saved_fraction"] > 0
    assert shared["kl_mean"] > rows["similarity", "score", 1.1]["kl_mean"] == 0
    for one in results["bytes"]:
        assert one["saved_fraction"] == pytest.approx(one["identity"] - one["rounding"])
    assert [row["recipe"] for row in results["served"]["rows"]] == ["dense", "exact", "recall", "pod-exact", "pod"]
    assert plot.read_bytes().startswith(PNG)
    assert "| similarity | score | 0.1 |" in page.read_text()
    # Once more: nothing is measured again.
    monkeypatch.setattr("kvservice.evaluation.sharing_table.measure", None)
    before, lines = report.read_text(), kept.read_text()
    assert run(*asked) == 0
    assert json.loads(report.read_text())["results"] == json.loads(before)["results"]
    assert kept.read_text() == lines
    assert run(*asked[:-8], *outs, "--random", "2", "--new-tokens", "7") == 2
    assert "other texts or settings" in capsys.readouterr().err


def test_deltas_that_are_no_numbers_are_bad_usage(folder: str, texts: Path, shared_map: Path) -> None:
    files = ("--texts", str(texts), "--fit-texts", str(texts), "--map", str(shared_map))
    assert run("eval", "sharing", "--model", folder, *files, "--deltas", "high") == 2


def test_adapters_are_measured_beside_the_rest(folder: str, texts: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("kvservice.evaluation.bootstrap.DRAWS", 20)
    shared_map = tmp_path / "map.json"
    measured = ("--context", "500", "--queries", "16", "--threads", "1", "--dtype", "fp32", "--delta", "0.1")
    assert run("calibrate", "pod", "--model", folder, "--text", str(texts), "--out", str(shared_map), *measured) == 0
    trained, report = tmp_path / "trained.safetensors", tmp_path / "s.json"
    sizes = ("--context", "420", "--loss-tokens", "32", "--threads", "1", "--dtype", "fp32", "--learning-rate", "0.01")
    files = ("--text", str(texts / "a.txt"), "--map", str(shared_map), "--out", str(trained))
    assert run("adapt", "pod", "--model", folder, *files, *sizes, "--steps", "2", "--sharing", "score") == 0
    given = ("--texts", str(texts), "--fit-texts", str(texts / "b.txt"), "--map", str(shared_map))
    asked = ("eval", "sharing", "--model", folder, *given, *SIZES, "--deltas", "1.1", "--random", "1")
    assert run(*asked, "--adapter", str(trained), "--json", str(report)) == 0
    results = json.loads(report.read_text())["results"]
    rows = {row["method"]: row for row in results["rows"]}
    one, unshared = rows["adapter trained"], rows["adapter trained, unshared"]
    assert one["saved_fraction"] > 0
    assert one["kl_mean"] > unshared["kl_mean"] > 0
    served = {row["recipe"]: row for row in results["served"]["rows"]}
    # The same weights and the same attention, in one pass and as served.
    assert served["pod-exact, adapter trained"]["kl_mean"] == pytest.approx(one["kl_mean"], rel=0.05)
    assert "pod, adapter trained" in served
