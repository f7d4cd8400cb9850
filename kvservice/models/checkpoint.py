"""Weights in safetensors files, one or several. Knows nothing of architectures."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvservice.errors import ModelError
from kvservice.models.folder import FETCH_HINT, read_json

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class Checkpoint:
    """The tensors of a model folder. Implements TensorSource.

    Args:
        folder: holds model.safetensors, or model.safetensors.index.json and the shards it names.
        dtype: what tensors are given out as.

    Raises:
        ModelError: a file is missing, or isn't whole.
    """

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self._folder = folder
        self._dtype = dtype
        self._paths = _weight_files(folder)
        self._files = {path: _open(path) for path in self._paths}
        self._path_of = {name: path for path, file in self._files.items() for name in _names(file)}

    @property
    def names(self) -> frozenset[str]:
        """All tensors in the files."""
        return frozenset(self._path_of)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """See `TensorSource`."""
        path = self._path_of.get(name)
        if path is None:
            raise ModelError(f"model folder {self._folder} has no tensor {name}: {FETCH_HINT}", reason="model_damaged")
        found: Tensor = self._files[path].get_tensor(name)  # type: ignore[no-untyped-call]
        if tuple(found.shape) != shape:
            raise ModelError(
                f"{path.name}: tensor {name} has shape {list(found.shape)}, config.json asks for {list(shape)}: "
                f"{FETCH_HINT}",
                reason="model_damaged",
            )
        if found.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ModelError(
                f"{path.name}: tensor {name} is {found.dtype}: only bf16, fp16 and fp32 weights are loaded",
                reason="model_unsupported",
            )
        # One NaN or infinity makes the sum one; looking at each value takes four times as long.
        if not torch.isfinite(found.sum(dtype=torch.float32)):
            raise ModelError(f"{path.name}: tensor {name} holds NaN or infinity: {FETCH_HINT}", reason="model_damaged")
        # The file stays mapped; a copy isn't changed when someone writes into it.
        return found.to(self._dtype, copy=True)

    def digest(self) -> str:
        """xxh3-128 over all bytes of all weight files, by file name. Reads every file: 0.04 s for 270 MB in memory."""
        total = xxhash.xxh3_128()
        for path in self._paths:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                total.update(view)
        return total.hexdigest()


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _INDEX).exists():
        weight_map = read_json(folder, _INDEX).get("weight_map")
        if not isinstance(weight_map, Mapping):
            raise ModelError(f"{folder / _INDEX} has no weight_map: {FETCH_HINT}", reason="model_damaged")
        names = sorted({str(name) for name in weight_map.values()})
        if any(Path(name).name != name for name in names):
            raise ModelError(f"{folder / _INDEX} names files outside its folder", reason="model_damaged")
    else:
        names = [_SINGLE]
    for name in names:
        if not (folder / name).is_file():
            raise ModelError(
                f"model folder {folder} has no {name} (only safetensors are loaded, no pickled weights): {FETCH_HINT}",
                reason="model_missing",
            )
    return [folder / name for name in names]


def _names(file: safe_open) -> list[str]:
    names: list[str] = file.keys()  # type: ignore[no-untyped-call]
    return names


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} isn't a whole safetensors file ({error}): {FETCH_HINT}", reason="model_damaged"
        ) from None
