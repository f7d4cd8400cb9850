"""Which model and recipe a request means. Knows nothing of sessions."""

from __future__ import annotations

from kvservice.config.recipes import RECIPES, SERVED_RECIPES
from kvservice.errors import FailedPrecondition, InvalidRequest, NotFound
from kvservice.gateway.fleet import Fleet
from kvservice.types import ModelInfo, RecipeSpec


def choose_model(fleet: Fleet, name: str, default: str) -> ModelInfo:
    """The model called `name`; without a name the default one, or the only one there is.

    Raises:
        NotFound: there is none of that name.
        InvalidRequest: no name, no default, and several models.
        Unavailable: no worker is connected.
    """
    wanted = name or default
    models = fleet.models()
    if wanted or not models:
        return fleet.model(wanted)
    if len(models) > 1:
        raise InvalidRequest(f"model is empty and there are several: name one of {', '.join(models)}", field="model")
    return next(iter(models.values()))


def served_recipes(model: ModelInfo) -> list[str]:
    """The recipes that a session of `model` may have."""
    return [name for name in model.recipes if name in SERVED_RECIPES]


def choose_recipe(model: ModelInfo, name: str, default: str) -> RecipeSpec:
    """The recipe called `name`; without a name the service's default, or else the model's.

    Raises:
        NotFound: no such recipe is served with this model.
    """
    wanted = name or default or model.default_recipe
    served = served_recipes(model)
    if wanted not in served:
        raise NotFound(
            f"unknown recipe {wanted!r}: model {model.name!r} is served with {', '.join(served)}",
            reason="unknown_recipe",
        )
    return RECIPES[wanted]


OVERRIDES = {("recall", "exact"), ("pod", "pod-exact")}
"""What a call may ask for although its session was created with the other: it needs nothing that was dropped."""


def override_recipe(model: ModelInfo, of_session: str, wanted: str) -> RecipeSpec:
    """The recipe of one call of a session: the session's, or one that needs nothing the session has dropped.

    Raises:
        NotFound: no such recipe is served with this model.
        FailedPrecondition: the session's KV can't serve `wanted`.
    """
    recipe = choose_recipe(model, wanted or of_session, "")
    if recipe.name != of_session and (of_session, recipe.name) not in OVERRIDES:
        raise FailedPrecondition(
            f"a session of recipe {of_session!r} can't answer with {recipe.name!r}: only recall may be overridden, by "
            "exact, and pod by pod-exact; create a session with the other recipe",
            reason="recipe_override",
            field="recipe",
        )
    return recipe
