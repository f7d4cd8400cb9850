"""Takes a sequence's device blocks to the host and brings them back. Knows nothing of what lies in them.

DEVICE ── leave ──► LEAVING ── copied ──► PARKED ── come_back ──► RETURNING ── copied ──► DEVICE
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

import torch
from torch import Tensor

from kvservice.errors import InternalError
from kvservice.kv.arena import Arena
from kvservice.kv.ledger import Owner
from kvservice.tier.swap import Swapped, SwapSpace


class Place(Enum):
    """Where a sequence's device part is."""

    DEVICE = "device"
    LEAVING = "leaving"
    PARKED = "parked"
    RETURNING = "returning"


class Parking:
    """The way of one sequence's blocks to the host and back."""

    def __init__(self, arena: Arena, space: SwapSpace) -> None:
        self.place = Place.DEVICE
        self._arena = arena
        self._space = space
        self._blocks: dict[Owner, Tensor] = {}
        self._counts: dict[Owner, int] = {}
        self._swapped: Swapped | None = None

    @property
    def num_groups(self) -> int:
        """Host groups that its blocks take."""
        return len(self._swapped.numbers) if self._swapped else 0

    @property
    def num_blocks(self) -> int:
        """Device blocks that it takes when it is back; 0 while it is on the device."""
        return self._swapped.num_blocks if self._swapped else 0

    @property
    def host_groups(self) -> list[int]:
        """Their numbers."""
        return list(self._swapped.numbers) if self._swapped else []

    def blocks(self) -> Tensor:
        """Device blocks that it holds while they move, int32 `[n]`."""
        return torch.cat([*self._blocks.values(), torch.empty(0, dtype=torch.int32, device=self._arena.device)])

    def held_bytes(self, owner: Owner) -> int:
        """Device bytes of `owner` that it holds while they move."""
        blocks = self._blocks.get(owner)
        return 0 if blocks is None else blocks.numel() * self._arena.layout.block_bytes

    def groups_for(self, num_blocks: int) -> int:
        """Host groups that so many blocks would take."""
        return self._space.groups_for(num_blocks)

    def leave(self, blocks: Mapping[Owner, Tensor]) -> None:
        """Begins to copy blocks to the host. From now on they are this object's."""
        self._expect(Place.DEVICE)
        self._blocks = dict(blocks)
        self._swapped = self._space.swap_out(self.blocks())
        self.place = Place.LEAVING

    def come_back(self) -> None:
        """Begins to copy them into new blocks; the caller has reserved those."""
        self._expect(Place.PARKED)
        assert self._swapped is not None
        self._blocks = {owner: self._arena.allocate(owner, count) for owner, count in self._counts.items()}
        self._space.swap_in(self._swapped, self.blocks())
        self.place = Place.RETURNING

    def poll(self) -> Mapping[Owner, Tensor] | None:
        """Ends a move that is done.

        Returns:
            The new blocks, in the order they had, once they have come back: the caller's from then on. Else None.

        Raises:
            InternalError: the move failed, so what was moved can't be had any more. All that is left is to `close`.
        """
        if self._swapped is None or self.place is Place.PARKED or self._swapped.is_moving:
            return None
        if (error := self._swapped.error) is not None:
            raise InternalError(f"a move of KV failed: {type(error).__name__}") from error
        blocks, self._blocks = self._blocks, {}
        if self.place is Place.LEAVING:
            self._counts = {owner: some.numel() for owner, some in blocks.items()}
            for owner, some in blocks.items():
                self._arena.free(owner, some)
            self.place = Place.PARKED
            return None
        self._space.drop(self._swapped)
        self._swapped = None
        self.place = Place.DEVICE
        return blocks

    def close(self) -> None:
        """Gives everything back. Waits for a move under way. Blocks."""
        if self._swapped is not None:
            self._space.drop(self._swapped)
            self._swapped = None
        for owner, some in self._blocks.items():
            self._arena.free(owner, some)
        self._blocks = {}
        self.place = Place.DEVICE

    def _expect(self, place: Place) -> None:
        if self.place is not place:
            raise InternalError(f"the sequence is {self.place.value}, not {place.value}")
