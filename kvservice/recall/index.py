"""A sequence's index of distant keys, in arena blocks. Knows nothing of how a method encodes or scores."""

from __future__ import annotations

import torch
from torch import Tensor

from kvservice.compression.protocols import Choice, RecallIndex, Selection
from kvservice.kv.arena import Arena
from kvservice.kv.entries import PagedEntries
from kvservice.kv.ledger import Owner
from kvservice.recall.sharing import SharedCells
from kvservice.types import GROUP_TOKENS


class SequenceIndex:
    """The encoded keys of every group that has left the window, for each (layer, KV head) that stores distant keys.

    Args:
        method: how keys are encoded and scored.
        bits: of a number's code.
        arena: where they are.
        shared: which store them; None: all.
    """

    def __init__(self, method: RecallIndex, bits: int, arena: Arena, shared: SharedCells | None = None) -> None:
        self._arena = arena
        layout = arena.layout
        probe_codes, probe_params = method.encode(
            torch.zeros(1, GROUP_TOKENS, layout.head_dim, dtype=layout.dtype), bits
        )
        num_kv = layout.num_kv_heads
        rows = layout.num_layers * num_kv if shared is None else shared.groups.own.numel()
        self._shared = shared
        self._rows = (
            [slice(layer * num_kv, (layer + 1) * num_kv) for layer in range(layout.num_layers)]
            if shared is None
            else shared.key_rows
        )
        self._num_rows = rows
        self._method = method
        self._bits = bits
        self._layout = layout
        self._codes = PagedEntries(arena, Owner.INDEX, rows, probe_codes.numel())
        self._params = PagedEntries(arena, Owner.INDEX, rows, probe_params.numel() * layout.dtype.itemsize)
        self.num_groups = 0

    @property
    def bits(self) -> int:
        """Of a number's code."""
        return self._bits

    @property
    def is_key_index(self) -> bool:
        """Whether kernels that know low-bit keys may score in its place, from the tables below."""
        return self._method.is_key_index

    @property
    def codes_table(self) -> Tensor:
        """Arena blocks of the codes, int32 `[layers * kv, columns]`; of (layer, KV head)s that store keys."""
        return self._codes.table

    @property
    def params_table(self) -> Tensor:
        """Arena blocks of the params, likewise."""
        return self._params.table

    @property
    def num_bytes(self) -> int:
        """Arena bytes held."""
        return self._codes.num_bytes + self._params.num_bytes

    def num_shared_from(self, num_groups: int) -> int:
        """How many of its blocks that hold more than the first `num_groups` groups somebody else holds too."""
        return self._codes.num_shared_from(num_groups) + self._params.num_shared_from(num_groups)

    def fork(self) -> SequenceIndex:
        """The same entries once more, in shared blocks."""
        twin = SequenceIndex(self._method, self._bits, self._arena, self._shared)
        twin._codes, twin._params = self._codes.fork(), self._params.fork()
        twin.num_groups = self.num_groups
        return twin

    def blocks(self) -> Tensor:
        """All blocks held, int32 `[n]`."""
        return torch.cat([self._codes.blocks(), self._params.blocks()])

    def move_to(self, blocks: Tensor) -> None:
        """From now on its entries are in other blocks, given in the order of `blocks()`."""
        codes = self._codes.blocks().numel()
        self._codes.move_to(blocks[:codes])
        self._params.move_to(blocks[codes:])

    def forget(self) -> None:
        """Nothing is indexed. The blocks are somebody else's business."""
        self._codes.forget()
        self._params.forget()
        self.num_groups = 0

    def append(self, groups: Tensor) -> None:
        """Encodes groups `[n, layers, kv, 64, 2, d]`, each exactly once."""
        count = groups.shape[0]
        rows = self._num_rows
        cells = groups[..., 0, :].flatten(1, 2)
        if self._shared is not None:
            cells = cells[:, self._shared.groups.own.to(cells.device)]
        codes, params = self._method.encode(cells.flatten(0, 1), self._bits)
        self._codes.append(codes.view(count, rows, -1).transpose(0, 1))
        self._params.append(params.view(count, rows, -1).view(torch.uint8).transpose(0, 1))
        self.num_groups += count

    def truncate(self, num_groups: int) -> None:
        """Forgets all groups from `num_groups` on."""
        self._codes.truncate(num_groups)
        self._params.truncate(num_groups)
        self.num_groups = num_groups

    def scores(self, layer: int, q: Tensor, scale: float, seed: int, choice: Choice | None = None) -> Tensor:
        """Estimated scores of every distant token, fp32 `[kv, r, 64 * groups]`; q is `[kv, r, d]`. See `Selection`.

        Where keys are shared, `kv` are the layer's KV heads that store some.
        """
        rows = self._rows[layer]
        params = self._params.read(rows)
        # Nothing can't be viewed as another dtype when its strides don't fit.
        params = params.view(self._layout.dtype) if params.numel() else params.to(self._layout.dtype)
        ask = Selection(
            q=q,
            codes=self._codes.read(rows),
            params=params.view(q.shape[0], self.num_groups, -1, self._layout.head_dim),
            num_distant=self.num_groups * GROUP_TOKENS,
            scale=scale,
            seed=seed,
            choice=choice,
        )
        return self._method.scores(ask)
