"""Tokens of one sequence that are kept in few bits, in arena blocks. Knows nothing of how a codec packs them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvservice.compression.methods import Codec
from kvservice.errors import ConfigError
from kvservice.kernels.cpu import PackedPart
from kvservice.kv.arena import Arena
from kvservice.kv.entries import PagedEntries
from kvservice.kv.layout import KVLayout
from kvservice.kv.ledger import Owner
from kvservice.types import BLOCK_TOKENS, RecipeSpec

EXACT_SHARE = 8
"""One token of so many of the budget is room for those that come until some are packed."""


class PackedTokens:
    """Groups of packed tokens: as many for each (layer, KV head), and in each other ones.

    Args:
        codec: how they are packed.
        bits: of a number.
        arena: where they are.

    Attributes:
        codec: as given.
        positions: int64 `[layers * kv, tokens]`, group by group.
    """

    def __init__(self, codec: Codec, bits: int, arena: Arena) -> None:
        layout = arena.layout
        self.codec, self._bits, self._arena = codec, bits, arena
        self._num_rows = layout.num_layers * layout.num_kv_heads
        sizes = codec.part_bytes(layout.head_dim, layout.dtype, bits)
        self._parts = [PagedEntries(arena, Owner.WINDOW, self._num_rows, size) for size in sizes]
        self.positions = torch.empty(self._num_rows, 0, dtype=torch.int64, device=arena.device)

    @property
    def group_tokens(self) -> int:
        """Of a group."""
        return self.codec.group_tokens

    @property
    def num_tokens(self) -> int:
        """That each (layer, KV head) holds."""
        return self.positions.shape[1]

    @property
    def num_bytes(self) -> int:
        """Arena bytes held, shared ones included."""
        return sum(part.num_bytes for part in self._parts)

    @property
    def worth_tokens(self) -> int:
        """Exact tokens of a (layer, KV head) that would take as many bytes."""
        columns = sum(part.table.shape[1] for part in self._parts)
        return -(-columns * BLOCK_TOKENS // 2)

    def num_shared(self) -> int:
        """How many of its blocks somebody else holds too."""
        return sum(part.num_shared_from(0) for part in self._parts)

    def pack(self, keys: Tensor, values: Tensor) -> list[Tensor]:
        """The parts of new groups, uint8 `[rows, n, bytes]` each, from `[rows, n * tokens, d]`."""
        shape = (-1, self.group_tokens, keys.shape[2])
        parts = self.codec.encode(keys.reshape(shape), values.reshape(shape), self._bits)
        return [part.view(keys.shape[0], -1, part.shape[-1]) for part in parts]

    def replace(self, packed: Sequence[Tensor], positions: Tensor, kept: Tensor) -> None:
        """Puts new groups behind those that are there, and keeps some of all.

        Args:
            packed: the new ones, as `pack` gives them.
            positions: of their tokens, int64 `[rows, n * tokens]`.
            kept: int64 `[rows, k]`, numbers of the groups that are kept, rising, those that are there first.
        """
        for part, new in zip(self._parts, packed, strict=True):
            both = torch.cat([part.read(slice(None)), new], dim=1)
            part.truncate(0)
            part.append(both.gather(1, kept.unsqueeze(2).expand(-1, -1, both.shape[2])))
        both = torch.cat([self.positions, positions], dim=1).view(self._num_rows, -1, self.group_tokens)
        self.positions = both.gather(1, kept.unsqueeze(2).expand(-1, -1, self.group_tokens)).flatten(1)

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, `[kv, tokens, d]` in the dtype of the arena."""
        layout = self._arena.layout
        parts = [part.flatten(0, 1) for part in self._read(layer)]
        both = self.codec.decode(parts, layout.head_dim, layout.dtype, self._bits)
        keys, values = (some.view(layout.num_kv_heads, -1, layout.head_dim) for some in both)
        return keys, values

    def for_kernels(self, layer: int) -> PackedPart | None:
        """The same as kernels take it; None if they can't decode it."""
        return self.codec.for_kernels(
            self._read(layer), self._arena.layout.head_dim, self._arena.layout.dtype, self._bits
        )

    def fork(self) -> PackedTokens:
        """The same once more, in shared blocks."""
        twin = PackedTokens(self.codec, self._bits, self._arena)
        twin._parts = [part.fork() for part in self._parts]
        twin.positions = self.positions
        return twin

    def blocks(self) -> Tensor:
        """All blocks held, int32 `[n]`."""
        return torch.cat([part.blocks() for part in self._parts])

    def move_to(self, blocks: Tensor) -> None:
        """From now on it lies in other blocks, given in the order of `blocks()`."""
        for part in self._parts:
            count = part.blocks().numel()
            part.move_to(blocks[:count])
            blocks = blocks[count:]

    def close(self) -> None:
        """Gives every block back."""
        for part in self._parts:
            part.truncate(0)
        self.positions = self.positions[:, :0]

    def forget(self) -> None:
        """There are none. The blocks are somebody else's business."""
        for part in self._parts:
            part.forget()
        self.positions = self.positions[:, :0]

    def _read(self, layer: int) -> list[Tensor]:
        num_kv = self._arena.layout.num_kv_heads
        rows = slice(layer * num_kv, (layer + 1) * num_kv)
        return [part.read(rows) for part in self._parts]


def most_groups(recipe: RecipeSpec, codec: Codec, layout: KVLayout) -> int:
    """How many packed groups fit beside exact tokens into the bytes of a recipe's `kept_tokens`.

    Raises:
        ConfigError: none does.
    """
    limits = recipe.eviction
    assert limits is not None
    room = max(codec.group_tokens, limits.kept_tokens // EXACT_SHARE)
    exact_columns = -(-(codec.exact_tokens + room) // BLOCK_TOKENS)
    columns = 2 * (limits.kept_tokens // BLOCK_TOKENS - exact_columns)
    sizes = codec.part_bytes(layout.head_dim, layout.dtype, limits.bits)
    count = 0
    while sum(-(-(count + 1) * size // layout.block_bytes) for size in sizes) <= columns:
        count += 1
    if count == 0:
        raise ConfigError(
            f"recipe {recipe.name!r}: kept_tokens={limits.kept_tokens} have no room for {codec.group_tokens} tokens in "
            f"{limits.bits} bits beside the latest ones: give more",
            field="recipe",
        )
    return count
