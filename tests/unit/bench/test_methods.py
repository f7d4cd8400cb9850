from dataclasses import replace

from kvservice.bench.methods import MIXED, BatchTime, measure_batches, slowest
from kvservice.config.recipes import DENSE, RECIPES
from kvservice.models.tiny import tiny_model
from tests.unit.engine.driving import make_engine, tokens


def small(name):
    recipe = RECIPES[name]
    return replace(recipe, eviction=replace(recipe.eviction, kept_tokens=64, read_tokens=160))


def test_batches_of_one_recipe_and_a_mixed_one_are_timed_and_leave_nothing_behind():
    engine = make_engine(tiny_model(seed=0))
    told = []
    recipes = [DENSE, small("h2o"), small("streaming_llm")]
    times = measure_batches(engine, recipes, tokens(120), 4, 9, lambda: told.append(1))
    assert [one.name for one in times] == ["dense", "h2o", "streaming_llm", MIXED]
    assert len(told) == 4
    assert all(one.wall_ms > 0 and one.cpu_ms > 0 for one in times)
    assert engine.stats().window_bytes == 0


def test_the_slowest_is_looked_for_among_those_in_the_mix():
    times = [BatchTime("a", 9, 1.0), BatchTime("b", 1, 2.0), BatchTime("c", 1, 3.0)]
    assert slowest(times, ["a", "b"]).name == "b"
