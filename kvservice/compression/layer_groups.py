"""Layer groups: runs of consecutive layers that keep one set of distant keys, and how they are chosen.

Ma et al., "Compressing KV Cache for Long-Context LLM Inference with Inter-Layer Attention Similarity" (PoD),
arXiv:2412.02252, stage 1. Deviates from the paper: groups are for each KV head, not for each query head, since keys
are. What a new layer must resemble the paper doesn't say; `Linkage` offers both readings.

Torch-free. Knows nothing of models, files or how similarity is measured.

    layer                 0   1   2   3   4   5
    KV head 0, anchors    0   0   0   3   4   4      three groups: 0-2, 3, 4-5
                          K   ·   ·   K   K   ·      · owns no distant key; every layer owns its values
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from kvservice.errors import ConfigError

Similarity = tuple[tuple[tuple[float, ...], ...], ...]
"""`[kv][l][l]`: how alike two layers attend in a KV head, from 0 to 1. Symmetric."""


Runs = tuple[tuple[tuple[int, ...], ...], ...]
"""For each KV head its groups, for each group its layers."""


class Linkage(Enum):
    """What a layer must resemble to join the group below it."""

    ANCHOR = "anchor"
    """The group's lowest layer, whose keys it would use."""
    COMPLETE = "complete"
    """Every layer of the group."""


class Per(Enum):
    """What has groups of its own."""

    KV_HEAD = "kv-head"
    LAYER = "layer"
    """All KV heads of a layer are in the same group: by the mean of their similarities."""


@dataclass(frozen=True, slots=True)
class LayerGroups:
    """For each KV head, a partition of the layers into runs of consecutive ones.

    A *cell* is a (layer, KV head). Its anchor is the lowest layer of its group: the only one that stores distant keys.

    Attributes:
        anchors: `[kv][l]`, the anchor of each layer.

    Raises:
        ConfigError: not such a partition.
    """

    anchors: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not self.anchors or not self.anchors[0]:
            raise _no_partition("there are no layers, or no KV heads")
        for kv_head, row in enumerate(self.anchors):
            if len(row) != self.num_layers:
                raise _no_partition(f"KV head {kv_head} has {len(row)} layers, KV head 0 has {self.num_layers}")
            for layer, anchor in enumerate(row):
                if anchor != layer and (layer == 0 or anchor != row[layer - 1]):
                    raise _no_partition(
                        f"KV head {kv_head}, layer {layer} has the anchor {anchor}: it must be the layer itself or the "
                        "anchor of the layer below"
                    )

    @classmethod
    def of_runs(cls, runs: Runs) -> LayerGroups:
        """Groups that are spelled out.

        Raises:
            ConfigError: a layer is missing, comes twice or out of order.
        """
        rows = []
        for kv_head, groups in enumerate(runs):
            layers = [layer for group in groups for layer in group]
            if layers != list(range(len(layers))) or not all(groups):
                raise _no_partition(
                    f"KV head {kv_head} has {[list(group) for group in groups]}: each layer from 0 on must come once, "
                    "in order, and no group may be empty"
                )
            rows.append(tuple(group[0] for group in groups for _ in group))
        return cls(tuple(rows))

    @property
    def runs(self) -> Runs:
        """The groups spelled out."""
        return tuple(
            tuple(tuple(layer for layer, own in enumerate(row) if own == anchor) for anchor in sorted(set(row)))
            for row in self.anchors
        )

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(self.anchors[0])

    @property
    def num_kv_heads(self) -> int:
        """KV heads of a layer."""
        return len(self.anchors)

    @property
    def num_cells(self) -> int:
        """Pairs of a layer and a KV head."""
        return self.num_layers * self.num_kv_heads

    @property
    def num_groups(self) -> int:
        """Groups of all KV heads together: so many cells store distant keys."""
        return sum(len(set(row)) for row in self.anchors)

    @property
    def is_per_layer(self) -> bool:
        """Whether all KV heads have the same groups."""
        return len(set(self.anchors)) == 1

    @property
    def shared_fraction(self) -> float:
        """Share of the cells that store no distant key."""
        return 1 - self.num_groups / self.num_cells

    @property
    def digest(self) -> str:
        """32 hex digits that stand for these groups and no others."""
        text = json.dumps(self.anchors, separators=(",", ":"))
        return hashlib.blake2b(text.encode(), digest_size=16, person=b"kv1-layer-groups").hexdigest()

    def anchor(self, layer: int, kv_head: int) -> int:
        """The layer whose distant keys a cell attends to."""
        return self.anchors[kv_head][layer]

    def stores_distant_key(self, layer: int, kv_head: int) -> bool:
        """Whether a cell owns distant keys."""
        return self.anchors[kv_head][layer] == layer

    def saved_fraction(self, distant_fraction: float = 1.0) -> float:
        """Share of the KV bytes that is stored nowhere; below one half, since values are never shared.

        Args:
            distant_fraction: share of the tokens that are distant. 1: the share saved of distant KV alone.
        """
        return 0.5 * distant_fraction * self.shared_fraction


