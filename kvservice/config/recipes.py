"""The recipes there are. Knows nothing of how they are carried out."""

from __future__ import annotations

from dataclasses import replace

from kvservice.errors import NotFound
from kvservice.types import Distant, Eviction, RecipeSpec, Reuse

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

KEPT_TOKENS = 512
"""That a KV head keeps, of recipes that drop tokens."""

READ_TOKENS = 4096
"""That it holds while it reads: documents up to this are read whole before anything is dropped, as in the papers."""

STRIDE_TOKENS = 128
"""Of methods that drop tokens while they read."""


def _evicting(
    name: str,
    summary: str,
    read_tokens: int = READ_TOKENS,
    *,
    positions: str | None = None,
    allocator: str | None = None,
    merger: str | None = None,
    packed: tuple[str | None, int] = (None, 0),
    remembers: int = 0,
) -> RecipeSpec:
    eviction = Eviction(name, KEPT_TOKENS, read_tokens, positions, allocator, merger, *packed, remembers)
    return RecipeSpec(name, Distant.EVICT, summary, eviction=eviction)


EVICTING = (
    _evicting(
        "streaming_llm",
        "The first 4 and the latest 508 tokens, at the positions that they have among them.",
        KEPT_TOKENS + STRIDE_TOKENS,
        positions="streaming_llm",
    ),
    _evicting("h2o", "The latest 256 tokens, and 256 that attracted most attention so far.", remembers=1),
    _evicting(
        "scissorhands",
        "Up to 512 tokens; the half that the last 400 queries looked at least goes at once.",
        remembers=1,
    ),
    _evicting(
        "l2_norm", "The 448 tokens whose keys have the smallest norm, and up to 64 that came since.", remembers=1
    ),
    _evicting("keyformer", "The latest 153 tokens, and 359 that attracted most attention, with noise.", remembers=1),
    _evicting("sepllm", "The first 4 tokens, the latest 128 separators, and a window of 256 to 380."),
    _evicting("chunkkv", "The latest 64 to 128 tokens, and the chunks of 10 that these look at most.", remembers=1),
    _evicting(
        "cascading_kv",
        "The first 64 tokens, and four windows of 112, each sparser than the one before, at contiguous positions.",
        KEPT_TOKENS + STRIDE_TOKENS,
        positions="cascading_kv",
        remembers=1,
    ),
    _evicting(
        "d2o",
        "As h2o, 512 tokens on average over layers that get more or fewer; dropped ones are merged into similar ones.",
        allocator="d2o",
        merger="d2o",
        remembers=1,
    ),
    _evicting(
        "more_tokens",
        "Up to 1,440 tokens that the last 8 queries looked at, in 4 bits, and the latest 8 to 80: bytes of 512 tokens.",
        packed=("more_tokens", 4),
        remembers=1,
    ),
)
"""Those that drop tokens for good. A session of any length takes a bounded number of bytes."""

REUSING = (
    RecipeSpec(
        "tidal_decode",
        Distant.RESIDENT,
        "All KV on the device; most layers look at the 256 tokens that an earlier layer found, for each query head.",
        reuse=Reuse("tidal_decode"),
    ),
    RecipeSpec(
        "recycled_attention",
        Distant.RESIDENT,
        "All KV on the device; most tokens look at the 512 tokens that a token before found, and those since.",
        reuse=Reuse("recycled_attention"),
    ),
)
"""Those that keep everything and look at little of it: they save time, not memory."""

BASELINES = (
    replace(
        _evicting("dropping_random", "The first 4 tokens, the latest 256, and random ones between: a floor."),
        name="drop-random",
        evaluation_only=True,
    ),
    replace(
        _evicting("streaming_llm", "The first 4 tokens and the latest 508, where they stood: a floor."),
        name="drop-recency",
        evaluation_only=True,
    ),
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
    recipe.name: recipe for recipe in (DENSE, EXACT, RECALL, POD, POD_EXACT, CLUSTERKV, *EVICTING, *REUSING, *BASELINES)
}

SERVED_RECIPES: tuple[str, ...] = tuple(name for name, recipe in RECIPES.items() if not recipe.evaluation_only)

"""What the service knows. Those that share keys are served by workers that have a map."""

DEFAULT_RECIPE = RECALL.name


PLAIN_RECIPES: tuple[str, ...] = tuple(
    name
    for name in SERVED_RECIPES
    if not RECIPES[name].shares_keys and RECIPES[name].eviction is None and RECIPES[name].reuse is None
)
"""Those of this service's own: every worker serves them, and no published method has a say in them."""


def served_recipes(*, shares_keys: bool, is_adapted: bool = False) -> tuple[str, ...]:
    """The recipes that a worker serves.

    Args:
        shares_keys: whether it has a map of the layers that share distant keys.
        is_adapted: whether its weights were trained for that. Other recipes promise the model as it is.
    """
    served = {True, False} if shares_keys and not is_adapted else {shares_keys}
    return tuple(name for name in SERVED_RECIPES if RECIPES[name].shares_keys in served)


def get_recipe(name: str) -> RecipeSpec:
    """The recipe called `name`.

    Raises:
        NotFound: there is none; the message lists those there are.
    """
    try:
        return RECIPES[name]
    except KeyError:
        raise NotFound(f"unknown recipe {name!r}: known are {', '.join(RECIPES)}", reason="unknown_recipe") from None
