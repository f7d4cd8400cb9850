"""The one allocation of device memory that KV, indexes, recall slots and staging live in."""

from __future__ import annotations

import torch
from torch import Tensor

from kvservice.kv.blocks import BlockPool
from kvservice.kv.layout import KVLayout
from kvservice.kv.ledger import Ledger, Owner
from kvservice.types import BLOCK_TOKENS


class Arena:
    """`num_blocks` blocks in one tensor, handed out by number; the ledger sees each by its owner.

    Args:
        workspace_blocks: the leading blocks, kept out of the pool as one contiguous workspace.
        memory: what they lie in, uint8, if it is to be special.

    Attributes:
        cells: `[num_blocks, 16, d]` in the KV dtype.
        slots: the same memory as `[num_blocks * 16, d]`: the row of a token is `block * 16 + position in block`.
        workspace: the leading blocks as one row of numbers.
    """

    def __init__(
        self,
        layout: KVLayout,
        num_blocks: int,
        workspace_blocks: int,
        ledger: Ledger,
        device: torch.device,
        memory: Tensor | None = None,
    ) -> None:
        self.layout = layout
        self.device = device
        if memory is None:
            memory = torch.empty(num_blocks * layout.block_bytes, dtype=torch.uint8, device=device)
        self.cells = memory.view(layout.dtype).view(num_blocks, BLOCK_TOKENS, layout.head_dim)
        self.slots = self.cells.view(-1, layout.head_dim)
        self._bytes = self.cells.view(torch.uint8).view(-1)
        self.workspace = self.cells[:workspace_blocks].view(-1)
        self._pool = BlockPool(num_blocks, first=workspace_blocks)
        self._ledger = ledger
        ledger.add(Owner.WORKSPACE, workspace_blocks * layout.block_bytes)

    def allocate(self, owner: Owner, count: int) -> Tensor:
        """Takes `count` blocks for `owner`. Returns int32 `[count]` on the device."""
        blocks = self._pool.allocate(count)
        self._ledger.add(owner, count * self.layout.block_bytes)
        return blocks.to(self.device)

    def share(self, owner: Owner, blocks: Tensor) -> None:
        """Adds a holder to blocks of `owner`. From now on nobody may write to them; see `own`."""
        self._pool.share(blocks.cpu())
        self._ledger.share(owner, blocks.numel() * self.layout.block_bytes)

    def free(self, owner: Owner, blocks: Tensor) -> None:
        """Gives back blocks of `owner`."""
        still_held = self._pool.free(blocks.cpu())
        self._ledger.share(owner, -still_held * self.layout.block_bytes)
        self._ledger.add(owner, -(blocks.numel() - still_held) * self.layout.block_bytes)

    def num_shared(self, blocks: Tensor) -> int:
        """How many of some blocks have more than one holder."""
        return int(self._pool.shared(blocks.cpu()).sum())

    def own(self, owner: Owner, blocks: Tensor) -> Tensor:
        """Blocks that may be written to, with what is in `blocks`: those of them that are shared are copied first.

        Args:
            owner: of the blocks.
            blocks: held by the caller, who from now on holds the returned ones instead.

        Returns:
            As `blocks`.
        """
        shared = self._pool.shared(blocks.cpu()).to(self.device)
        if not bool(shared.any()):
            return blocks
        old = blocks[shared]
        new = self.allocate(owner, old.numel())
        self.cells[new] = self.cells[old]
        self.free(owner, old)
        owned = blocks.clone()
        owned[shared] = new
        return owned

    def pieces(self, piece_bytes: int) -> Tensor:
        """The arena's bytes as rows of `piece_bytes`, uint8 `[rows, piece_bytes]`; a block must hold a whole number."""
        return self._bytes.view(-1, piece_bytes)

    def read(self, blocks: Tensor) -> Tensor:
        """Copies cells out.

        Args:
            blocks: `[rows, n]`.

        Returns:
            `[rows, n * 16, d]`.
        """
        rows, count = blocks.shape
        return self.cells.index_select(0, blocks.reshape(-1)).view(rows, count * BLOCK_TOKENS, self.layout.head_dim)

    def check(self, holders: Tensor) -> None:
        """Raises InternalError unless each block is counted as often as it is in `holders`, `[n]`."""
        self._pool.check(holders.cpu())
