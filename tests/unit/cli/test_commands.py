from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from kvservice import __version__
from kvservice.cli.main import app, exit_code
from kvservice.errors import ConfigError, KVServiceError, ModelError, NotFound, Unavailable

MODEL_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
}


def commands() -> Iterator[tuple[str, ...]]:
    def walk(command, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        yield path
        for name, child in getattr(command, "commands", {}).items():
            yield from walk(child, (*path, name))

    yield from walk(typer.main.get_command(app), ())


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(MODEL_CONFIG))
    return tmp_path


@pytest.mark.parametrize("path", list(commands()), ids=" ".join)
def test_every_command_explains_itself_and_each_of_its_options(kvservice, path: tuple[str, ...]) -> None:
    ran = kvservice(*path, "--help")
    assert ran.code == 0
    assert "Usage: kvservice" in ran.out
    command = typer.main.get_command(app)
    for name in path:
        command = command.commands[name]
    assert command.help
    assert [parameter.name for parameter in command.params if not getattr(parameter, "help", None)] == []


def test_the_version_is_the_packages(kvservice) -> None:
    assert kvservice("--version").out.strip() == __version__


def test_python_m_kvservice_is_the_same_command() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "kvservice", "--version"], capture_output=True, text=True, check=False, timeout=60
    )
    assert (ran.returncode, ran.stdout.strip()) == (0, __version__)


@pytest.mark.parametrize("command", ["gateway", "recipes", "sessions", "stats", "chat"])
def test_help_of_light_commands_loads_neither_torch_nor_transformers(command: str) -> None:
    program = (
        "import sys\nfrom kvservice.cli.main import main\n"
        f"try:\n    main(['{command}', '--help'])\nexcept SystemExit:\n    pass\n"
        "sys.exit(int('torch' in sys.modules or 'transformers' in sys.modules or 'grpc' in sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False, timeout=60)
    assert ran.returncode == 0


@pytest.mark.parametrize(
    ("error", "code"), [(ConfigError, 2), (ModelError, 2), (NotFound, 1), (Unavailable, 1), (KVServiceError, 1)]
)
def test_wrong_settings_end_with_2_and_failed_calls_with_1(error: type[KVServiceError], code: int) -> None:
    assert exit_code(error("what happened")) == code


def test_an_unknown_option_is_bad_usage(kvservice) -> None:
    ran = kvservice("size", "--contxt", "5")
    assert ran.code == 2
    assert "--contxt" in ran.err


def test_an_error_is_a_sentence_and_no_traceback(kvservice, tmp_path: Path) -> None:
    ran = kvservice("size", "--model", str(tmp_path))
    assert ran.code == 2
    assert "has no config.json" in ran.err
    assert "Traceback" not in ran.err


def test_an_unknown_model_is_answered_with_those_that_can_be_fetched(kvservice) -> None:
    ran = kvservice("model", "fetch", "gpt-5")
    assert ran.code == 2
    assert "smollm2-135m" in ran.err


def test_recipes_names_every_recipe_whole(kvservice) -> None:
    ran = kvservice("recipes")
    assert ran.code == 0
    assert all(name in ran.out for name in ("dense", "exact", "recall", "recall-recency"))


def test_methods_names_papers_and_writes_them_as_json(kvservice, tmp_path: Path) -> None:
    report = tmp_path / "methods.json"
    ran = kvservice("methods", "--json", str(report))
    assert ran.code == 0
    assert "arXiv:2402.02750" in ran.out
    rows = json.loads(report.read_text())["results"]["methods"]
    assert {"name", "paper", "stages", "status"} <= rows[0].keys()
    assert {row["status"] for row in rows if row["name"] == "key_index"} == {"served"}


def test_a_json_file_that_cannot_be_written_is_bad_usage(kvservice, tmp_path: Path) -> None:
    ran = kvservice("methods", "--json", str(tmp_path / "nowhere" / "a.json"))
    assert ran.code == 2
    assert "nowhere" in ran.err


def test_size_says_how_many_fit_and_what_binds(kvservice, model_folder: Path, tmp_path: Path) -> None:
    report = tmp_path / "size.json"
    arguments = ("size", "--model", str(model_folder), "--context", "8000", "--kv-bytes", "512MiB")
    ran = kvservice(*arguments, "--host-bytes", "1GiB", "--redis-bytes", "512MiB", "--json", str(report))
    assert ran.code == 0
    written = json.loads(report.read_text())
    rows = {row["recipe"]: row for row in written["results"]["rows"]}
    assert rows["dense"]["fitting_sessions"] == 2
    assert rows["dense"]["binds"] == "device"
    assert rows["recall"]["binds"] == "redis"
    assert rows["recall"]["fitting_sessions"] == 512 * 2**20 // rows["recall"]["redis_bytes"]
    assert written["environment"]["versions"]["kvservice"] == __version__


def test_break_even_is_kv_bytes_times_prefill_speed(kvservice, model_folder: Path) -> None:
    ran = kvservice("size", "--model", str(model_folder), "--prefill-tokens-per-s", "100000")
    assert "Break-even: a tier slower than 2.30 GB/s" in ran.out


@pytest.mark.parametrize("size", ["lots", "-1", "12XB"])
def test_a_size_that_is_none_is_bad_usage(kvservice, model_folder: Path, size: str) -> None:
    ran = kvservice("size", "--model", str(model_folder), f"--kv-bytes={size}")
    assert ran.code == 2
    assert "such as 512MiB" in ran.err


def test_more_tokens_than_the_model_has_positions_is_bad_usage(kvservice, model_folder: Path) -> None:
    ran = kvservice("size", "--model", str(model_folder), "--context", "9000")
    assert ran.code == 2
    assert "8,192 positions" in ran.flat_err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("worker",), "KVSERVICE_STATE_URL"),
        (("gateway",), "KVSERVICE_SECRET"),
        (("serve", "--recipe", "recal"), "dense, exact, recall"),
        (("serve", "--recipe", "recall-oracle"), "served are dense"),
        (("serve", "--config", "nowhere.toml"), "No such file"),
        (("serve", "--model", "gpt-5"), "neither a folder nor a known model"),
        (("serve", "--dtype", "int4"), "bf16"),
    ],
)
def test_wrong_settings_of_a_service_end_its_start_with_a_sentence(kvservice, arguments, says: str) -> None:
    ran = kvservice(*arguments)
    assert ran.code == 2
    assert says in ran.flat_err
