"""The adapter: trained changes of a model's matrices, in a file, for one model, one set of layer groups and one mode.

    metadata["kvservice"]     JSON: what it is for, how it was made, and a checksum of that and of all tensors
    layers.I.MATRIX.a         [rank, in]      the change is b @ a
    layers.I.MATRIX.b         [out, rank]
    layers.I.MATRIX.change    [out, in]       or, where all of a matrix was trained, spelled out

An adapter that isn't whole, or was trained for another model or other groups, is refused: it would give wrong answers
in silence. Nothing in the file is ever run: it is safetensors and JSON.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Final, Literal, TypeAlias

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from kvservice.compression.layer_groups import LayerGroups, Runs
from kvservice.compression.sharing import SharingMode, SharingPlan
from kvservice.compression.sharing_map import ModelFacts
from kvservice.errors import ConfigError
from kvservice.models.base import LayerWeights, ModelSpec, ModelWeights
from kvservice.models.tensor_file import read_tensors, write_tensors

FORMAT: Final = "kvservice-pod-adapter"
VERSION: Final = 1
MATRICES: Final = ("qkv", "o", "gate_up", "down")
"""What of a layer can be changed."""

_KEY: Final = "kvservice"

TRAIN_ANOTHER: Final = "train one with `kvservice adapt pod`"


@dataclass(frozen=True, slots=True)
class LowRank:
    """The change `b @ a` of a matrix, `[rank, in]` and `[out, rank]`."""

    a: Tensor
    b: Tensor


MatrixChange: TypeAlias = LowRank | Tensor
"""Of a matrix `[out, in]`."""

Changes = Mapping[int, Mapping[str, MatrixChange]]
"""By layer and matrix."""


class AdapterFacts(BaseModel):
    """What an adapter is for, and how it was made."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    format: Literal["kvservice-pod-adapter"] = FORMAT
    version: Literal[1] = VERSION
    tool: str
    """What wrote it, with its version."""
    model: ModelFacts
    groups: Runs
    mode: SharingMode
    """What followers scored distant tokens by when it was trained."""
    training: Annotated[dict[str, str | int | float | bool | None], Field(max_length=100)]
    """Settings and outcome, for people."""

    @property
    def layer_groups(self) -> LayerGroups:
        """The groups."""
        return LayerGroups.of_runs(self.groups)


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter.

    Attributes:
        facts: what it is for.
        changes: of matrices.
        digest: 32 hex digits that stand for all of it.
    """

    facts: AdapterFacts
    changes: Changes
    digest: str

    def check_model(self, model: ModelFacts) -> None:
        """Refuses a model other than that it was trained for.

        Raises:
            ConfigError: it differs; the message says in what.
        """
        if model.fingerprint == self.facts.model.fingerprint:
            return
        mine, other = (facts.model_dump(exclude={"name", "origin"}) for facts in (self.facts.model, model))
        differ = ", ".join(f"{key} {mine[key]} there, {other[key]} here" for key in mine if mine[key] != other[key])
        raise ConfigError(
            f"the adapter was trained for {self.facts.model.name!r}, not for this {model.name!r} ({differ}): "
            f"{TRAIN_ANOTHER}",
            reason="adapter_other_model",
        )

    def check_plan(self, plan: SharingPlan) -> None:
        """Refuses a plan other than that it was trained under.

        Raises:
            ConfigError: the groups differ, or what followers score by.
        """
        mine = self.facts.layer_groups
        if plan.groups.digest != mine.digest:
            raise ConfigError(
                f"the adapter was trained for other layer groups ({mine.num_groups}, {mine.digest}) than the map has "
                f"({plan.groups.num_groups}, {plan.groups.digest}): give the map that it was trained with, or "
                f"{TRAIN_ANOTHER}",
                reason="adapter_other_map",
            )
        if plan.mode is not self.facts.mode:
            raise ConfigError(
                f"the adapter was trained with --sharing {self.facts.mode.value}, not {plan.mode.value}: say "
                f"--sharing {self.facts.mode.value}",
                reason="adapter_other_mode",
            )


def write_adapter(path: Path, facts: AdapterFacts, changes: Changes, dtype: torch.dtype = torch.bfloat16) -> str:
    """Writes an adapter, whole or not at all, and returns its digest.

    Raises:
        ConfigError: the file can't be written.
    """
    tensors: dict[str, Tensor] = {}
    for name, change in _each(changes):
        if isinstance(change, LowRank):
            tensors[f"{name}.a"], tensors[f"{name}.b"] = change.a, change.b
        else:
            tensors[f"{name}.change"] = change
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    record = facts.model_dump(mode="json")
    digest = _digest(record, tensors)
    write_tensors(path, tensors, {_KEY: json.dumps({**record, "checksum": digest})})
    return digest


def read_adapter(path: Path) -> Adapter:
    """The adapter in a file, found whole. Whom it is for is for the caller to check.

    Raises:
        ConfigError: there is none, or it is damaged or of another version.
    """
    tensors, metadata = read_tensors(path)
    try:
        record = json.loads(metadata.get(_KEY, ""))
        if not isinstance(record, dict):
            raise ValueError("they are no object")
        checksum = record.pop("checksum", None)
        facts = AdapterFacts.model_validate_json(json.dumps(record))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise _damaged(path, f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}") from None
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"it has no facts of an adapter ({error})") from None
    try:
        groups = facts.layer_groups
        if (groups.num_layers, groups.num_kv_heads) != (facts.model.num_layers, facts.model.num_kv_heads):
            raise _damaged(path, "its groups aren't of its model's layers and KV heads")
    except ConfigError as error:
        raise _damaged(path, error.message) from None
    if checksum != _digest(record, tensors):
        raise _damaged(path, "its checksum is that of other contents")
    if not all(torch.isfinite(tensor.float()).all() for tensor in tensors.values()):
        raise _damaged(path, "it holds NaN or infinity")
    try:
        changes = _changes(tensors)
    except ValueError as error:
        raise _damaged(path, str(error)) from None
    if any(layer >= facts.model.num_layers for layer in changes):
        raise _damaged(path, f"it changes layer {max(changes)} of {facts.model.num_layers}")
    return Adapter(facts, changes, checksum)


def adapt(spec: ModelSpec, weights: ModelWeights, adapter: Adapter) -> tuple[ModelSpec, ModelWeights]:
    """A model with an adapter's changes added to its weights. Layers are still read as they are asked for.

    The specification names the adapter, so that what is computed with it is told from what isn't.

    Raises:
        ConfigError: a change doesn't fit its matrix.
    """
    origin = f"{spec.origin}, adapted for shared distant keys"
    return replace(spec, origin=origin, adapter=adapter.digest), replace(
        weights, layers=_adapted(weights.layers, adapter.changes)
    )


def _adapted(layers: Iterable[LayerWeights], changes: Changes) -> Iterator[LayerWeights]:
    for index, layer in enumerate(layers):
        found = {
            name: _changed(f"layer {index}, {name}", getattr(layer, name), change)
            for name, change in changes.get(index, {}).items()
        }
        yield replace(layer, **found)


def _changed(name: str, weight: Tensor, change: MatrixChange) -> Tensor:
    if isinstance(change, LowRank):
        shape: tuple[int, ...] = (change.b.shape[0], change.a.shape[1])
        full = change.b.float() @ change.a.float()
    else:
        shape, full = tuple(change.shape), change.float()
    if shape != tuple(weight.shape):
        raise ConfigError(
            f"the adapter's change of {name} is {list(shape)}, the matrix is {list(weight.shape)}",
            reason="adapter_other_model",
        )
    return (weight.float() + full).to(weight.dtype)


def _each(changes: Changes) -> Iterator[tuple[str, MatrixChange]]:
    for layer, matrices in changes.items():
        for matrix, change in matrices.items():
            yield f"layers.{layer}.{matrix}", change


def _changes(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, MatrixChange]]:
    """The inverse of what `write_adapter` does.

    Raises:
        ValueError: a tensor is unknown or alone, or has another form.
    """
    found: dict[int, dict[str, MatrixChange]] = {}
    for name, tensor in sorted(tensors.items()):
        parts = name.split(".")
        if len(parts) != 4 or parts[0] != "layers" or not parts[1].isdecimal() or parts[2] not in MATRICES:
            raise ValueError(f"it has a tensor {name!r}, which is none of an adapter's")
        if tensor.ndim != 2 or not tensor.is_floating_point():
            raise ValueError(f"its tensor {name!r} is {list(tensor.shape)} of {tensor.dtype}, no matrix of numbers")
        layer, matrix, part = int(parts[1]), parts[2], parts[3]
        of_layer = found.setdefault(layer, {})
        stem = f"layers.{layer}.{matrix}"
        if part == "a":
            b = tensors.get(f"{stem}.b")
            if b is None or b.ndim != 2 or b.shape[1] != tensor.shape[0]:
                raise ValueError(f"it has no {stem}.b that goes with {stem}.a")
            of_layer[matrix] = LowRank(tensor, b)
        elif part == "change" and matrix not in of_layer:
            of_layer[matrix] = tensor
        elif part != "b" or f"{stem}.a" not in tensors:
            raise ValueError(f"its tensor {name!r} is unknown, alone or too many")
    return found


def _digest(record: object, tensors: Mapping[str, Tensor]) -> str:
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    digest = hashlib.blake2b(text.encode(), digest_size=16, person=b"kv1-pod-adapter")
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _damaged(path: Path, why: str) -> ConfigError:
    return ConfigError(f"adapter {path} is damaged: {why}; {TRAIN_ANOTHER}", reason="adapter_damaged")
