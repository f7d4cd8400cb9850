"""What a published system provides for sequences that drop tokens. Knows no arena and no engine.

A method has no state. What is remembered of tokens belongs to the sequence, which hands it in:

    each layer, each step    attention ──► Scorer.observe ──► what is remembered of the layer's tokens
    too many tokens          BudgetAllocator ──► Scorer.score ──► the best stay ──► Merger ──► blocks are free

A *row* is a (layer, KV head), `layer * num_kv + kv_head`. A row's tokens lie in slots, in no order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from kvservice.errors import ConfigError
from kvservice.kernels.cpu import PackedPart
from kvservice.registry import Registry
from kvservice.types import Distant, Eviction, RecipeSpec

T = TypeVar("T")

EMPTY = -1
"""Position of a slot that holds no token."""


@dataclass(frozen=True, slots=True)
class Seen:
    """The attention of some queries in one layer.

    Attributes:
        layer: the layer.
        logits: fp32 `[kv, g, q, t]`, scaled; minus infinity where a query sees nothing.
        probs: fp32 `[kv, g, q, t]`, their softmax.
        positions: int64 `[kv, t]`, of the slots.
        first: position of the first query; the others follow it.
        num_after: queries that come behind the last of these before tokens are dropped next.
        num_answered: tokens of an answer before the first query; 0 of what is read.
    """

    layer: int
    logits: Tensor
    probs: Tensor
    positions: Tensor
    first: int
    num_after: int
    num_answered: int

    def among_last(self, window: int) -> slice:
        """Which of the queries are among the last `window` before tokens are dropped."""
        count = self.probs.shape[2]
        return slice(max(0, min(count, count + self.num_after - window)), count)


@dataclass(frozen=True, slots=True)
class Held:
    """All that a sequence holds when it must drop some.

    Attributes:
        positions: int64 `[rows, t]`; EMPTY where a slot holds none.
        num_tokens: of the sequence, dropped ones included; the newest has position `num_tokens - 1`.
        token_ids: of all of them.
        limits: int64 `[rows]`, the most that each row may hold. It keeps fewer by the scorer's slack.
        num_kv_heads: rows of a layer.
        remembered: what the scorer remembers, fp32 `[rows, t]` each.
        separators: ids of tokens that end a part of a sentence.
    """

    positions: Tensor
    num_tokens: int
    token_ids: Sequence[int]
    limits: Tensor
    num_kv_heads: int
    remembered: Mapping[str, Tensor]
    separators: frozenset[int] = frozenset()

    def pinned(self, sinks: int, recent: int | Tensor) -> Tensor:
        """Which slots hold one of the first `sinks` or the last `recent` tokens of the sequence, bool `[rows, t]`."""
        return (self.positions < sinks) | (self.positions >= self.num_tokens - recent)


class Scorer(Protocol):
    """Ranks tokens by their worth. Its settings are its fields, with the published defaults."""

    remembers: ClassVar[tuple[str, ...]] = ()
    """Numbers kept for each token and row; 0 of a new token."""
    restarts: ClassVar[bool] = False
    """They are 0 again once tokens were dropped."""
    goes_by_keys: ClassVar[bool] = False
    """What is remembered of a token follows from its key, see `meet`."""

    def watches(self, num_after: int) -> bool:  # noqa: ARG002 -- part of the protocol
        """Whether it must see the attention of a query behind which `num_after` come before tokens are dropped next.

        Attention that nobody must see is left to the fast kernels, which don't tell it.
        """
        return bool(self.remembers) and not self.goes_by_keys

    def meet(self, keys: Tensor) -> Mapping[str, Tensor]:  # noqa: ARG002 -- part of the protocol
        """What is remembered of new tokens, fp32 `[rows, n]` each, by their keys, fp32 `[rows, n, d]`."""
        return {}

    def slack(self, kept_tokens: int) -> int:  # noqa: ARG002 -- part of the protocol
        """How many tokens fewer than it may a row is left with, so that it drops some less often."""
        return 0

    def observe(self, seen: Seen, remembered: Mapping[str, Tensor]) -> Mapping[str, Tensor]:  # noqa: ARG002
        """What is remembered after some queries. What it is given stays as it is.

        Args:
            seen: their attention in a layer.
            remembered: of this layer, fp32 `[kv, t]` each.
        """
        return remembered

    def score(self, held: Held) -> Tensor:
        """The worth of each slot, fp32 `[rows, t]`: higher stays, infinity always, minus infinity never.

        Of empty slots anything.
        """
        ...


class PositionPolicy(Protocol):
    """Where kept tokens are taken to stand."""

    def places(self, positions: Tensor) -> Tensor:
        """The positions to rotate keys by, int64 `[kv, t]`; a query's is that of its own key.

        Args:
            positions: int64 `[kv, t]`, of the slots of a layer. EMPTY ones count for nothing.
        """
        ...


class BudgetAllocator(Protocol):
    """Shares out tokens among layers and KV heads."""

    def allocate(self, held: Held, num_blocks: int) -> Tensor:
        """How many blocks of 16 tokens each row may keep, int64 `[rows]`; asked when a sequence first drops tokens.

        Args:
            held: what there is; its limits are those of rows that are all alike.
            num_blocks: the most that all rows may keep together, at least one for each.
        """
        ...


@dataclass(frozen=True, slots=True)
class Dropping:
    """Of one layer: what stays and what goes.

    Attributes:
        keys: `[kv, t, d]` fp32.
        values: `[kv, t, d]` fp32.
        stays: bool `[kv, t]`.
        goes: bool `[kv, t]`; slots that are neither are empty.
    """

    keys: Tensor
    values: Tensor
    stays: Tensor
    goes: Tensor


class Merger(Protocol):
    """What becomes of dropped tokens."""

    def absorb(self, dropping: Dropping, threshold: float | None) -> tuple[Tensor, Tensor, float]:
        """Puts what goes into what stays.

        Args:
            dropping: a layer's tokens.
            threshold: what it gave for this layer the last time; None: it is the first.

        Returns:
            Keys and values as `dropping` has them, and a number to be remembered for the layer.
        """
        ...


class Codec(Protocol):
    """Stores tokens in few bits, in groups.

    Attributes:
        group_tokens: of a group.
        exact_tokens: the latest tokens, which stay as they are.
    """

    group_tokens: ClassVar[int]
    exact_tokens: int

    def part_bytes(self, head_dim: int, dtype: torch.dtype, bits: int) -> tuple[int, ...]:
        """Bytes of each part that a group is stored as. Each divides a block of the arena, or is some blocks."""
        ...

    def encode(self, keys: Tensor, values: Tensor, bits: int) -> tuple[Tensor, ...]:
        """The parts of groups `[n, tokens, d]`, uint8 `[n, bytes]` each."""
        ...

    def decode(self, parts: Sequence[Tensor], head_dim: int, dtype: torch.dtype, bits: int) -> tuple[Tensor, Tensor]:
        """Keys and values of groups again, `[n, tokens, d]` in `dtype`, from parts `[n, bytes]`."""
        ...

    def for_kernels(self, parts: Sequence[Tensor], head_dim: int, dtype: torch.dtype, bits: int) -> PackedPart | None:
        """The same of a layer, from parts `[kv, groups, bytes]`, as kernels take it; None: they can't decode it."""
        ...


