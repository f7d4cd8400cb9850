"""The same model as transformers runs it: what ours is compared with, in numbers and in speed. Serves nobody."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


class Peer:
    """A model folder under transformers, with the attention that it takes by itself.

    Args:
        folder: in Hugging Face's layout.
        dtype: of weights and KV.

    Raises:
        OSError: transformers can't read the folder.
    """

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM, DynamicCache

        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self._new_cache = DynamicCache
        self._cache = DynamicCache()
        self._next = torch.empty(0, 1, dtype=torch.int64)

    @torch.inference_mode()
    def score(self, token_ids: Sequence[int], num_last: int) -> Tensor:
        """Logits after each of the last tokens, fp32 `[num_last, vocab]`, from one pass over all."""
        output = self._model(torch.tensor([list(token_ids)]), use_cache=False, logits_to_keep=num_last)
        return torch.as_tensor(output.logits[0]).float()

    @torch.inference_mode()
    def read(self, documents: Sequence[Sequence[int]]) -> None:
        """Reads documents of one length, and chooses the first token of each."""
        self._cache = self._new_cache()
        self._step(torch.tensor([list(document) for document in documents]))

    @torch.inference_mode()
    def step(self) -> list[int]:
        """The next token of each, greedily."""
        return self._step(self._next)

    def _step(self, token_ids: Tensor) -> list[int]:
        output = self._model(token_ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._next = torch.as_tensor(output.logits[:, -1]).argmax(-1, keepdim=True)
        return [int(token) for token in self._next[:, 0]]
