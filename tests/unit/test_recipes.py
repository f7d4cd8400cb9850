from __future__ import annotations

import pytest

from kvservice.config.recipes import DEFAULT_RECIPE, EVICTING, RECIPES, REUSING, get_recipe, served_recipes
from kvservice.errors import NotFound
from kvservice.types import BLOCK_TOKENS, GROUP_TOKENS, Distant, Eviction, ModelShape, footprint, most_held

METHODS = tuple(recipe.name for recipe in (*EVICTING, *REUSING))


def test_dense_exact_recall_and_methods_are_served_and_recall_is_the_default() -> None:
    assert served_recipes(shares_keys=False) == ("dense", "exact", "recall", *METHODS)
    assert DEFAULT_RECIPE == "recall"


def test_recipes_that_share_keys_are_served_besides_where_there_is_a_map() -> None:
    assert served_recipes(shares_keys=True) == ("dense", "exact", "recall", "pod", "pod-exact", *METHODS)


def test_a_recipe_is_found_by_its_name() -> None:
    assert all(get_recipe(name).name == name for name in RECIPES)


def test_an_unknown_recipe_is_answered_with_the_known_ones() -> None:
    with pytest.raises(NotFound, match="unknown recipe 'rcall': known are dense, exact, recall") as caught:
        get_recipe("rcall")
    assert caught.value.reason == "unknown_recipe"


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda recipe: recipe.name)
def test_a_recipe_that_recalls_names_an_index_and_a_number_of_tokens(recipe) -> None:
    recalls = recipe.distant is Distant.RECALL
    assert (recipe.index is not None) == recalls
    assert (recipe.recalled_tokens > 0) == recalls
    assert recipe.window_tokens % GROUP_TOKENS == 0


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda recipe: recipe.name)
def test_a_recipe_drops_tokens_or_not_and_looks_at_few_only_where_all_are_there(recipe) -> None:
    assert (recipe.eviction is not None) == (recipe.distant is Distant.EVICT)
    assert recipe.reuse is None or recipe.distant is Distant.RESIDENT


@pytest.mark.parametrize("num_tokens", [1, 100, 512, 513, 5000, 100_000])
def test_a_session_that_drops_tokens_takes_no_more_however_long_it_is(num_tokens) -> None:
    shape = ModelShape(30, 9, 3, 64, 576, 1536, 49152, 8192)
    most = footprint(shape, RECIPES["h2o"], 513)
    own = footprint(shape, RECIPES["h2o"], num_tokens)
    assert own.device_bytes <= most.device_bytes
    assert own.host_bytes == 0
    assert most.device_bytes <= (512 + 2 * BLOCK_TOKENS) * shape.kv_bytes_per_token


def test_what_is_being_read_is_held_whole_up_to_a_limit() -> None:
    eviction = Eviction("h2o", kept_tokens=512, read_tokens=4096)
    assert most_held(eviction, 2000, 2000) == 2000
    assert most_held(eviction, 20_000, 20_000) == 4096
    assert most_held(eviction, 20_000, 100) == 612
    assert most_held(eviction, 20_000, 0) == 513
