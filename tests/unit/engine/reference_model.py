"""A sequence computed slowly and obviously: every token attends with one explicit mask over all KV kept in one place.

Knows nothing of arenas, tiers, parts or steps; what the engine computes is compared with it.
"""

from __future__ import annotations

import torch

from kvservice.attention.reference import attend_visible
from kvservice.types import GROUP_TOKENS, SINK_TOKENS, Distant


class ReferenceSequence:
    def __init__(self, model, recipe):
        shape = model.spec.shape
        self.model, self.recipe, self.shape = model, recipe, shape
        empty = torch.empty(shape.num_kv_heads, 0, shape.head_dim)
        self.keys = [empty] * shape.num_layers
        self.values = [empty] * shape.num_layers
        self.num_tokens = 0

    def read(self, token_ids, *, selects):
        """Reads tokens, one at a time where each selects; returns the logits after each, fp32 `[n, vocab]`."""
        if not selects:
            return self._read(list(token_ids), selects)
        return torch.cat([self._read([token], selects) for token in token_ids])

    def _read(self, token_ids, selects):
        window_start = self.recipe.window_start(self.num_tokens)
        count, total = len(token_ids), self.num_tokens + len(token_ids)

        def attend(layer, q, k, v):
            self.keys[layer] = torch.cat([self.keys[layer], k.transpose(0, 1)], 1)
            self.values[layer] = torch.cat([self.values[layer], v.transpose(0, 1)], 1)
            causal = torch.ones(count, total, dtype=torch.bool).tril(self.num_tokens)
            visible = causal.unsqueeze(1).repeat(1, self.shape.num_kv_heads, 1)
            if selects and self.recipe.distant is Distant.RECALL and window_start > SINK_TOKENS:
                visible[0, :, SINK_TOKENS:window_start] = False
                for head, chosen in enumerate(self._choose(layer, q[0], window_start)):
                    visible[0, head, SINK_TOKENS + chosen] = True
            return attend_visible(q, self.keys[layer], self.values[layer], visible)

        x = self.model.embed(torch.tensor(token_ids))
        x = self.model.forward(x, torch.arange(self.num_tokens, total), attend)
        self.num_tokens = total
        return self.model.logits(x)

    def _choose(self, layer, q, window_start):
        """For each KV head, the distant tokens with the most mass by 2-bit keys (design.md §2.2)."""
        group = self.shape.num_heads // self.shape.num_kv_heads
        scale = self.shape.head_dim**-0.5
        for head in range(self.shape.num_kv_heads):
            keys = self.keys[layer][head]
            rounded = [
                round_keys(keys[start : start + GROUP_TOKENS], self.recipe.index_bits)
                for start in range(SINK_TOKENS, window_start, GROUP_TOKENS)
            ]
            queries = q[head * group : (head + 1) * group]
            near = torch.cat([keys[:SINK_TOKENS], keys[window_start:]])
            scores = queries @ torch.cat(rounded).T * scale
            near_scores = queries @ near.T * scale
            mass = torch.cat([near_scores, scores], 1).softmax(-1)[:, len(near) :].sum(0)
            yield mass.topk(min(self.recipe.recalled_tokens, len(mass))).indices


def round_keys(keys, bits):
    low, high = keys.amin(0), keys.amax(0)
    step = (high - low) / (2**bits - 1)
    return ((keys - low) / step).round() * step + low
