"""A sequence's KV in the host tier, and the staging ring it is read through. The only readers of host KV."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvservice.kv.arena import Arena
from kvservice.tier.host import HostTier
from kvservice.types import BLOCK_TOKENS, GROUP_TOKENS

TILE_TOKENS = 1024
"""Tokens of one staging tile."""


def staging_blocks(num_kv_heads: int) -> int:
    """Arena blocks of the staging ring: two tiles of K and V of one layer."""
    return 2 * 2 * num_kv_heads * TILE_TOKENS // BLOCK_TOKENS


class StagingRing:
    """Two tiles of device memory that take turns, so that one can be filled while the other is read.

    Rows are K and V of one token in one KV head, `[2 * d]`, as in host memory.
    """

    def __init__(self, arena: Arena) -> None:
        self._tiles = arena.workspace.view(2, -1, 2 * arena.layout.head_dim)
        self._turn = 0

    @property
    def num_rows(self) -> int:
        """Rows that one tile holds."""
        return self._tiles.shape[1]

    def next(self, num_rows: int) -> Tensor:
        """The other tile's first rows, `[num_rows, 2 * d]`; valid until the call after the next."""
        self._turn ^= 1
        return self._tiles[self._turn, :num_rows]


class DistantKV:
    """The groups of one sequence that have left the device."""

    def __init__(self, host: HostTier, head_dim: int) -> None:
        self._host = host
        self._head_dim = head_dim
        self._offsets = host.groups.row_offsets.unsqueeze(2)  # [layers, kv, 1, rows of a token]
        self._numbers: list[int] = []
        self._rows = torch.empty(0, 1, dtype=torch.int64)
        # of each token, before the offset of its cell
        self._addresses = torch.empty(0, dtype=torch.int64)

    @property
    def num_groups(self) -> int:
        """Groups in the host tier."""
        return len(self._numbers)

    @property
    def num_bytes(self) -> int:
        """Of its groups, shared ones included."""
        return len(self._numbers) * self._host.group_bytes

    def append(self, groups: Tensor) -> None:
        """Stores groups behind those there are; they are given as the host packs them."""
        self._numbers += self._host.store(groups)
        self._index()

    def load_last(self, count: int, first: int | None = None) -> Tensor:
        """A copy of the last `count` groups, or of the first `first` of those."""
        return self._host.load(self._numbers[-count:][:first])

    def load(self, first: int, stop: int) -> Tensor:
        """A copy of the groups from `first` to `stop - 1`."""
        return self._host.load(self._numbers[first:stop])

    def drop_last(self, count: int) -> None:
        """Frees the last `count` groups."""
        if count:
            self._host.free(self._numbers[-count:])
            del self._numbers[-count:]
            self._index()

    @property
    def addresses(self) -> Tensor:
        """Where its groups lie in host memory, int64 `[num_groups]`, for kernels that read them there."""
        return self._addresses

    @property
    def host_groups(self) -> list[int]:
        """Numbers of its groups in the host tier."""
        return list(self._numbers)

    def fork(self) -> DistantKV:
        """The same groups once more, shared."""
        twin = DistantKV(self._host, self._head_dim)
        twin._numbers = list(self._numbers)
        twin._rows = self._rows
        twin._addresses = self._addresses
        self._host.share(self._numbers)
        return twin

    def num_shared_from(self, num_groups: int) -> int:
        """How many of its groups from `num_groups` on somebody else holds too."""
        return self._host.num_shared(self._numbers[num_groups:])

    def gather(self, layer: int, offsets: Tensor, out: Tensor) -> None:
        """Copies chosen tokens to the device.

        Args:
            layer: the layer.
            offsets: int64 `[kv, n]` on the CPU, positions counted from the first distant one.
            out: `[kv * n, 2 * d]`, head by head.
        """
        self._host.gather((self._rows[offsets] + self._offsets[layer]).view(-1), self._as_rows(out))

    def gather_flat(self, layer: int, heads: Tensor, offsets: Tensor, out: Tensor) -> None:
        """As `gather`, for a list of (KV head, offset) pairs of any shape, in their order."""
        rows = self._rows[offsets] + self._offsets[layer, heads, 0]
        self._host.gather(rows.view(-1), self._as_rows(out))

    def gather_values(self, layer: int, heads: Tensor, offsets: Tensor, out: Tensor) -> None:
        """As `gather_flat`, of groups that share keys: values alone, `[n, d]`."""
        rows = self._rows[offsets, 0] + self._offsets[layer, heads, 0, 1]
        self._host.gather(rows, out)

    def tiles(self, layer: int, ring: StagingRing) -> Iterator[tuple[Tensor, Tensor]]:
        """All distant K and V of a layer, tile by tile in order of position, each `[kv, t, d]`."""
        num_kv, total = self._offsets.shape[1], self._rows.shape[0]
        tile_tokens = ring.num_rows // num_kv
        for start in range(0, total, tile_tokens):
            some = self._rows[start : start + tile_tokens] + self._offsets[layer]
            staged = ring.next(num_kv * some.shape[1])
            self._host.gather(some.view(-1), self._as_rows(staged))
            pairs = staged.view(num_kv, some.shape[1], 2, self._head_dim)
            yield pairs[:, :, 0], pairs[:, :, 1]

    def _as_rows(self, pairs: Tensor) -> Tensor:
        return pairs.view(-1, self._host.groups.row_numbers)

    def _index(self) -> None:
        self._addresses = self._host.addresses(self._numbers)
        tokens = torch.arange(GROUP_TOKENS) * self._host.groups.rows_per_token
        self._rows = (self._host.first_rows(self._numbers).unsqueeze(1) + tokens).view(-1, 1)
