"""`--adapter`: a worker that has one serves the adapted model under recipes that share keys, and nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvservice.cli import compose
from kvservice.cli.compose import make_engine
from kvservice.cli.main import main
from kvservice.cli.settings import worker_config
from kvservice.compression.sharing import SharingMode, SharingPlan
from kvservice.config.recipes import DENSE, POD, POD_EXACT
from kvservice.errors import ConfigError, InvalidRequest
from kvservice.models.adapter import read_adapter
from kvservice.models.tiny import write_tiny_checkpoint
from kvservice.tier.frame_sets import FrameSets
from tests.unit.cli.test_sharing_options import GROUPS, SMALL, write_map
from tests.unit.engine.driving import Drive, answering, tokens

PNG = b"\x89PNG\r\n\x1a\n"
SIZES = ("--context", "420", "--loss-tokens", "32", "--rank", "2", "--dtype", "fp32", "--threads", "1")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, a map, texts, and an adapter that `adapt pod` trained for a moment."""
    home = tmp_path_factory.mktemp("adapted")
    folder = write_tiny_checkpoint(home / "tiny")
    write_map(home / "map.json", folder)
    for name in ("a", "b", "held"):
        words = "".join(f"{name} {number * 7919 % 1000} " for number in range(150))
        (home / name).write_text(words)
    assert adapt(home, "--steps", "2") == 0
    return home


def adapt(home: Path, *more: str, out: str = "out.safetensors") -> int:
    with pytest.raises(SystemExit) as ended:
        main(
            (
                *("adapt", "pod", "--model", str(home / "tiny"), "--map", str(home / "map.json"), *SIZES),
                *("--text", str(home / "a"), str(home / "b"), "--held", str(home / "held")),
                *("--out", str(home / out), "--sharing", "key", *more),
            )
        )
    return int(ended.value.code or 0)


def engine_of(home: Path, **settings: object):
    given = {"model": str(home / "tiny"), **SMALL, "sharing_map": str(home / "map.json"), **settings}
    return make_engine(worker_config(given), home / "tiny")


def adapted(home: Path, **settings: object):
    given = {"adapter": str(home / "out.safetensors"), "recipe": "pod", "sharing": "key", **settings}
    return engine_of(home, **given)


def test_training_writes_an_adapter_a_curve_a_picture_and_the_promised_names(made, tmp_path, capsys) -> None:
    report = tmp_path / "r.json"
    # The run is finished already: nothing is computed, everything is written once more.
    assert adapt(made, "--steps", "2", "--json", str(report)) == 0
    adapter = read_adapter(made / "out.safetensors")
    assert adapter.facts.mode is SharingMode.KEY
    assert adapter.facts.layer_groups == GROUPS
    # Layer 1 of KV head 0 has no keys; layer 0 has all of its own.
    assert set(adapter.changes) == {1}
    assert (made / "out.png").read_bytes().startswith(PNG)
    assert len((made / "out.csv").read_text().splitlines()) == 4
    results = json.loads(report.read_text())["results"]
    assert results["tokens"] == 2 * 2 * 420
    assert set(results["held"]) == {"0", "2"}
    assert results["adapter_bytes"] == (made / "out.safetensors").stat().st_size
    assert "going on after 2 steps" in capsys.readouterr().err


def test_a_longer_run_goes_on_and_other_settings_are_refused(made, capsys) -> None:
    assert adapt(made, "--steps", "1", out="more.safetensors") == 0
    assert adapt(made, "--steps", "3", out="more.safetensors") == 0
    assert "going on after 1 steps" in capsys.readouterr().err
    assert adapt(made, "--steps", "3", "--seed", "8", out="more.safetensors") == 2
    assert "with other settings" in capsys.readouterr().err
    assert adapt(made, "--steps", "1", "--held", str(made / "a"), out="other.safetensors") == 2
    assert "also among the texts that are trained on" in capsys.readouterr().err
    assert adapt(made, "--steps", "1", "--matrices", "head", out="other.safetensors") == 2
    assert "--matrices" in capsys.readouterr().err


def test_an_adapted_worker_serves_nothing_but_recipes_that_share(made) -> None:
    engine = adapted(made)
    assert engine.info.recipes == ("pod", "pod-exact")
    assert engine.info.default_recipe == "pod"
    drive = Drive(engine)
    drive.submit("s", POD, document=tokens(600), prompt=tokens(5, 1), sampling=answering(4))
    drive.run()
    assert drive.finished
    with pytest.raises(InvalidRequest, match="promises the model as it is") as refused:
        drive.submit("d", DENSE, document=tokens(40))
    assert refused.value.reason == "model_adapted"


def test_its_weights_are_other_weights(made) -> None:
    from kvservice.evaluation.calls import read_document
    from kvservice.types import SessionId

    found = []
    for engine in (adapted(made), engine_of(made, sharing="key")):
        read_document(engine, SessionId("s"), POD_EXACT, tokens(400))
        found.append(engine.score(SessionId("s"), tokens(3, 5)))
    assert not torch.equal(*found)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"sharing": "score"}, "say --sharing key"),
        ({"recipe": "recall"}, "choose pod or pod-exact"),
        ({"sharing_map": None}, "needs? a map|name a map|without a map"),
        ({"adapter": "none.safetensors"}, "isn't a whole safetensors file"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(made, settings, reason) -> None:
    with pytest.raises(ConfigError, match=reason):
        adapted(made, **settings)


def test_another_map_or_model_is_refused(made, tmp_path) -> None:
    other = write_map(tmp_path / "other.json", made / "tiny", replace(GROUPS, anchors=((0, 0), (0, 0))))
    with pytest.raises(ConfigError, match="trained for other layer groups"):
        adapted(made, sharing_map=str(other))
    folder = write_tiny_checkpoint(tmp_path / "tiny", seed=1)
    given = {**SMALL, "model": str(folder), "sharing_map": str(write_map(tmp_path / "m.json", folder))}
    given |= {"adapter": str(made / "out.safetensors"), "recipe": "pod", "sharing": "key"}
    with pytest.raises(ConfigError, match="the adapter was trained for 'tiny'"):
        make_engine(worker_config(given), folder)


def test_kv_of_an_adapted_model_is_other_kv(made) -> None:
    found = []

    class Frames:
        """Takes no frames."""

    for more in ({}, {"adapter": str(made / "out.safetensors"), "recipe": "pod", "sharing": "key"}):
        given = {"model": str(made / "tiny"), **SMALL, "sharing_map": str(made / "map.json"), **more}
        sets = FrameSets()
        make_engine(worker_config(given), made / "tiny", Frames(), None, sets)
        found += [sets.of(POD).fingerprint, sets.whole.fingerprint]
    assert len(set(found)) == 4


def test_weights_of_an_adapter_are_not_served_without_a_map(made) -> None:
    from kvservice.config.engine import EngineConfig
    from kvservice.engine import Engine
    from kvservice.engine.ports import NoWriter

    config = worker_config({"model": str(made / "tiny"), **SMALL})
    model = compose.open_model(config, made / "tiny", read_adapter(made / "out.safetensors"))
    with pytest.raises(ConfigError, match="adapter without a map"):
        Engine(model, EngineConfig(kv_bytes=32 << 20, host_bytes=32 << 20), NoWriter())
    assert SharingPlan(GROUPS).num_followers == 1
