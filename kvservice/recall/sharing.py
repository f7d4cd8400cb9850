"""A sharing plan beside the memory and the frames it is about, and keys that are kept until a call can't be rolled back
any more."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvservice.compression.sharing import SharingMode, SharingPlan
from kvservice.kv.layout import KVLayout, SharedGroups
from kvservice.tier.codecs import LOSSLESS
from kvservice.tier.frame_sets import FrameSet, kv_fingerprint
from kvservice.tier.host import HostTier


def shared_frames(whole: FrameSet, plan: SharingPlan, layout: KVLayout) -> FrameSet:
    """The frames of sessions that share distant keys. All of the plan shapes their KV, so it is in the fingerprint.

    Codecs that tell values from keys by their place in a row aren't for rows of two values: then frames are raw.

    Args:
        whole: the frames of sessions that share none.
        plan: how keys are shared.
        layout: of whole KV.
    """
    fingerprint = kv_fingerprint(
        whole=whole.fingerprint.hex(),
        anchors=json.dumps(plan.groups.anchors),
        mode=plan.mode.value,
        skip_above=str(plan.skip_above),
    )
    (num_rows, *_) = SharedGroups(layout, plan.groups.anchors).shape
    codec = whole.codec if whole.codec in LOSSLESS else "raw"
    return replace(whole, fingerprint=fingerprint, codec=codec, shared_rows=num_rows)


class SharedCells:
    """What is looked up of a plan in every step.

    Args:
        plan: the plan.
        layout: of whole KV.

    Attributes:
        groups: how groups lie in host memory.
        has_followers: of each layer, whether a KV head of it follows.
        owns: bool `[layers, kv]`, the cells that are their own anchors.
        own_heads: int64, of each layer its KV heads that are their own anchors.
        key_rows: of each layer, where those are among all cells that are their own anchors.
        table: int64 `[layers * kv, 5]`, all that for kernels: see `StepSharing.cells`.
    """

    def __init__(self, plan: SharingPlan, layout: KVLayout) -> None:
        self.plan = plan
        self.groups = SharedGroups(layout, plan.groups.anchors)
        self.owns = self.groups.key_layers == torch.arange(layout.num_layers).unsqueeze(1)
        self.own_heads = [own.nonzero()[:, 0] for own in self.owns]
        self.has_followers = [heads.numel() < layout.num_kv_heads for heads in self.own_heads]
        ends = self.owns.sum(1).cumsum(0).tolist()
        self.key_rows = [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        self.table = self._cell_table()

    @property
    def shares_scores(self) -> bool:
        """Whether followers use their anchors' queries."""
        return self.plan.mode is SharingMode.SCORE

    def _cell_table(self) -> Tensor:
        key_layers = self.groups.key_layers
        index_rows = torch.zeros_like(key_layers)
        index_rows[self.owns] = torch.arange(self.groups.own.numel())
        index_rows = index_rows.gather(0, key_layers)
        followed = torch.zeros_like(key_layers).scatter_add_(0, key_layers, (~self.owns).long()).clamp_(max=1)
        fields = [key_layers, index_rows, *self.groups.row_offsets.unbind(2), followed]
        return torch.stack(fields, -1).flatten(0, 1).contiguous()


class KeptKeys:
    """Followers' keys of groups that a call has pushed out of the window: rolled back, it must bring them back."""

    def __init__(self, host: HostTier) -> None:
        self._host = host
        self._keys: dict[int, Tensor] = {}

    @property
    def num_bytes(self) -> int:
        """Host bytes of them."""
        return sum(keys.nbytes for keys in self._keys.values())

    def keep(self, group: int, keys: Tensor) -> None:
        """Keeps a group's, `[followers, 64, d]` on the CPU; a copy."""
        self.drop(group, group + 1)
        self._keys[group] = keys.clone()
        self._host.charge(keys.nbytes)

    def of(self, numbers: Sequence[int]) -> Tensor | None:
        """Those of some groups, `[n, followers, 64, d]`; None unless all are kept."""
        if not all(number in self._keys for number in numbers):
            return None
        return torch.stack([self._keys[number] for number in numbers])

    def drop(self, start: int = 0, stop: int | None = None) -> None:
        """Drops those of groups from `start` up to before `stop`."""
        for number in [n for n in self._keys if n >= start and (stop is None or n < stop)]:
            self._host.charge(-self._keys.pop(number).nbytes)