class ReusePlan(Protocol):
    """When a query of an answer looks at all tokens, and by what it goes when it doesn't. Nothing is dropped.

    Its settings are its fields, with the published defaults.
    """

    per_query_head: ClassVar[bool]
    """Each query head chooses for itself; else those of a KV head together."""

    @property
    def tokens(self) -> int:
        """How many a query looks at."""
        ...

    def source(self, layer: int) -> int | None:
        """The layer whose finding a layer goes by; None: it always looks at all."""
        ...

    def looks(self, layer: int, since: int, similarity: Callable[[], float]) -> bool:
        """Whether a layer looks at all tokens though there is something to go by.

        Args:
            layer: the layer.
            since: tokens that came after the one by which that was found; 0: in this very step.
            similarity: the cosine of this query and that one, averaged over heads.
        """
        ...


@dataclass(frozen=True, slots=True)
class Method:
    """A published system.

    Attributes:
        paper: author, title, arXiv id.
        summary: what it does.
        saves: what.
        costs: what.
        deviates: from the paper or its official code; "nothing" if so.
    """

    paper: str
    summary: str
    saves: str
    costs: str
    deviates: str
    scorer: Scorer | None = None
    positions: PositionPolicy | None = None
    allocator: BudgetAllocator | None = None
    merger: Merger | None = None
    codec: Codec | None = None
    reuse: ReusePlan | None = None
    is_published: bool = True

    @property
    def stages(self) -> tuple[str, ...]:
        """What it provides."""
        return tuple(name for name in (*STAGES, "reuse") if getattr(self, name) is not None)


STAGES = ("scorer", "positions", "allocator", "merger", "codec")

CODEC_BITS = (2, 4, 8)
"""That a codec may use for a number."""

METHODS: Registry[Method] = Registry("method")

_NO_METHOD = Method("", "", "", "", "")


@dataclass(frozen=True, slots=True)
class Stages:
    """What carries out a recipe that drops tokens."""

    limits: Eviction
    scorer: Scorer
    positions: PositionPolicy | None = None
    allocator: BudgetAllocator | None = None
    merger: Merger | None = None
    codec: Codec | None = None


