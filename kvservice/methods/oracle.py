"""The ceiling of any index: the true keys, kept on the device. For evaluation only."""

from __future__ import annotations

import torch
from torch import Tensor

from kvservice.compression.protocols import RECALL_INDEXES, Selection
from kvservice.types import GROUP_TOKENS


class OracleIndex:
    """Ranks distant tokens by their true attention scores. A baseline, not a published method."""

    paper = "none: the ceiling"
    summary = "the true keys choose (evaluation only)"
    is_key_index = False

    def encode(self, keys: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """The keys' own bytes; `bits` is the width of their dtype."""
        if bits != 8 * keys.element_size():
            raise ValueError(f"index_bits={bits}: the oracle keeps keys of {8 * keys.element_size()} bits as they are")
        num_groups, _, dim = keys.shape
        return keys.contiguous().view(torch.uint8).view(num_groups, -1), keys.new_empty(num_groups, 0, dim)

    def scores(self, ask: Selection) -> Tensor:
        """The scores that attention itself would compute."""
        num_kv, num_groups, _ = ask.codes.shape
        keys = ask.codes.view(ask.q.dtype).view(num_kv, num_groups * GROUP_TOKENS, ask.q.shape[-1])
        return (ask.q @ keys.transpose(1, 2)).float().mul_(ask.scale)


RECALL_INDEXES.register("oracle")(OracleIndex())
