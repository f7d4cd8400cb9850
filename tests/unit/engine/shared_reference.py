"""As `reference_model`, where layers share distant keys: one explicit softmax over near and distant scores."""

from __future__ import annotations

import math

import torch

from kvservice.compression.sharing import SharingMode
from kvservice.types import SINK_TOKENS, Distant
from tests.unit.engine.reference_model import ReferenceSequence


class SharedReference(ReferenceSequence):
    """One token at a time: to each, distant is what lies before its own window."""

    def __init__(self, model, recipe, plan):
        super().__init__(model, recipe)
        self.plan = plan

    def read(self, token_ids, *, selects):
        return torch.cat([self._read([token], selects) for token in token_ids])

    def _read(self, token_ids, selects):
        shape, plan = self.shape, self.plan
        group, scale = shape.num_heads // shape.num_kv_heads, shape.head_dim**-0.5
        start = self.recipe.window_start(self.num_tokens)
        distant, near = range(SINK_TOKENS, start), [*range(SINK_TOKENS), *range(start, self.num_tokens + 1)]
        near = near[: min(SINK_TOKENS, self.num_tokens + 1)] + [i for i in near if i >= SINK_TOKENS]
        queries, chosen = [], {}

        def attend(layer, q, k, v):
            self.keys[layer] = torch.cat([self.keys[layer], k.transpose(0, 1)], 1)
            self.values[layer] = torch.cat([self.values[layer], v.transpose(0, 1)], 1)
            queries.append(q[0])
            if selects and self.recipe.distant is Distant.RECALL and distant:
                chosen[layer] = [SINK_TOKENS + some for some in self._choose(layer, q[0], start)]
            outs = []
            for head in range(shape.num_heads):
                kv = head // group
                anchor = plan.groups.anchor(layer, kv)
                far = list(distant) if layer not in chosen else chosen[anchor][kv].tolist()
                far_q = queries[anchor][head] if plan.mode is SharingMode.SCORE else q[0, head]
                near_scores = self.keys[layer][kv][near] @ q[0, head] * scale
                far_scores = self.keys[anchor][kv][far] @ far_q * scale
                if anchor != layer and plan.skip_above is not None and far:
                    share = torch.sigmoid(near_scores.logsumexp(0) - far_scores.logsumexp(0))
                    if share >= plan.skip_above:
                        far_scores = torch.full_like(far_scores, -math.inf)
                weights = torch.cat([near_scores, far_scores]).softmax(0)
                outs.append(weights @ self.values[layer][kv][near + far])
            return torch.stack(outs).unsqueeze(0)

        hidden = self.model.forward(self.model.embed(torch.tensor(token_ids)), torch.tensor([self.num_tokens]), attend)
        self.num_tokens += 1
        return self.model.logits(hidden)
