"""A map read back is the map written, or it is refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kvservice.compression.layer_groups import Linkage, Per
from kvservice.compression.sharing_map import (
    CalibrationText,
    Grouping,
    Measurement,
    ModelFacts,
    SharingMap,
    _digest,
    read_map,
)
from kvservice.errors import ConfigError

MODEL = ModelFacts(
    name="small",
    origin="a test",
    weights_digest="ab12",
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rope_theta=10_000.0,
    qk_norm=False,
)
MEASUREMENT = Measurement(
    texts=(CalibrationText(name="a.txt", sha256="00ff", first_token=3),),
    context_tokens=2048,
    queries=64,
    sink_tokens=16,
    distant_tokens=1664,
    dtype="bf16",
    seed=7,
)
MATRIX = ((1.0, 0.75, 0.25), (0.75, 1.0, 0.5), (0.25, 0.5, 1.0))
MAP = SharingMap(
    tool="a test",
    model=MODEL,
    model_fingerprint=MODEL.fingerprint,
    measurement=MEASUREMENT,
    text_digest=MEASUREMENT.text_digest,
    grouping=Grouping(delta=0.5, linkage=Linkage.ANCHOR, per=Per.KV_HEAD, similarity="js", save_fraction=None),
    groups=(((0, 1), (2,)), ((0,), (1, 2))),
    distant_mass=((0.5, 0.25, 0.125),) * 2,
    similarity=(MATRIX, MATRIX),
    mass_similarity=(((1.0,) * 3,) * 3,) * 2,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    MAP.write(tmp_path / "map.json")
    return tmp_path / "map.json"


def change(path: Path, edit: Callable[[dict], None], *, keep_checksum: bool = False) -> None:
    """Edits a map as somebody would who knows the checksum."""
    record = json.loads(path.read_text())
    checksum = record.pop("checksum")
    edit(record)
    path.write_text(json.dumps({**record, "checksum": checksum if keep_checksum else _digest(record)}))


def test_a_map_comes_back_as_it_was(path: Path) -> None:
    read = read_map(path, MODEL)
    assert read == MAP
    assert read.layer_groups.anchors == ((0, 0, 2), (0, 1, 1))
    assert read.grouped_by == read.similarity


def test_the_name_of_a_model_does_not_matter(path: Path) -> None:
    read_map(path, MODEL.model_copy(update={"name": "renamed", "origin": "elsewhere"}))


@pytest.mark.parametrize(
    ("update", "words"),
    [
        ({"weights_digest": "cd34"}, "weights_digest ab12 there, cd34 here"),
        ({"rope_theta": 5e5}, "rope_theta 10000.0 there, 500000.0 here"),
        ({"num_layers": 30, "name": "large"}, "was made for 'small', not for this 'large'"),
    ],
)
def test_a_map_of_another_model_is_refused(path: Path, update: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match="was made for") as refused:
        read_map(path, MODEL.model_copy(update=update))
    assert words in refused.value.message
    assert refused.value.reason == "map_other_model"


def test_a_map_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file") as refused:
        read_map(tmp_path / "none.json", MODEL)
    assert refused.value.reason == "map_missing"


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_an_unknown_version_is_refused(path: Path, version: object) -> None:
    change(path, lambda record: record.update(version=version))
    with pytest.raises(ConfigError, match="this release reads 1") as refused:
        read_map(path, MODEL)
    assert refused.value.reason == "map_version"


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"[]", b"{}", b'{"format": "else", "version": 1}'])
def test_a_file_that_is_no_map_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="is damaged") as refused:
        read_map(path, MODEL)
    assert refused.value.reason == "map_damaged"


def test_a_map_cut_anywhere_is_refused(path: Path) -> None:
    whole = path.read_bytes().rstrip()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match="is damaged"):
            read_map(path, MODEL)


def test_a_changed_figure_is_seen_by_the_checksum(path: Path) -> None:
    change(path, lambda record: record["distant_mass"][0].__setitem__(0, 0.75), keep_checksum=True)
    with pytest.raises(ConfigError, match="checksum"):
        read_map(path, MODEL)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda record: record.update(groups=[[[0, 2], [1]], [[0, 1, 2]]]), "KV head 0 has [[0, 2], [1]]"),
        (lambda record: record.update(groups=[[[0, 1]], [[0], [1, 2]]]), "KV head 1 has 3 layers, KV head 0 has 2"),
        (lambda record: record.update(groups=[[[0, 1]], [[0], [1]]]), "of 2 layers, the model has"),
        (lambda record: record["grouping"].update(per="layer"), "differ between KV heads"),
        (lambda record: record["grouping"].update(linkage="single"), "grouping.linkage"),
        (lambda record: record["grouping"].update(delta=-1), "grouping.delta"),
        (lambda record: record["similarity"][0][0].__setitem__(1, 1.5), "similarity.0.0.1"),
        (lambda record: record["similarity"][0][0].__setitem__(1, 0.7), "similarity isn't symmetric"),
        (lambda record: record["similarity"][0][0].__setitem__(1, "0.75"), "similarity.0.0.1"),
        (lambda record: record["similarity"][1].pop(), "similarity isn't 2 matrices of 3 x 3"),
        (lambda record: record["mass_similarity"].pop(), "mass_similarity isn't 2 matrices of 3 x 3"),
        (lambda record: record["distant_mass"].pop(), "distant_mass isn't 2 rows of 3"),
        (lambda record: record["model"].update(rope_theta=5e5), "model_fingerprint isn't that of model"),
        (lambda record: record["measurement"].update(context_tokens=4096), "text_digest isn't that of measurement"),
        (lambda record: record.pop("groups"), "groups: Field required"),
        (lambda record: record.update(extra=1), "extra: Extra inputs"),
    ],
)
def test_a_map_that_contradicts_itself_is_refused(path: Path, edit: Callable[[dict], None], words: str) -> None:
    change(path, edit)
    with pytest.raises(ConfigError, match="is damaged") as refused:
        read_map(path, MODEL)
    assert words in refused.value.message
    assert refused.value.reason == "map_damaged"


def test_a_map_that_cannot_be_written_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be written"):
        MAP.write(tmp_path / "none" / "map.json")
