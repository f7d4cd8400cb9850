from __future__ import annotations

import pytest

from kvservice.config.recipes import DEFAULT_RECIPE, RECIPES, get_recipe, served_recipes
from kvservice.errors import NotFound
from kvservice.types import GROUP_TOKENS, Distant


def test_dense_exact_and_recall_are_served_and_recall_is_the_default() -> None:
    assert served_recipes(shares_keys=False) == ("dense", "exact", "recall")
    assert DEFAULT_RECIPE == "recall"


def test_recipes_that_share_keys_are_served_besides_where_there_is_a_map() -> None:
    assert served_recipes(shares_keys=True) == ("dense", "exact", "recall", "pod", "pod-exact")


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
