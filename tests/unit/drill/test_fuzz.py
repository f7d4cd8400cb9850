"""The fuzzer finds what is wrong with a parser; and the service's own parsers stand it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvservice.drill.fuzz import FalseAcceptanceError, Fuzzer, Mutator, Target
from kvservice.drill.fuzz_targets import targets

CORPUS = Path(__file__).parents[2] / "corpus"
INPUTS = 1500
NAMES = (
    *("frames", "sealed", "replies", "manifests", "messages", "maps", "keys", "settings", "seals", "bodies"),
    "documents",
)


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    found = {target.name: target for target in targets(tmp_path_factory.mktemp("fuzz"))}
    assert tuple(found) == NAMES
    return found


def silent(_: int) -> None:
    return


def parse(data: bytes) -> str:
    """Wrong in one deep place."""
    if not data.startswith(b"ab"):
        return "refused: magic"
    if len(data) > 6 and data[2] == 7:
        raise IndexError("too far")
    return "accepted"


def test_a_parser_that_raises_is_found_once_and_its_input_kept(tmp_path):
    target = Target("small", (b"ab\x06xxxx",), parse, ("test_fuzz",))
    report = Fuzzer(target, 1, tmp_path).run(20_000, silent)
    assert [finding.what for finding in report.findings] == ["IndexError: too far"]
    assert report.findings[0].data[:3] == b"ab\x07"
    assert [path.read_bytes() for path in (tmp_path / "small").glob("finding-*")] == [report.findings[0].data]
    assert report.lines >= 4
    # What was kept is where the next run begins.
    again = Fuzzer(target, 2, tmp_path).run(1, silent)
    assert len(again.findings) == 1


def test_false_acceptance_is_a_finding_each_time():
    def gullible(data: bytes) -> str:
        if data != b"right":
            raise FalseAcceptanceError("taken")
        return "accepted"

    report = Fuzzer(Target("gullible", (b"right",), gullible, ()), 1, None).run(1000, silent)
    assert len(report.findings) > 1


def test_equal_seeds_give_equal_inputs():
    def made(seed):
        mutator = Mutator(random.Random(seed))
        return [mutator.mutate(b"some data to change", b"other") for _ in range(50)]

    assert made(1) == made(1) != made(2)


@pytest.mark.parametrize("name", NAMES)
def test_every_parser_stands_the_fuzzer_and_the_kept_corpus(known, name, tmp_path):
    for path in CORPUS.glob(f"{name}/*"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / path.name).write_bytes(path.read_bytes())
    report = Fuzzer(known[name], 3, tmp_path).run(INPUTS, silent)
    assert report.findings == ()
    assert report.inputs >= INPUTS
    assert any(verdict.startswith("accepted") for verdict in report.verdicts)
    assert any(verdict.startswith("refused") for verdict in report.verdicts)


@pytest.mark.parametrize("name", NAMES)
@given(data=st.binary(max_size=600))
def test_any_bytes_are_refused_with_a_reason_or_are_right(known, name, data):
    assert known[name].feed(data).split(":")[0] in ("accepted", "refused")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize("name", ["maps", "keys", "settings", "seals"])
@given(data=st.data())
def test_json_of_any_kind_is_refused_with_a_reason_or_is_right(known, name, data):
    seed = json.loads(data.draw(st.sampled_from([each for each in known[name].seeds if each.startswith(b"{")])))
    for key in data.draw(st.lists(st.sampled_from([*seed, "other"]), max_size=2)):
        seed[key] = data.draw(JSON)
    assert known[name].feed(json.dumps(seed).encode()).split(":")[0] in ("accepted", "refused")
