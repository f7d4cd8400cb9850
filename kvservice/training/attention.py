"""Attention of a whole text under a sharing plan, differentiable. Knows nothing of weights.

Each query sees what it would see under `pod-exact`, and one softmax goes over all of it:

    0        16                            window_start(p)            p
    ├─ sinks ─┼─ distant: the anchor's keys ──────┼─ window: its own ─┤

so that it equals the engine's two parts, merged by log-sum-exp. Queries whose windows begin at the same place are one
call of torch's flash attention over the keys put together, and no matrix of all scores is ever there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvservice.attention.whole_text import blocks, causal
from kvservice.compression.sharing import SharingMode, SharingPlan
from kvservice.config.recipes import POD_EXACT
from kvservice.types import SINK_TOKENS, RecipeSpec


@dataclass(frozen=True, slots=True)
class Distant:
    """What layers leave to those above them, `[n, h, d]` and `[n, kv, d]`: of each KV head the latest anchor's."""

    queries: Tensor
    keys: Tensor


class SharedAttention:
    """Attention of whole texts.

    Args:
        plan: who uses whose keys; None: each layer its own, dense attention.
        device: of the texts.
        recipe: has the window.
    """

    def __init__(self, plan: SharingPlan | None, device: torch.device, recipe: RecipeSpec = POD_EXACT) -> None:
        self._recipe = recipe
        self._scores_by_anchor = plan is not None and plan.mode is SharingMode.SCORE
        self._owns: list[Tensor] | None = None
        if plan is not None:
            groups = plan.groups
            self._owns = [
                torch.tensor([groups.stores_distant_key(layer, head) for head in range(groups.num_kv_heads)]).to(device)
                for layer in range(groups.num_layers)
            ]
        self._follows = [] if self._owns is None else [not bool(own.all()) for own in self._owns]

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, distant: Distant | None
    ) -> tuple[Tensor, Distant | None]:
        """The attended values of one text's tokens, all of them, and what the next layer is to be given.

        Args:
            layer: index of the layer.
            q: `[n, h, d]` after rotation.
            k: `[n, kv, d]` after rotation.
            v: `[n, kv, d]`.
            distant: what the layer below returned; None in layer 0.
        """
        if self._owns is None:
            return causal(q, k, v), None
        if distant is None:
            distant = Distant(q, k)
        elif self._follows[layer]:
            own = self._owns[layer].view(1, -1, 1)
            group = q.shape[1] // k.shape[1]
            queries = torch.where(own.repeat_interleave(group, 1), q, distant.queries)
            distant = Distant(queries, torch.where(own, k, distant.keys))
        else:
            distant = Distant(q, k)
        if not self._follows[layer]:
            return causal(q, k, v), distant
        runs = list(blocks(self._recipe, q.shape[0]))
        parts = [self._run(q, k, v, distant, rows, start) for rows, start in runs]
        return torch.cat(parts), distant

    def _run(self, q: Tensor, k: Tensor, v: Tensor, distant: Distant, rows: slice, start: int) -> Tensor:
        """One softmax for each of some queries that see the same window."""
        num_kv, scale = k.shape[1], q.shape[-1] ** -0.5
        far, near = slice(SINK_TOKENS, max(start, SINK_TOKENS)), slice(max(start, SINK_TOKENS), rows.stop)
        queries, values = q[rows], v[: rows.stop]
        if self._scores_by_anchor and far.stop > far.start:
            # Twice as many numbers a head: near keys meet the layer's own queries alone, distant ones the anchor's.
            queries = torch.cat([queries, distant.queries[rows]], -1)
            own, others = F.pad(k, (0, k.shape[-1])), F.pad(distant.keys, (k.shape[-1], 0))
            values = F.pad(values, (0, k.shape[-1]))
        else:
            own, others = k, distant.keys
        keys = torch.cat([own[:SINK_TOKENS], others[far], own[near]]) if rows.stop > SINK_TOKENS else own[: rows.stop]
        count = rows.stop - rows.start
        place = torch.arange(rows.stop, device=q.device)
        mask = torch.zeros(count, rows.stop, dtype=q.dtype, device=q.device)
        mask.masked_fill_(place > torch.arange(rows.start, rows.stop, device=q.device).unsqueeze(1), -torch.inf)
        group = q.shape[1] // num_kv
        stacked = queries.reshape(count, num_kv, group, -1).permute(1, 0, 2, 3).flatten(1, 2)
        out = F.scaled_dot_product_attention(
            stacked.unsqueeze(0),
            keys.transpose(0, 1).unsqueeze(0),
            values.transpose(0, 1).unsqueeze(0),
            attn_mask=mask.repeat_interleave(group, 0),
            scale=scale,
        )[0]
        return out.reshape(num_kv, count, group, -1).permute(1, 0, 2, 3).flatten(1, 2)[..., : q.shape[-1]]
