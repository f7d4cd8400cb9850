"""Helpers of sharing distant keys that need no training, only some texts to be fitted on. Evaluated, not served.

Our own substitutes for the adaptation that the paper trains (PoD, arXiv:2412.02252). All are fitted in one dense pass
of each text.

    offset      a follower by its anchor's scores attends to distant tokens with its anchor's mass. One number for each
                cell makes its mean share of what is near that of dense attention.
    key map     a follower's keys, before rotation, are guessed from its anchor's by a matrix, the ridge regression.

The third helper, groups by mass-weighted similarity, is in the map itself.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvservice.attention.whole_text import blocks, causal
from kvservice.compression.layer_groups import LayerGroups
from kvservice.config.recipes import EXACT
from kvservice.evaluation.calls import Report, ignore_progress
from kvservice.evaluation.one_pass import Cell, Rotation, far_part, near_part
from kvservice.models.llama import LlamaModel
from kvservice.types import SINK_TOKENS

RIDGE = 1e-2
"""Of the mean square of a key's number: what the regression's diagonal is raised by."""

MOST_OFFSET = 20.0
HALVINGS = 40

Pair = tuple[int, int, int]
"""Anchor's layer, follower's layer, KV head."""


def pairs_of(groups: Collection[LayerGroups]) -> set[Pair]:
    """All followers of some groups, with their anchors."""
    return {
        (each.anchor(layer, head), layer, head)
        for each in groups
        for layer in range(each.num_layers)
        for head in range(each.num_kv_heads)
        if not each.stores_distant_key(layer, head)
    }


@dataclass(slots=True)
class Fit:
    """What the helpers are computed from, gathered over texts.

    Attributes:
        near: of each text, `[l, kv, rows]`: log-sum-exp of what its last queries find in sinks and window.
        far: of each text, likewise, in distant tokens by their own keys.
        squares: `[l, kv, d, d]`: products of keys with themselves.
        products: of each pair `[d, d]`: of the anchor's keys with the follower's.
    """

    near: list[Tensor]
    far: list[Tensor]
    squares: Tensor
    products: dict[Pair, Tensor]

    def offset(self, pair: Pair) -> float:
        """What a follower's distant log-sum-exp is raised by."""
        anchor, layer, head = pair
        near = torch.cat([text[layer, head] for text in self.near])
        own = torch.cat([text[layer, head] for text in self.far])
        others = torch.cat([text[anchor, head] for text in self.far])
        wanted = (near - own).sigmoid().mean()
        low, high = -MOST_OFFSET, MOST_OFFSET
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            if (near - others - middle).sigmoid().mean() > wanted:
                low = middle
            else:
                high = middle
        return (low + high) / 2

    def key_map(self, pair: Pair) -> Tensor:
        """The matrix that an anchor's keys are multiplied by, `[d, d]`."""
        anchor, _, head = pair
        square = self.squares[anchor, head]
        ridge = RIDGE * square.diagonal().mean()
        key_map: Tensor = torch.linalg.solve(square + ridge * torch.eye(square.shape[0]), self.products[pair])
        return key_map


def offsets(fit: Fit, groups: LayerGroups) -> dict[Cell, float]:
    """Of each follower."""
    return {(layer, head): fit.offset((anchor, layer, head)) for anchor, layer, head in sorted(pairs_of([groups]))}


def key_maps(fit: Fit, groups: LayerGroups) -> dict[Cell, Tensor]:
    """Of each follower."""
    return {(layer, head): fit.key_map((anchor, layer, head)) for anchor, layer, head in sorted(pairs_of([groups]))}


@torch.inference_mode()
def fit_helpers(
    model: LlamaModel,
    texts: Sequence[Sequence[int]],
    pairs: Collection[Pair],
    report: Report = ignore_progress,
) -> Fit:
    """Reads texts densely and gathers what helpers need. Blocks for seconds a text.

    Args:
        model: the torch runner.
        texts: token ids of each; the queries behind the last slide of the window count for offsets.
        pairs: who may follow whom.
        report: told of the tokens that were read.
    """
    shape = model.spec.shape
    dim = shape.head_dim
    fit = Fit([], [], torch.zeros(shape.num_layers, shape.num_kv_heads, dim, dim), {})
    fit.products = {pair: torch.zeros(dim, dim) for pair in pairs}
    for token_ids in texts:
        recorder = _Recorder(model, len(token_ids))
        positions = torch.arange(len(token_ids), device=model.device)
        model.forward(model.embed(torch.tensor(token_ids, device=model.device)), positions, recorder)
        fit.near.append(torch.stack(recorder.near))
        fit.far.append(torch.stack(recorder.far))
        for layer, keys in enumerate(recorder.keys):
            fit.squares[layer] += keys.mT @ keys
        for anchor, layer, head in pairs:
            fit.products[anchor, layer, head] += recorder.keys[anchor][head].mT @ recorder.keys[layer][head]
        report(len(token_ids))
    return fit


class _Recorder:
    """Dense attention that notes keys before rotation, and how the last queries share theirs out. An `Attend`."""

    def __init__(self, model: LlamaModel, num_tokens: int) -> None:
        self.keys: list[Tensor] = []
        """[kv, t, d] of each layer, without sinks."""
        self.near: list[Tensor] = []
        """[kv, rows] of each layer."""
        self.far: list[Tensor] = []
        """Likewise."""
        self._rotation = Rotation(model.spec, num_tokens)
        self._scale = model.spec.shape.head_dim**-0.5
        # Two runs of queries: of the last alone there may be only a few.
        self._blocks = list(blocks(EXACT, num_tokens))[-2:]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: ARG002 -- they come in order
        # Sinks are always near, and their keys are far out.
        self.keys.append(self._rotation.undo(k.transpose(0, 1))[:, SINK_TOKENS:])
        near = [near_part(q, k, v, rows, start, self._scale).lse for rows, start in self._blocks]
        far = [far_part(q, k, v, rows, start, self._scale).lse for rows, start in self._blocks]
        self.near.append(torch.cat(near, 1))
        self.far.append(torch.cat(far, 1))
        return causal(q, k, v)
