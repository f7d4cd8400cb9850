"""A whole text in one pass of the model, with attention as sharing distant keys would have it. For evaluation alone.

Gives what the engine gives, within rounding, for `exact` and `pod-exact`, and what the engine doesn't do: helpers that
need no training, and StreamingLLM. Each query sees what it would see if it came alone:

    0        16                        window_start(p)            p
    ├─ sinks ─┼─ distant: by the anchor ──────┼─ window: its own ─┤

One pass is several times as fast as reading a document and decoding behind it, and compares methods without the
rounding of different kernels. It keeps all keys of all layers nowhere, but those of a text in one layer twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kvservice.attention.whole_text import blocks, causal
from kvservice.compression.sharing import SharingMode, SharingPlan
from kvservice.config.recipes import EXACT
from kvservice.kernels.flash import attend
from kvservice.kv.partial import AttnPartial, merge_partials
from kvservice.models.base import ModelSpec
from kvservice.models.llama import LlamaModel, rope_angles
from kvservice.types import SINK_TOKENS, RecipeSpec

Cell = tuple[int, int]
"""Layer, KV head."""


@dataclass(frozen=True, slots=True)
class Variant:
    """How layers attend to distant tokens.

    Attributes:
        plan: who uses whose keys; None: each layer its own.
        window_tokens: of the window.
        drops_distant: they are left out: StreamingLLM (Xiao et al., arXiv:2309.17453), with positions of the text.
        offsets: of followers, added to the logarithm of what they find in distant tokens by their anchors' scores.
        key_maps: of followers, `[d, d]` each: what their anchor's keys are multiplied by before rotation.
    """

    plan: SharingPlan | None = None
    window_tokens: int = EXACT.window_tokens
    drops_distant: bool = False
    offsets: Mapping[Cell, float] = field(default_factory=dict)
    key_maps: Mapping[Cell, Tensor] = field(default_factory=dict)

    @property
    def window(self) -> RecipeSpec:
        """A recipe with its window."""
        return replace(EXACT, window_tokens=self.window_tokens)


DENSE_VARIANT = Variant()


class Rotation:
    """Turns keys by their positions, and back."""

    def __init__(self, spec: ModelSpec, num_tokens: int) -> None:
        angles = rope_angles(spec)[:num_tokens]
        self._cos = torch.cat([angles.cos()] * 2, -1)
        self._sin = torch.cat([-angles.sin(), angles.sin()], -1)

    def apply(self, keys: Tensor) -> Tensor:
        """Keys `[..., n, d]` of positions 0 to n - 1, rotated; fp32."""
        return self._turned(keys, self._sin)

    def undo(self, keys: Tensor) -> Tensor:
        """The inverse of `apply`."""
        return self._turned(keys, -self._sin)

    def _turned(self, keys: Tensor, sin: Tensor) -> Tensor:
        x = keys.float()
        return x * self._cos + torch.roll(x, x.shape[-1] // 2, dims=-1) * sin


@torch.inference_mode()
def last_logits(model: LlamaModel, token_ids: Sequence[int], count: int, variant: Variant) -> Tensor:
    """Reads a text, and returns the logits after each of its last `count` tokens, fp32 `[count, vocab]`."""
    attention = OnePass(model.spec, len(token_ids), variant)
    positions = torch.arange(len(token_ids), device=model.device)
    x = model.forward(model.embed(torch.tensor(token_ids, device=model.device)), positions, attention)
    return model.logits(x[-count:])


class OnePass:
    """The attention of one whole text. An `Attend`."""

    def __init__(self, spec: ModelSpec, num_tokens: int, variant: Variant) -> None:
        self._variant = variant
        self._scale = spec.shape.head_dim**-0.5
        self._rotation = Rotation(spec, num_tokens) if variant.key_maps else None
        self._far_q: Tensor | None = None
        self._far_k: Tensor | None = None

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Attend`."""
        plan = self._variant.plan
        followers = (
            [] if plan is None else [h for h in range(k.shape[1]) if not plan.groups.stores_distant_key(layer, h)]
        )
        if plan is not None:
            self._note_anchors(q, k, followers)
        if not followers and not self._variant.drops_distant:
            return causal(q, k, v)
        far_q, far_k = (q, k) if plan is None else self._far(plan, layer, q, followers)
        # One for each row of a KV head.
        offsets = torch.tensor([[self._variant.offsets.get((layer, h), 0.0)] for h in range(k.shape[1])])
        out = torch.empty_like(q)
        for rows, window_start in blocks(self._variant.window, q.shape[0]):
            near = near_part(q, k, v, rows, window_start, self._scale)
            parts = [near]
            if window_start > SINK_TOKENS and not self._variant.drops_distant:
                far = far_part(far_q, far_k, v, rows, window_start, self._scale)
                parts.append(AttnPartial(far.out, far.lse + offsets))
            out[rows] = by_query(merge_partials(parts), rows.stop - rows.start)
        return out

    def _note_anchors(self, q: Tensor, k: Tensor, followers: Sequence[int]) -> None:
        """Layers come in order, so what a KV head's latest anchor left is what its followers need."""
        if self._far_q is None or self._far_k is None:
            self._far_q, self._far_k = q.clone(), k.clone()
            return
        group = q.shape[1] // k.shape[1]
        for head in range(k.shape[1]):
            if head not in followers:
                own = slice(head * group, (head + 1) * group)
                self._far_q[:, own], self._far_k[:, head] = q[:, own], k[:, head]

    def _far(self, plan: SharingPlan, layer: int, q: Tensor, followers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What queries, and their keys, are to distant tokens."""
        assert self._far_q is not None
        assert self._far_k is not None
        far_k = self._far_k
        if self._rotation is not None:
            far_k = far_k.clone()
            for head in followers:
                mapped = self._rotation.undo(far_k[:, head]) @ self._variant.key_maps[layer, head]
                far_k[:, head] = self._rotation.apply(mapped).to(far_k.dtype)
        return (self._far_q if plan.mode is SharingMode.SCORE else q), far_k


def near_part(q: Tensor, k: Tensor, v: Tensor, rows: slice, window_start: int, scale: float) -> AttnPartial:
    """Attention of one block's queries to sinks and window."""
    num_kv, group = k.shape[1], q.shape[1] // k.shape[1]
    seen = [*range(min(SINK_TOKENS, rows.stop)), *range(window_start, rows.stop)]
    positions = torch.tensor(seen)
    hidden = positions > torch.arange(rows.start, rows.stop).unsqueeze(1)
    mask = torch.zeros(hidden.shape, dtype=q.dtype).masked_fill_(hidden, -torch.inf).repeat_interleave(group, 0)
    keys, values = (x[positions].transpose(0, 1) for x in (k, v))
    return attend(by_kv_head(q[rows], num_kv), keys, values, scale, mask)


def far_part(q: Tensor, k: Tensor, v: Tensor, rows: slice, window_start: int, scale: float) -> AttnPartial:
    """Attention of one block's queries to what lies between sinks and window."""
    distant = slice(SINK_TOKENS, window_start)
    return attend(by_kv_head(q[rows], k.shape[1]), k[distant].transpose(0, 1), v[distant].transpose(0, 1), scale)


def by_kv_head(q: Tensor, num_kv: int) -> Tensor:
    """`[m, h, d]` to `[kv, m * group, d]`: row `i * group + j` is query i in head j of the KV head's group."""
    count, heads, dim = q.shape
    return q.reshape(count, num_kv, heads // num_kv, dim).permute(1, 0, 2, 3).reshape(num_kv, -1, dim)


def by_query(out: Tensor, count: int) -> Tensor:
    """The inverse of `by_kv_head`."""
    num_kv, rows, dim = out.shape
    return out.view(num_kv, count, rows // count, dim).permute(1, 0, 2, 3).reshape(count, -1, dim)
