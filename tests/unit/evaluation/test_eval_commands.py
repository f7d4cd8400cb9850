"""`kvservice eval` on a tiny model: what it prints, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvservice.cli.main import main

SIZES = ("--context", "400", "--new-tokens", "8", "--threads", "1")


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(("eval", *arguments))
    return int(ended.value.code or 0)


def test_quality_writes_the_promised_names(folder: str, texts: Path, tmp_path: Path, capsys) -> None:
    report = tmp_path / "quality.json"
    more = ("--bootstrap", "--recipe", "recall", "--json", str(report))
    assert run("quality", "--model", folder, "--texts", str(texts), *SIZES, *more) == 0
    written = json.loads(report.read_text())
    assert written["config"]["texts"] == ["a.txt", "b.txt"]
    assert written["config"]["skipped_texts"] == ["short.txt"]
    assert {"context", "recalled_tokens", "seed", "origin"} <= set(written["config"])
    names = {"kl_mean", "kl_interval", "top1_agreement", "nll", "nll_dense", "oracle_kl_mean", "device_kv_bytes"}
    names |= {"dense_kv_bytes", "distant_bytes_saved_fraction", "recalled_tokens_per_kv_head"}
    assert names <= set(written["results"])
    assert "short.txt: skipped" in capsys.readouterr().err


def test_several_texts_may_follow_one_option(folder: str, texts: Path, tmp_path: Path) -> None:
    report = tmp_path / "quality.json"
    files = ("--texts", str(texts / "a.txt"), str(texts / "b.txt"))
    assert run("quality", "--model", folder, "--recipe", "exact", *SIZES, "--json", str(report), *files) == 0
    assert json.loads(report.read_text())["config"]["texts"] == ["a.txt", "b.txt"]


def test_precision_stands_beside_transformers(folder: str, texts: Path, tmp_path: Path, capsys) -> None:
    report = tmp_path / "precision.json"
    assert run("precision", "--model", folder, "--texts", str(texts), *SIZES, "--json", str(report)) == 0
    rows = {row["runner"]: row for row in json.loads(report.read_text())["results"]["rows"]}
    assert list(rows) == ["transformers bf16", "kvservice fp32", "kvservice bf16"]
    assert rows["kvservice fp32"]["kl_mean"] < 1e-6
    assert rows["kvservice fp32"]["top1_agreement"] == 1.0
    assert rows["kvservice bf16"]["kl_mean"] > rows["kvservice fp32"]["kl_mean"]
    assert "transformers fp32" in capsys.readouterr().out


@pytest.mark.parametrize(("limit", "code"), [("0", 1), ("100", 0)])
def test_quality_ends_with_1_above_the_limit(folder: str, texts: Path, limit: str, code: int) -> None:
    assert run("quality", "--model", folder, "--texts", str(texts), *SIZES, "--max-kl", limit) == code


def test_texts_that_are_missing_or_too_short_are_bad_usage(folder: str, texts: Path, capsys) -> None:
    assert run("quality", "--model", folder, "--texts", str(texts / "none.txt"), *SIZES) == 2
    assert "there is no such file" in capsys.readouterr().err
    assert run("quality", "--model", folder, "--texts", str(texts / "short.txt"), *SIZES) == 2
    assert "none of 1 has 409 tokens" in capsys.readouterr().err


def test_passkey_writes_the_promised_names(folder: str, tmp_path: Path, capsys) -> None:
    report = tmp_path / "passkey.json"
    sizes = ("--tokens", "700", "--cases", "2", "--seed", "3", "--threads", "1")
    assert run("passkey", "--model", folder, "--recipe", "recall", *sizes, "--json", str(report)) == 0
    results = json.loads(report.read_text())["results"]
    assert {"correct", "cases", "by_depth", "dense_correct"} <= set(results)
    assert results["cases"] == 2
    assert set(results["by_depth"]) == {"5", "25"}
    assert "Lost against dense" in capsys.readouterr().out


def test_a_text_needs_a_haystack_of_prose(folder: str, texts: Path, capsys) -> None:
    assert run("passkey", "--model", folder, "--text", str(texts / "a.txt")) == 2
    assert "--haystack prose" in capsys.readouterr().err


def test_a_prompt_beyond_the_positions_of_the_model_fails_with_a_sentence(folder: str, capsys) -> None:
    assert run("passkey", "--model", folder, "--tokens", "3000", "--cases", "1", "--threads", "1") == 1
    assert "2048 positions" in capsys.readouterr().err


def test_an_unknown_dtype_is_bad_usage(folder: str, texts: Path, capsys) -> None:
    assert run("quality", "--model", folder, "--texts", str(texts), *SIZES, "--dtype", "int4") == 2
    assert "bf16 or fp32" in capsys.readouterr().err


def test_indexes_writes_a_row_for_each_recipe_and_budget_and_draws_two_figures(
    folder: str, texts: Path, tmp_path: Path
) -> None:
    report = tmp_path / "indexes.json"
    recipes = ("--recipe", "recall", "--recipe", "recall-quest", "--budgets", "32,16")
    arguments = ("--model", folder, "--texts", str(texts / "a.txt"), *SIZES, *recipes)
    assert run("indexes", *arguments, "--json", str(report), "--plot", str(tmp_path)) == 0
    written = json.loads(report.read_text())
    assert written["config"]["budgets"] == [16, 32]
    named = [(row["recipe"], row["recalled_tokens"]) for row in written["results"]["rows"]]
    assert named == [("recall", 16), ("recall", 32), ("recall-quest", 16), ("recall-quest", 32)]
    for name in ("recall-tokens.png", "recall-bytes.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--budgets", "a,b"), "numbers of tokens"),
        (("--recipe", "magic"), "unknown recipe"),
        (("--plot", "no-such-folder"), "no such folder"),
    ],
)
def test_indexes_refuses_bad_arguments(folder: str, texts: Path, capsys, arguments, says) -> None:
    assert run("indexes", "--model", folder, "--texts", str(texts / "a.txt"), *SIZES, *arguments) == 2
    assert says in capsys.readouterr().err
