"""Moves a sequence's device blocks to host memory and back, behind the engine. Knows nothing of what lies in them.

    engine thread ── swap_out / swap_in ──► bounded queue ──► mover thread: copies, group by group

While a move is under way its blocks are in nobody's table: the engine frees or uses them once the move is done.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvservice.kv.arena import Arena
from kvservice.tier.host import HostTier

MAX_PENDING_BYTES = 1 << 30
"""Bytes that may wait for the mover or be on their way."""


@dataclass(slots=True)
class Swapped:
    """Blocks in host memory, or on their way there or back.

    Attributes:
        numbers: host groups that they lie in.
        num_blocks: how many they are.
        move: done when the last move asked for has ended.
    """

    numbers: list[int]
    num_blocks: int
    move: Future[None]

    @property
    def is_moving(self) -> bool:
        """Whether a move is under way."""
        return not self.move.done()

    @property
    def error(self) -> BaseException | None:
        """What the last move failed with, once it has ended."""
        return self.move.exception()


class SwapSpace:
    """Host memory for the blocks of sequences that must make room, and the thread that moves them.

    Args:
        arena: the device blocks.
        host: whose groups are used; the caller has reserved them in the ledger.
    """

    def __init__(self, arena: Arena, host: HostTier) -> None:
        self._arena = arena
        self._host = host
        self._mover = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kv-mover")
        self._pending_bytes = 0
        self._lock = threading.Lock()
        self._newest: Future[None] | None = None

    def groups_for(self, num_blocks: int) -> int:
        """Host groups that `num_blocks` blocks take."""
        return -(-num_blocks // self._host.blocks_per_group)

    @property
    def has_room(self) -> bool:
        """Whether the mover takes another move. While not, nobody is swapped."""
        return self._pending_bytes < MAX_PENDING_BYTES

    def swap_out(self, blocks: Tensor) -> Swapped:
        """Begins to copy blocks to the host; they stay the caller's, and must not change until the move is done."""
        numbers = self._host.allocate(self.groups_for(blocks.numel()))
        return Swapped(numbers, blocks.numel(), self._begin(numbers, blocks, to_host=True))

    def swap_in(self, swapped: Swapped, blocks: Tensor) -> None:
        """Begins to copy swapped blocks into `blocks`, in the order they had in `swap_out`."""
        swapped.move = self._begin(swapped.numbers, blocks, to_host=False)

    def drop(self, swapped: Swapped) -> None:
        """Frees the host memory. Waits for a move under way. Blocks."""
        swapped.move.exception()
        self._host.free(swapped.numbers)

    def wait(self, timeout_s: float) -> bool:
        """Waits until the moves under way are done, at most `timeout_s`; False if there is none. Blocks."""
        newest = self._newest
        if newest is None or newest.done():
            return False
        wait([newest], timeout_s)
        return True

    def close(self) -> None:
        """Ends the thread after what is under way. Blocks."""
        self._mover.shutdown()

    def _begin(self, numbers: list[int], blocks: Tensor, *, to_host: bool) -> Future[None]:
        num_bytes = blocks.numel() * self._arena.layout.block_bytes
        with self._lock:
            self._pending_bytes += num_bytes
        ready = (
            torch.cuda.current_stream(self._arena.device).record_event() if self._arena.device.type == "cuda" else None
        )
        self._newest = self._mover.submit(self._move, numbers, blocks, num_bytes, ready, to_host=to_host)
        return self._newest

    def _move(
        self, numbers: list[int], blocks: Tensor, num_bytes: int, ready: torch.cuda.Event | None, *, to_host: bool
    ) -> None:
        try:
            for number, some in zip(numbers, torch.split(blocks, self._host.blocks_per_group), strict=True):
                memory = self._host.as_blocks(number)[: some.numel()]
                if ready is None:
                    _copy_on_cpu(self._arena.cells, some, memory, to_host=to_host)
                else:
                    self._copy_on_cuda(ready, some, memory, to_host=to_host)
        finally:
            with self._lock:
                self._pending_bytes -= num_bytes

    def _copy_on_cuda(self, ready: torch.cuda.Event, blocks: Tensor, memory: Tensor, *, to_host: bool) -> None:
        """On a stream of its own, so that the engine's kernels go on."""
        stream = torch.cuda.Stream(self._arena.device)  # type: ignore[no-untyped-call]
        stream.wait_event(ready)
        with torch.cuda.stream(stream):
            if to_host:
                memory.copy_(self._arena.cells[blocks], non_blocking=True)
            else:
                self._arena.cells[blocks] = memory.to(self._arena.device, non_blocking=True)
        stream.synchronize()


def _copy_on_cpu(cells: Tensor, blocks: Tensor, memory: Tensor, *, to_host: bool) -> None:
    """By numpy, which lets go of the GIL and starts no threads: torch's would fight those of the engine's step."""
    device, host, index = _bytes(cells), _bytes(memory), blocks.numpy()
    if to_host:
        np.take(device, index, axis=0, out=host, mode="clip")
    else:
        device[index] = host


def _bytes(blocks: Tensor) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    array: np.ndarray[tuple[int, int], np.dtype[np.uint8]] = blocks.view(torch.uint8).flatten(1).numpy()
    return array
