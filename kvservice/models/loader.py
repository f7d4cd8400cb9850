"""From a model folder to a runner. Knows nothing of architectures: each is a file in `models.families`."""

from __future__ import annotations

from pathlib import Path

import torch

from kvservice.errors import ModelError
from kvservice.kernels import cpu, triton
from kvservice.models.adapter import Adapter, adapt
from kvservice.models.base import MODELS, Model, ModelFamily, ModelIdentity, ModelSpec, ModelWeights
from kvservice.models.checkpoint import Checkpoint
from kvservice.models.cpu_llama import CpuLlama
from kvservice.models.fetch import NOTE_FILE
from kvservice.models.folder import FETCH_HINT, read_eos_token_ids, read_json, read_optional_json, read_separator_ids
from kvservice.models.llama import LlamaModel
from kvservice.models.rows import DETERMINISTIC_ROWS
from kvservice.models.sharing import model_facts

_DTYPES = (torch.float32, torch.bfloat16)


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    deterministic: bool = False,
    adapter: Adapter | None = None,
) -> Model:
    """The model in `folder`, with the fastest runner that there is for it here. Blocks: 0.5 s for 135M parameters.

    Args:
        folder: see `read_model`.
        dtype: see `read_model`.
        device: any torch device.
        deterministic: a token's result may not depend, in any bit, on the other tokens of a step.
        adapter: changes of the weights, made for this model.

    Raises:
        ModelError: see `read_model`.
        ConfigError: the adapter is another model's.
    """
    spec, weights = read_model(folder, dtype)
    if adapter is not None:
        adapter.check_model(model_facts(spec))
        spec, weights = adapt(spec, weights, adapter)
    if device.type == "cuda" and not deterministic and triton.can_run(device):
        # An extra, which those that don't use it needn't have.
        from kvservice.models.cuda_llama import CudaLlama

        return CudaLlama(spec, weights, device)
    if device.type == "cpu" and cpu.isa() != "none" and spec.shape.head_dim % cpu.HEAD_DIM_STEP == 0:
        return CpuLlama(spec, weights, deterministic=deterministic)
    return LlamaModel(spec, weights, device, row_block=DETERMINISTIC_ROWS if deterministic else None)


def read_model(folder: Path, dtype: torch.dtype) -> tuple[ModelSpec, ModelWeights]:
    """The model in `folder`, which is in Hugging Face's layout, for any runner.

    Args:
        folder: config.json, safetensors (whole or in shards), tokenizer.json.
        dtype: float32 or bfloat16, whatever the files hold.

    Raises:
        ModelError: files are missing or damaged, or the model needs something that the runners don't do.
    """
    if dtype not in _DTYPES:
        raise ModelError(f"dtype {dtype}: the runner does float32 and bfloat16", reason="model_unsupported")
    config = read_json(folder, "config.json")
    family = _family(config.get("architectures"))
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(f"model folder {folder} has no tokenizer.json: {FETCH_HINT}", reason="model_missing")
    checkpoint = Checkpoint(folder, dtype)
    identity = ModelIdentity(
        name=folder.resolve().name,
        origin=_origin(folder),
        digest=checkpoint.digest(),
        eos_token_ids=read_eos_token_ids(folder),
        separator_ids=read_separator_ids(folder),
    )
    spec = family.spec(config, identity, dtype)
    _check_names(family, spec, checkpoint)
    return spec, family.weights(spec, checkpoint)


def _family(architectures: object) -> ModelFamily:
    MODELS.discover("kvservice.models.families")
    names = architectures if isinstance(architectures, list) else []
    for name in names:
        if name in MODELS.names():
            return MODELS.get(name)
    raise ModelError(
        f"config.json has architectures={architectures!r}: supported are {', '.join(MODELS.names())}",
        reason="model_unsupported",
    )


def _origin(folder: Path) -> str:
    origin = read_optional_json(folder, NOTE_FILE).get("origin")
    return origin if isinstance(origin, str) else f"folder {folder.resolve().name}"


def _check_names(family: ModelFamily, spec: ModelSpec, checkpoint: Checkpoint) -> None:
    expected = family.tensor_shapes(spec).keys()
    missing = sorted(expected - checkpoint.names)
    if missing:
        raise ModelError(
            f"the weights lack {len(missing)} tensors, the first is {missing[0]}: {FETCH_HINT}", reason="model_damaged"
        )
    unknown = sorted(name for name in checkpoint.names - expected if not family.ignores(name, spec))
    if unknown:
        # A bias or a norm that nobody reads would be missing from every answer.
        raise ModelError(
            f"the weights have {len(unknown)} tensors that the runner doesn't use, the first is {unknown[0]}: "
            "this kind of model isn't supported",
            reason="model_unsupported",
        )