def group_layers(
    similarity: Similarity, delta: float, linkage: Linkage = Linkage.ANCHOR, per: Per = Per.KV_HEAD
) -> LayerGroups:
    """Greedy, bottom-up: a group begins at the lowest free layer and grows while the next layer is similar enough.

    Args:
        similarity: of the layers.
        delta: the least similarity within a group. Above 1 every cell is its own group.
        linkage: to whom. With `COMPLETE` the groups are the fewest that there can be, so a higher `delta` never gives
            fewer; with `ANCHOR` it may, since a group that ends earlier lets another layer be the next anchor.
        per: what has groups of its own.
    """
    return _group_each(_matrices(similarity, per), len(similarity), delta, linkage)


def delta_for_saving(
    similarity: Similarity, save_fraction: float, linkage: Linkage = Linkage.ANCHOR, per: Per = Per.KV_HEAD
) -> float:
    """The highest `delta` whose groups save at least `save_fraction` of the distant KV's bytes.

    Only the similarities themselves need to be tried: between two of them nothing changes.

    Raises:
        ConfigError: no `delta` saves that much.
    """
    matrices = _matrices(similarity, per)
    values = {row[high] for matrix in matrices for low, row in enumerate(matrix) for high in range(low + 1, len(row))}
    most = 0.0
    # Above all similarities nothing is shared.
    for delta in [2.0, *sorted(values, reverse=True)]:
        saved = _group_each(matrices, len(similarity), delta, linkage).saved_fraction()
        if saved >= save_fraction:
            return delta
        most = max(most, saved)
    raise ConfigError(
        f"save_fraction={save_fraction:g}: one group for all layers saves {most:.3f} of the distant KV, and nothing "
        "saves more, since values are never shared",
        reason="saving_out_of_reach",
    )


def uniform_groups(num_layers: int, num_kv_heads: int, num_groups: int) -> LayerGroups:
    """As many groups as are asked for, of lengths as equal as can be: a baseline at equal bytes.

    Raises:
        ConfigError: fewer groups than KV heads, or more than cells.
    """
    _check_count(num_layers, num_kv_heads, num_groups)
    few, extra = divmod(num_groups, num_kv_heads)
    rows = []
    for kv_head in range(num_kv_heads):
        count = few + (kv_head < extra)
        starts = [index * num_layers // count for index in range(count)]
        rows.append(_anchors(starts, num_layers))
    return LayerGroups(tuple(rows))


def random_groups(num_layers: int, num_kv_heads: int, num_groups: int, seed: int) -> LayerGroups:
    """As many groups as are asked for, drawn evenly from all such partitions: a baseline at equal bytes.

    For groups per layer, draw them for one KV head and use `for_kv_heads`.

    Raises:
        ConfigError: fewer groups than KV heads, or more than cells.
    """
    _check_count(num_layers, num_kv_heads, num_groups)
    # Layer 0 begins a group in every KV head; where the others begin is free.
    free = [(kv_head, layer) for kv_head in range(num_kv_heads) for layer in range(1, num_layers)]
    drawn = set(random.Random(seed).sample(free, num_groups - num_kv_heads))
    return LayerGroups(
        tuple(
            _anchors([0, *(layer for layer in range(1, num_layers) if (kv_head, layer) in drawn)], num_layers)
            for kv_head in range(num_kv_heads)
        )
    )


def for_kv_heads(groups: LayerGroups, num_kv_heads: int) -> LayerGroups:
    """The groups of one KV head, for each of `num_kv_heads`."""
    (row,) = groups.anchors
    return LayerGroups((row,) * num_kv_heads)


def _matrices(similarity: Similarity, per: Per) -> Similarity:
    """One for each KV head, or the mean alone."""
    if per is Per.KV_HEAD:
        return similarity
    rows = zip(*similarity, strict=True)
    return (tuple(tuple(sum(values) / len(similarity) for values in zip(*row, strict=True)) for row in rows),)


def _group_each(matrices: Similarity, num_kv_heads: int, delta: float, linkage: Linkage) -> LayerGroups:
    rows = [_group(matrix, delta, linkage) for matrix in matrices]
    return LayerGroups(tuple(rows * (num_kv_heads // len(rows))))


def _group(matrix: Sequence[Sequence[float]], delta: float, linkage: Linkage) -> tuple[int, ...]:
    anchors: list[int] = []
    for layer in range(len(matrix)):
        anchor = anchors[-1] if anchors else layer
        others = range(anchor, layer) if linkage is Linkage.COMPLETE else (anchor,)
        joins = layer > 0 and all(matrix[other][layer] >= delta for other in others)
        anchors.append(anchor if joins else layer)
    return tuple(anchors)


def _anchors(starts: Sequence[int], num_layers: int) -> tuple[int, ...]:
    return tuple(max(start for start in starts if start <= layer) for layer in range(num_layers))


def _check_count(num_layers: int, num_kv_heads: int, num_groups: int) -> None:
    if not num_kv_heads <= num_groups <= num_layers * num_kv_heads:
        raise ConfigError(
            f"num_groups={num_groups}: {num_layers} layers of {num_kv_heads} KV heads make {num_kv_heads} to "
            f"{num_layers * num_kv_heads} groups"
        )


def _no_partition(why: str) -> ConfigError:
    return ConfigError(f"layer groups are no partition into runs of consecutive layers: {why}", reason="map_damaged")
