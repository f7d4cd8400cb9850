"""What a model is to the engine: its figures, its weights, and the seam where attention is put in.

Knows nothing of files, tokens' text, or where keys and values are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvservice.attention.batch import BatchAttention
from kvservice.registry import Registry
from kvservice.types import ModelShape


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A loaded model without its weights."""

    name: str
    shape: ModelShape
    rope_theta: float
    norm_eps: float
    eos_token_ids: frozenset[int]
    origin: str
    """Where the weights come from, and what was done to them; printed beside quality figures."""
    digest: str
    """xxh3-128 of the weight files; equal for equal weights of one file layout."""
    tie_embeddings: bool
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    """Whether queries and keys are RMS-normed per head before rotation."""
    separator_ids: frozenset[int] = frozenset()
    """Tokens that are a punctuation mark, a space or the end of a line, and nothing else."""
    adapter: str | None = None
    """Digest of the adapter that was added to the weights; `digest` is that of the files."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. Matrices are [out, in]; q, k, v and gate, up are stacked by rows."""

    norm1: Tensor
    qkv: Tensor
    """[(h + 2 kv) * d, hidden]: rows of all query heads, then key heads, then value heads."""
    o: Tensor
    norm2: Tensor
    gate_up: Tensor
    """[2 * intermediate, hidden]: gate rows, then up rows."""
    down: Tensor
    qkv_bias: Tensor | None = None
    """[(h + 2 kv) * d], in the order of `qkv`'s rows."""
    o_bias: Tensor | None = None
    q_norm: Tensor | None = None
    """[d], for every query head; there if and only if `k_norm` is."""
    k_norm: Tensor | None = None


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """All weights. `layers` may be read once only, so that a loader need not hold all layers twice."""

    embed: Tensor
    layers: Iterable[LayerWeights]
    norm: Tensor
    lm_head: Tensor
    """The same tensor as `embed` when the embeddings are tied."""


class Attend(Protocol):
    """Attention of one layer over whatever keys and values the caller keeps."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The attended values of the new tokens.

        Called once a layer, in order. The new tokens of all sequences of a step lie one after the other.

        Args:
            layer: index of the layer.
            q: [n, h, d] after rotation, not scaled by `d ** -0.5`. Maybe a view, not contiguous: valid during the call
                only.
            k: [n, kv, d] after rotation, likewise. The caller stores a copy.
            v: [n, kv, d], likewise.

        Returns:
            [n, h, d] in q's dtype.
        """
        ...


class Model(Protocol):
    """A model that runs: what the engine needs of one.

    Attributes:
        is_deterministic: no bit of a token's result depends on the other tokens of a step, if attention's don't.
    """

    spec: ModelSpec
    device: torch.device
    is_deterministic: bool

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, keys and values."""
        ...

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights on the device."""
        ...

    def embed(self, token_ids: Tensor) -> Tensor:
        """The residual stream before the first layer: `[n]` int64 → `[n, hidden]`, the caller's own."""
        ...

    def forward(self, x: Tensor, positions: Tensor, attention: BatchAttention, layers: range | None = None) -> Tensor:
        """Takes new tokens through layers: all, or a span of them, after which they may go on another time.

        Args:
            x: `[n, hidden]`, their residual stream before the first of the layers; may be overwritten.
            positions: `[n]` int64, each token's place in its own sequence, below `max_positions`.
            attention: of the step. The new tokens of all its sequences lie one after the other.
            layers: a span of at least one; None: all.

        Returns:
            The residual stream after the last of the layers, `[n, hidden]`; valid until the next call.
        """
        ...

    def logits(self, x: Tensor) -> Tensor:
        """The final norm and the head: residual stream after all layers, `[r, hidden]` → `[r, vocab]` in fp32.

        Pass only the rows whose next token is wanted.
        """
        ...


class TensorSource(Protocol):
    """Weights by name."""

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A copy of the tensor `name` in the dtype that the source was opened with.

        Raises:
            ModelError: it is missing, has another shape, or holds NaN or infinity.
        """
        ...


class ModelFamily(Protocol):
    """What one architecture calls things. Stateless; one file a family in `models.families`."""

    def spec(self, config: Mapping[str, object], identity: ModelIdentity, dtype: torch.dtype) -> ModelSpec:
        """The figures in a config.json.

        Raises:
            ModelError: a figure is missing or wrong, or it asks for something that the runner doesn't do.
        """
        ...

    def tensor_shapes(self, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
        """Every tensor that a checkpoint must have, and its shape."""
        ...

    def ignores(self, name: str, spec: ModelSpec) -> bool:
        """Whether a checkpoint may have the tensor `name` although the runner doesn't read it."""
        ...

    def weights(self, spec: ModelSpec, source: TensorSource) -> ModelWeights:
        """The weights, fused as the runner wants them. Layers are read from `source` as they are asked for."""
        ...


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """What a ModelSpec says beyond the figures of config.json."""

    name: str
    origin: str
    digest: str
    eos_token_ids: frozenset[int]
    separator_ids: frozenset[int] = frozenset()


MODELS: Registry[ModelFamily] = Registry("architecture")
"""Families by the architecture names of config.json."""
