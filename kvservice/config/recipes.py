"""The recipes there are. Knows nothing of how they are carried out."""

from __future__ import annotations

from dataclasses import replace

from kvservice.errors import NotFound
from kvservice.types import Distant, RecipeSpec

DENSE = RecipeSpec("dense", Distant.RESIDENT, "All KV on the device: the baseline.")

EXACT = RecipeSpec(
    "exact",
    Distant.STREAM,
    "Distant KV in the tier, every token attended to. Equals dense to 1e-3 in fp32; slow.",
)

RECALL = RecipeSpec(
    "recall",
    Distant.RECALL,
    "Distant KV in the tier; each query recalls the 128 tokens a KV head that a 2-bit index of the keys ranks first.",
    index="key_index",
    index_bits=2,
    index_params=2,
    recalled_tokens=128,
)

CLUSTERKV = RecipeSpec(
    "clusterkv",
    Distant.RECALL,
    "Distant KV in the tier; each query recalls whole clusters of tokens whose keys are alike, 512 tokens a KV head.",
    index="clusterkv",
    tokens_per_cluster=80,
    recalled_tokens=512,
    per_query_head=True,
    # Until kernels do it: in torch, one such session holds up the steps of all others.
    evaluation_only=True,
)

POD_EXACT = replace(
    EXACT,
    name="pod-exact",
    summary="Exact, with distant keys stored once for each group of layers that attend alike. Needs a map of them.",
    shares_keys=True,
)

POD = replace(
    RECALL,
    name="pod",
    summary="Recall, with distant keys stored, indexed and chosen by once for each such group. Needs a map of them.",
    shares_keys=True,
)

BASELINES = (
    replace(
        CLUSTERKV,
        name="clusterkv-per-kv-head",
        summary="ClusterKV whose query heads choose together.",
        per_query_head=False,
    ),
    replace(
        RECALL,
        name="recall-per-query-head",
        summary="Recall for which the query heads of a KV head choose in turn.",
        per_query_head=True,
        evaluation_only=True,
    ),
    replace(
        RECALL,
        name="recall-paged",
        summary="Recall that scores only groups whose bound lets them hold any of the best tokens.",
        index="paged_key_index",
        evaluation_only=True,
    ),
    replace(
        RECALL,
        name="recall-quest",
        summary="Recall of Quest's pages of 16 tokens.",
        index="quest",
        index_bits=0,
        index_params=8,
        evaluation_only=True,
    ),
    replace(
        RECALL,
        name="recall-oracle",
        summary="Recall that ranks by the true keys: the ceiling of any index.",
        index="oracle",
        index_bits=16,
        index_params=0,
        evaluation_only=True,
    ),
    replace(
        RECALL,
        name="recall-random",
        summary="Recall of random tokens: a floor.",
        index="random",
        index_bits=0,
        index_params=0,
        evaluation_only=True,
    ),
    replace(
        RECALL,
        name="recall-recency",
        summary="Recall of the latest distant tokens: a floor.",
        index="recency",
        index_bits=0,
        index_params=0,
        evaluation_only=True,
    ),
)

RECIPES: dict[str, RecipeSpec] = {
    recipe.name: recipe for recipe in (DENSE, EXACT, RECALL, POD, POD_EXACT, CLUSTERKV, *BASELINES)
}

SERVED_RECIPES: tuple[str, ...] = tuple(name for name, recipe in RECIPES.items() if not recipe.evaluation_only)

"""What the service knows. Those that share keys are served by workers that have a map."""

DEFAULT_RECIPE = RECALL.name


PLAIN_RECIPES: tuple[str, ...] = tuple(name for name in SERVED_RECIPES if not RECIPES[name].shares_keys)
"""Those that every worker serves."""


def served_recipes(*, shares_keys: bool) -> tuple[str, ...]:
    """The recipes that a worker serves.

    Args:
        shares_keys: whether it has a map of the layers that share distant keys.
    """
    return SERVED_RECIPES if shares_keys else PLAIN_RECIPES


def get_recipe(name: str) -> RecipeSpec:
    """The recipe called `name`.

    Raises:
        NotFound: there is none; the message lists those there are.
    """
    try:
        return RECIPES[name]
    except KeyError:
        raise NotFound(f"unknown recipe {name!r}: known are {', '.join(RECIPES)}", reason="unknown_recipe") from None
