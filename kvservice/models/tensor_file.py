"""Named tensors and strings in one safetensors file, written whole or not at all. Knows nothing of what they mean."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvservice.errors import ConfigError


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a file in place of another, so that whoever reads finds the old one or the new one.

    Raises:
        ConfigError: it can't be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(dict(tensors), beside, metadata=dict(metadata))
        os.replace(beside, path)
    except (OSError, SafetensorError) as error:
        beside.unlink(missing_ok=True)
        raise ConfigError(f"{path}: can't be written: {error}") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All of a file: tensors, copied out of it, and strings.

    Raises:
        ConfigError: there is none, or it isn't a whole safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 -- it is no dict
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: isn't a whole safetensors file: {error}", reason="adapter_damaged") from None
