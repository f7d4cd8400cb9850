"""`--map`: what is read, what is served by it, and what is refused with the reason."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvservice.cli import compose
from kvservice.cli.compose import make_engine
from kvservice.cli.settings import service_config, worker_config
from kvservice.compression.layer_groups import LayerGroups, Linkage, Per
from kvservice.compression.sharing import SharingMode, SharingPlan
from kvservice.compression.sharing_map import CalibrationText, Grouping, Measurement, SharingMap
from kvservice.config.recipes import EXACT, POD, POD_EXACT, RECALL
from kvservice.engine import Engine
from kvservice.errors import ConfigError, ModelError
from kvservice.kernels import cpu
from kvservice.models.llama import LlamaModel
from kvservice.models.loader import read_model
from kvservice.models.sharing import model_facts
from kvservice.models.tiny import tiny_model, write_tiny_checkpoint
from kvservice.tier.frame_sets import FrameSets
from kvservice.types import SessionId
from tests.unit.engine.driving import Drive, answering, tokens
from tests.unit.engine.shared_reference import SharedReference

GROUPS = LayerGroups(((0, 0), (0, 1)))
SMALL = {"kv_bytes": 32 << 20, "host_bytes": 32 << 20, "step_tokens": 128, "dtype": "fp32", "threads": 1}
FP32_LOGITS = 1e-3


def write_map(path: Path, folder: Path, groups: LayerGroups = GROUPS) -> Path:
    facts = model_facts(read_model(folder, torch.float32)[0])
    measured = Measurement(
        texts=(CalibrationText(name="a.txt", sha256="00ff", first_token=0),),
        context_tokens=2048,
        queries=64,
        sink_tokens=16,
        distant_tokens=1664,
        dtype="fp32",
        seed=7,
    )
    alike = (((1.0, 0.5), (0.5, 1.0)),) * 2
    SharingMap(
        tool="a test",
        model=facts,
        model_fingerprint=facts.fingerprint,
        measurement=measured,
        text_digest=measured.text_digest,
        grouping=Grouping(delta=0.5, linkage=Linkage.ANCHOR, per=Per.KV_HEAD, similarity="js", save_fraction=None),
        groups=groups.runs,
        distant_mass=((0.5, 0.5),) * 2,
        similarity=alike,
        mass_similarity=alike,
    ).write(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_checkpoint(tmp_path / "tiny")


@pytest.fixture
def sharing_map(tmp_path: Path, folder: Path) -> Path:
    return write_map(tmp_path / "map.json", folder)


def engine_of(folder: Path, **settings: object) -> Engine:
    return make_engine(worker_config({"model": str(folder), **SMALL, **settings}), folder)


def test_a_worker_with_a_map_serves_recipes_that_share_keys(folder: Path, sharing_map: Path) -> None:
    assert engine_of(folder).info.recipes[:4] == ("dense", "exact", "recall", "streaming_llm")
    engine = engine_of(folder, sharing_map=str(sharing_map))
    assert engine.info.recipes[:5] == ("dense", "exact", "recall", "pod", "pod-exact")
    assert engine.info.shape.num_followers == 1


@pytest.mark.skipif(cpu.isa() == "none", reason="no kernels on this machine")
@pytest.mark.parametrize("mode", SharingMode, ids=lambda mode: mode.value)
@pytest.mark.parametrize("recipe", [POD_EXACT, POD], ids=lambda recipe: recipe.name)
def test_beside_kernels_what_is_distant_is_attended_to_as_in_the_slow_reference(
    folder: Path, sharing_map: Path, recipe, mode: SharingMode
) -> None:
    """Kernels round the queries they choose by; with a small budget others may be chosen at its edge. So all are."""
    recipe = replace(recipe, window_tokens=64, recalled_tokens=recipe.recalled_tokens and 256)
    document, question = tokens(170), tokens(30, seed=1)
    drive = Drive(engine_of(folder, sharing_map=str(sharing_map), sharing=mode.value))
    for name, other in (("r", RECALL), ("e", EXACT)):
        drive.submit(name, other, document=tokens(400, 3), prompt=(1,), sampling=answering(12))
    drive.submit("s", recipe, document=document, prompt=question, sampling=answering(4, logprobs=0))
    drive.run()
    model = LlamaModel(*read_model(folder, torch.float32), torch.device("cpu"))
    reference = SharedReference(model, recipe, SharingPlan(GROUPS, mode))
    reference.read(document, selects=False)
    logits = reference.read(question, selects=True)[-1:]
    for token, logprobs in drive.answers["s", 0]:
        assert token == int(logits.argmax())
        assert logprobs[0].logprob == pytest.approx(float(logits.log_softmax(-1).max()), abs=FP32_LOGITS)
        logits = reference.read([token], selects=True)


@pytest.mark.skipif(cpu.isa() == "none", reason="no kernels on this machine")
def test_beside_kernels_no_bit_depends_on_how_a_document_was_cut_into_steps(folder: Path, sharing_map: Path) -> None:
    recipe = replace(POD, window_tokens=64, recalled_tokens=32)
    logits = []
    for step_tokens in (64, 256):
        settings = {"sharing_map": str(sharing_map), "deterministic": True, "step_tokens": step_tokens}
        engine = engine_of(folder, **settings)
        Drive(engine).ask("s", recipe, document=tokens(230))
        logits.append(engine.score(SessionId("s"), tokens(3, 1)))
    assert torch.equal(*logits)


def test_what_is_stored_has_the_map_in_its_fingerprint_where_keys_are_shared_and_nowhere_else(
    folder: Path, sharing_map: Path, tmp_path: Path
) -> None:
    other = write_map(tmp_path / "other.json", folder, LayerGroups(((0, 1), (0, 0))))
    seen = []
    for settings in (
        {},
        {"sharing_map": str(sharing_map)},
        {"sharing_map": str(other)},
        {"sharing_map": str(sharing_map), "sharing": "key"},
        {"sharing_map": str(sharing_map), "skip_above": 0.7},
        {"sharing_map": str(sharing_map), "kv_codec": "values8"},
        {"sharing_map": str(sharing_map), "kv_codec": "zstd"},
    ):
        config = worker_config({"model": str(folder), **SMALL, **settings})
        frame_sets = FrameSets()
        compose.make_engine(config, folder, object(), frame_sets=frame_sets)
        seen.append(frame_sets)
    whole, sharing = zip(*(each.fingerprints for each in seen), strict=True)
    assert len(set(whole)) == 1
    assert sharing[0] == b""
    assert len({*sharing[:5], whole[0]}) == 6
    assert sharing[5] == sharing[6] == sharing[1]
    # Three rows of K and V, and one follower's values.
    assert {each.of(POD).group_bytes for each in seen[1:]} == {4 * 64 * 2 * 16 * 4}
    # Rows of two values have no place for what is lossy.
    assert [(each.of(POD).codec, each.of(RECALL).codec) for each in seen[4:]] == [
        ("raw", "raw"), ("raw", "values8"), ("zstd", "zstd")
    ]  # fmt: skip


# -- refusals --------------------------------------------------------------------------------------------------------


def test_another_models_map_is_refused(tmp_path: Path, folder: Path, sharing_map: Path) -> None:
    other = write_tiny_checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match=r"made for 'tiny', not for this 'other' \(weights_digest"):
        engine_of(other, sharing_map=str(sharing_map))


def test_a_damaged_or_missing_map_is_refused(folder: Path, sharing_map: Path) -> None:
    sharing_map.write_text(sharing_map.read_text().replace("0.5", "0.25", 1))
    with pytest.raises(ConfigError, match="is damaged"):
        engine_of(folder, sharing_map=str(sharing_map))
    with pytest.raises(ConfigError, match="can't be read"):
        engine_of(folder, sharing_map=str(sharing_map) + "x")


def test_a_model_whose_layers_cant_share_keys_is_refused(folder: Path, sharing_map: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "no_rope_layers": [1, 0]}))
    worker = worker_config({"model": str(folder), **SMALL, "sharing_map": str(sharing_map)})
    with pytest.raises(ModelError, match="have no RoPE"):
        compose.sharing_plan(worker, folder, tiny_model().spec)


def test_a_default_recipe_that_shares_keys_needs_a_map(sharing_map: Path) -> None:
    with pytest.raises(ConfigError, match="name a map of which"):
        service_config({"gateway": {"secret": "0" * 32}, "worker": {"recipe": "pod"}})
    worker = {"recipe": "pod", "sharing_map": str(sharing_map)}
    assert service_config({"gateway": {"secret": "0" * 32}, "worker": worker}).worker.recipe == "pod"


@pytest.mark.parametrize("command", [("eval", "passkey"), ("bench", "engine"), ("bench", "sessions")])
def test_commands_refuse_recipes_that_share_keys_without_a_map(kvservice, command: tuple[str, str]) -> None:
    ran = kvservice(*command, "--recipe", "pod")
    assert ran.code != 0
    assert "name a map of which with --map" in ran.flat_err


def test_a_gate_that_isnt_known_beforehand_is_refused(folder: Path, sharing_map: Path) -> None:
    with pytest.raises(ConfigError, match="skip_above with sharing 'key'"):
        engine_of(folder, sharing_map=str(sharing_map), sharing="key", skip_above=0.5)
