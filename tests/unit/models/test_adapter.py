"""An adapter read back is the adapter written, or it is refused with the reason."""

from __future__ import annotations

import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvservice.compression.layer_groups import LayerGroups
from kvservice.compression.sharing import SharingMode, SharingPlan
from kvservice.compression.sharing_map import ModelFacts
from kvservice.errors import ConfigError
from kvservice.models.adapter import AdapterFacts, LowRank, adapt, read_adapter, write_adapter
from kvservice.models.families.llama import LLAMA
from kvservice.models.sharing import model_facts
from kvservice.models.tiny import InMemory, tiny_spec, tiny_tensors

GROUPS = LayerGroups(((0, 0), (0, 1)))
SPEC = tiny_spec()
FACTS = AdapterFacts(
    tool="a test",
    model=model_facts(SPEC),
    groups=GROUPS.runs,
    mode=SharingMode.KEY,
    training={"steps": 3, "held_kl": 0.5, "seed": None},
)


def some_changes():
    drawn = torch.Generator().manual_seed(0)
    return {
        1: {
            "qkv": LowRank(torch.randn(2, 64, generator=drawn), torch.randn(128, 2, generator=drawn)),
            "o": torch.randn(64, 64, generator=drawn),
        }
    }


@pytest.fixture
def path(tmp_path):
    write_adapter(tmp_path / "a.safetensors", FACTS, some_changes())
    return tmp_path / "a.safetensors"


def rewrite(path, change_facts=lambda facts: None, change_tensors=lambda tensors: None, metadata=None) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["kvservice"])
    tensors = load_file(path)
    change_facts(facts)
    change_tensors(tensors)
    save_file(tensors, path, metadata={"kvservice": json.dumps(facts)} if metadata is None else metadata)


def test_what_is_read_is_what_was_written(path) -> None:
    read, digest = read_adapter(path), write_adapter(path.with_name("b"), FACTS, some_changes())
    assert read.facts == FACTS
    assert read.digest == digest
    assert torch.equal(read.changes[1]["qkv"].b, some_changes()[1]["qkv"].b.bfloat16())
    assert torch.equal(read.changes[1]["o"], some_changes()[1]["o"].bfloat16())
    assert path.read_bytes() == path.with_name("b").read_bytes()


def test_changes_are_added_to_the_weights(path) -> None:
    source = InMemory(tiny_tensors(SPEC, 0))
    before = list(LLAMA.weights(SPEC, source).layers)
    adapter = read_adapter(path)
    spec, weights = adapt(SPEC, LLAMA.weights(SPEC, source), adapter)
    after = list(weights.layers)
    assert torch.equal(after[0].qkv, before[0].qkv)
    change = adapter.changes[1]["qkv"]
    torch.testing.assert_close(after[1].qkv - before[1].qkv, change.b.float() @ change.a.float())
    assert not torch.equal(after[1].o, before[1].o)
    assert torch.equal(after[1].down, before[1].down)
    assert spec.adapter == adapter.digest
    assert spec.digest == SPEC.digest
    assert "adapted" in spec.origin


@pytest.mark.parametrize(
    ("change_facts", "change_tensors", "reason"),
    [
        (lambda facts: facts.update(version=2), None, "version"),
        (lambda facts: facts.update(format="other"), None, "format"),
        (lambda facts: facts.update(extra=1), None, "extra"),
        (lambda facts: facts.update(mode="both"), None, "mode"),
        (lambda facts: facts.update(checksum="00"), None, "checksum"),
        (lambda facts: facts.pop("checksum"), None, "checksum"),
        (lambda facts: facts["training"].update(steps=4), None, "checksum"),
        (lambda facts: facts.update(groups=[[[0, 1]], [[1]]]), None, "each layer from 0 on"),
        (lambda facts: facts.update(groups=[[[0, 1]]]), None, "aren't of its model's"),
        (None, lambda tensors: tensors["layers.1.o.change"].add_(1), "checksum"),
        (None, lambda tensors: tensors.update({"x": torch.zeros(1)}), "checksum"),
    ],
)
def test_a_damaged_adapter_is_refused(path, change_facts, change_tensors, reason) -> None:
    rewrite(path, change_facts or (lambda facts: None), change_tensors or (lambda tensors: None))
    with pytest.raises(ConfigError, match=reason) as refused:
        read_adapter(path)
    assert refused.value.reason == "adapter_damaged"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({7: {"o": torch.zeros(64, 64)}}, "changes layer 7 of 2"),
        ({0: {"head": torch.zeros(4, 4)}}, "none of an adapter's"),
        ({0: {"o": torch.full((64, 64), torch.nan)}}, "NaN"),
        ({0: {"o": LowRank(torch.zeros(2, 64), torch.zeros(64, 3))}}, "no layers.0.o.b that goes with"),
        ({0: {"o": torch.zeros(64)}}, "no matrix of numbers"),
    ],
    ids=str,
)
def test_a_whole_file_that_makes_no_sense_is_refused(tmp_path, changes, reason) -> None:
    path = tmp_path / "a.safetensors"
    write_adapter(path, FACTS, changes)
    with pytest.raises(ConfigError, match=reason):
        read_adapter(path)


