import pytest
import torch

from kvservice.compression.methods import METHODS
from kvservice.config.recipes import EVICTING, RECIPES, REUSING
from kvservice.errors import ConfigError
from kvservice.evaluation.attention_mass import dense_weights, most_mass
from kvservice.evaluation.controls import CONTROLS
from kvservice.evaluation.methods_log import Asked, Log
from kvservice.evaluation.methods_table import COMPARED, Case, cases, measure_text, spec_of, summarize
from kvservice.models.tiny import tiny_model
from tests.unit.engine.driving import make_engine, tokens

METHODS.discover("kvservice.methods")
CONTEXT = 300
TEXT = ("text", tokens(CONTEXT + 13))


@pytest.fixture(scope="module")
def engine():
    # Heads that are as wide as a packed group is long, so that keys can be packed as values are.
    return make_engine(tiny_model(seed=0, head_dim=32))


def measured(engine, *wanted, log=None, report=lambda _: None):
    return measure_text(engine, log or Log(None), wanted, TEXT, CONTEXT, report)


def test_recipes_that_draw_numbers_are_measured_with_several_seeds():
    found = cases(["dense", "h2o", "keyformer", "recall-oracle"], [256, 96], 2)
    assert [case[:3] for case in found] == [
        ("dense", 0, 0),
        *(("h2o", kept, 0) for kept in (256, 96)),
        *(("keyformer", kept, seed) for kept in (256, 96) for seed in (0, 1)),
        ("recall-oracle", 256, 0),
    ]
    assert spec_of(Case("keyformer", 96, 1), 2).eviction.params == (("seed", 1),)


def test_every_method_has_a_control():
    assert set(CONTROLS) == {recipe.name for recipe in (*EVICTING, *REUSING)}


def test_dense_beside_itself_is_no_distance_away(engine):
    [one] = measured(engine, Case("dense", 0))
    assert max(one.kl) < 1e-5
    assert all(one.agrees)
    assert one.tokens_read == CONTEXT + 12
    assert one.device_bytes >= one.dense_bytes


@pytest.mark.parametrize("name", [*CONTROLS, "drop-random", "drop-recency"])
def test_methods_and_their_broken_twins_are_measured_at_equal_bytes(engine, name):
    own, *twin = measured(engine, *cases([name], [96], 1, controls=True))
    if RECIPES[name].eviction:
        assert own.device_bytes < 0.75 * own.dense_bytes
        assert 0 < sum(own.mass) / len(own.mass) < 1
        assert len(own.mass) == 3
    assert max(own.kl) > 0
    for broken in twin:
        assert broken.kl != own.kl
        assert broken.device_bytes <= 1.1 * own.device_bytes


def test_the_best_tokens_of_all_have_the_most_mass(engine):
    weights = dense_weights(engine, TEXT[1], CONTEXT)
    assert sorted(weights) == [CONTEXT, CONTEXT + 4, CONTEXT + 8]
    for position, some in weights.items():
        assert some.shape[1] == position + 1
        torch.testing.assert_close(some.float().sum(1), torch.ones(some.shape[0]), atol=5e-3, rtol=0)
        assert most_mass(some, position + 1) == pytest.approx(1, abs=5e-3)
    [held] = measured(engine, Case("h2o", 96))
    assert sum(held.mass) / 3 < sum(most_mass(some, 96) for some in weights.values()) / 3


def test_what_is_in_the_log_is_not_measured_again(engine, tmp_path):
    path, wanted = tmp_path / "log.jsonl", [Case("dense", 0), Case("h2o", 96)]
    first = measured(engine, *wanted, log=Log(path))
    log = Log(path)
    log.add(Asked(0, "h2o", 96, 400, 0, is_correct=True))
    assert measured(None, *wanted, log=Log(path)) == first
    assert Log(path).asked(0, "h2o", 96, 400, 0).is_correct
    path.write_text('{"other": 1}\n')
    with pytest.raises(ConfigError, match="isn't a log of this command"):
        Log(path)


def test_keys_that_dense_does_not_find_count_for_nothing(engine):
    some = measured(engine, Case("dense", 0), Case("h2o", 96))
    rows = summarize(some, {Case("dense", 0): [True, False, True], Case("h2o", 96): [True, True, False]}, 0)
    assert [row.found for row in rows] == [(2, 2), (1, 2)]
    nothing = summarize(some, {Case("dense", 0): [False] * 3, Case("h2o", 96): [True] * 3}, 0)
    assert [row.found for row in nothing] == [None, None]
    # Fewer tokens than a block of the bootstrap has: there is nothing to draw.
    assert rows[1].kl_interval == pytest.approx((rows[1].kl_mean, rows[1].kl_mean))


def test_all_compared_recipes_exist():
    assert set(COMPARED) <= set(RECIPES)