def stages_of(recipe: RecipeSpec) -> Stages | None:
    """The methods that a recipe names, fit together; None for one that drops nothing.

    Raises:
        ConfigError: they can't work together, or not with the rest of the recipe.
        NotFound: there is no such method.
    """
    limits = recipe.eviction
    if (limits is not None) != (recipe.distant is Distant.EVICT):
        raise _impossible(recipe, "tokens are dropped if and only if `distant` is evict")
    if limits is None:
        return None
    _check_pairs(recipe, limits)
    stages = Stages(
        limits,
        scorer=_found(recipe, "scorer", limits.scorer, _method(limits.scorer).scorer),
        positions=_method(limits.positions).positions,
        allocator=_method(limits.allocator).allocator,
        merger=_method(limits.merger).merger,
        codec=_method(limits.codec).codec,
    )
    for stage in STAGES:
        if (name := getattr(limits, stage)) is not None:
            _found(recipe, stage, name, getattr(stages, stage))
    stages = replace(stages, scorer=_with_params(recipe, stages.scorer, limits.params))
    if limits.remembers != len(stages.scorer.remembers):
        count = len(stages.scorer.remembers)
        raise _impossible(recipe, f"remembers={limits.remembers}: {limits.scorer!r} keeps {count} of each token")
    if stages.scorer.slack(limits.kept_tokens) >= limits.kept_tokens:
        raise _impossible(recipe, f"of {limits.kept_tokens} tokens {limits.scorer!r} would keep none: give more")
    return stages


def _method(name: str | None) -> Method:
    return _NO_METHOD if name is None else METHODS.get(name)


def _found(recipe: RecipeSpec, stage: str, method: str, found: T | None) -> T:
    if found is None:
        raise _impossible(recipe, f"method {method!r} has no {stage}")
    return found


def reuse_of(recipe: RecipeSpec) -> ReusePlan | None:
    """The plan that a recipe names; None for one whose queries look at all that is near.

    Raises:
        ConfigError: the recipe can't have it.
        NotFound: there is no such method.
    """
    if recipe.reuse is None:
        return None
    if recipe.distant is not Distant.RESIDENT or recipe.shares_keys:
        raise _impossible(recipe, "what was found can be used again where all KV is on the device, a layer's own")
    name = recipe.reuse.plan
    plan = _with_params(recipe, _found(recipe, "reuse plan", name, METHODS.get(name).reuse), recipe.reuse.params)
    if plan.tokens < 1:
        raise _impossible(recipe, f"tokens={plan.tokens}: must be at least 1")
    return plan


def _with_params(recipe: RecipeSpec, stage: T, params: tuple[tuple[str, float], ...]) -> T:
    """A stage with other settings."""
    known = {each.name for each in fields(stage)} if is_dataclass(stage) else set()
    for name, _ in params:
        if name not in known:
            raise _impossible(recipe, f"{type(stage).__name__} has no setting {name!r}: it has {sorted(known)}")
    return replace(stage, **dict(params)) if params else stage  # type: ignore[type-var]


def _check_pairs(recipe: RecipeSpec, limits: Eviction) -> None:
    """Refuses what can't work together, whatever the methods."""
    if recipe.index is not None or recipe.recalled_tokens:
        raise _impossible(recipe, "what is dropped can't be recalled: a recipe drops tokens or has an index")
    if recipe.shares_keys:
        raise _impossible(recipe, "layers that share keys must keep the same tokens, and each drops its own")
    if not 1 <= limits.kept_tokens < limits.read_tokens:
        raise _impossible(
            recipe, f"kept_tokens={limits.kept_tokens}: must be at least 1 and below read_tokens={limits.read_tokens}"
        )
    if limits.positions is not None and limits.merger is not None:
        raise _impossible(recipe, "keys that are rotated to other places can't be averaged: leave out one of the two")
    if limits.positions is not None and limits.allocator is not None:
        raise _impossible(recipe, "places count the tokens of a KV head, so all must keep the same number of them")
    if limits.codec is not None and (limits.positions, limits.allocator, limits.merger) != (None, None, None):
        raise _impossible(
            recipe, "tokens in few bits can't be rotated or averaged, and all KV heads have as many: leave out the rest"
        )
    if (limits.codec is None) != (limits.bits == 0) or limits.bits not in (0, *CODEC_BITS):
        raise _impossible(recipe, f"bits={limits.bits}: must be one of {CODEC_BITS} with a codec, 0 without")


def _impossible(recipe: RecipeSpec, why: str) -> ConfigError:
    return ConfigError(f"recipe {recipe.name!r}: {why}", field="recipe")