def test_files_that_are_no_adapters_are_refused(path, tmp_path) -> None:
    with pytest.raises(ConfigError, match="isn't a whole safetensors file"):
        read_adapter(tmp_path / "none")
    with pytest.raises(ConfigError, match="isn't a whole safetensors file"):
        read_adapter(tmp_path)
    for metadata in ({}, {"kvservice": "{"}, {"kvservice": "[]"}, {"kvservice": "[" * 5000}):
        rewrite(path, metadata=metadata)
        with pytest.raises(ConfigError, match=r"no facts of an adapter|is damaged"):
            read_adapter(path)
        write_adapter(path, FACTS, some_changes())


def test_mutated_files_are_refused_and_nothing_else_happens(path) -> None:
    whole, drawn = path.read_bytes(), random.Random(7)
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(drawn.choice((1, 1, 2, 8))):
            match drawn.randrange(4):
                case 0:
                    data[drawn.randrange(len(data))] = drawn.randrange(256)
                case 1:
                    del data[drawn.randrange(len(data)) :]
                case 2:
                    at = drawn.randrange(len(data) + 1)
                    data[at:at] = drawn.randbytes(drawn.randrange(1, 9))
                case _:
                    at = drawn.randrange(min(len(data), 1500) or 1)
                    data[at : at + 1] = drawn.choice((b'"', b"}", b"0", b"-", b"[", b""))
            if not data:
                break
        path.write_bytes(data)
        if bytes(data) == whole:
            continue
        try:
            found = read_adapter(path)
        except ConfigError:
            continue
        # Spaces between JSON's words may come and go.
        assert found.facts == FACTS
        assert set(found.changes) == {1}


def test_another_model_map_or_mode_is_refused(path) -> None:
    adapter = read_adapter(path)
    adapter.check_model(model_facts(SPEC))
    adapter.check_plan(SharingPlan(GROUPS, SharingMode.KEY))
    with pytest.raises(ConfigError, match="weights_digest tiny there, other here") as refused:
        adapter.check_model(ModelFacts(**{**model_facts(SPEC).model_dump(), "weights_digest": "other"}))
    assert refused.value.reason == "adapter_other_model"
    with pytest.raises(ConfigError, match="trained for other layer groups") as refused:
        adapter.check_plan(SharingPlan(LayerGroups(((0, 0), (0, 0))), SharingMode.KEY))
    assert refused.value.reason == "adapter_other_map"
    with pytest.raises(ConfigError, match="say --sharing key") as refused:
        adapter.check_plan(SharingPlan(GROUPS, SharingMode.SCORE))
    assert refused.value.reason == "adapter_other_mode"


def test_a_change_that_does_not_fit_its_matrix_is_refused(tmp_path) -> None:
    write_adapter(tmp_path / "a", FACTS, {0: {"o": torch.zeros(64, 32)}})
    _, weights = adapt(SPEC, LLAMA.weights(SPEC, InMemory(tiny_tensors(SPEC, 0))), read_adapter(tmp_path / "a"))
    with pytest.raises(ConfigError, match=r"layer 0, o is .64, 32., the matrix is .64, 64."):
        list(weights.layers)
