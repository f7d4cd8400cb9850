"""A training run: a network that shares distant keys learns to answer as the dense one does.

    texts ──▶ dense ─────────────▶ next-token distributions ─┐
      └─────▶ sharing + changes ─▶ next-token distributions ─┴▶ KL ──▶ AdamW on the changes

Knows nothing of files and of how progress is shown.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvservice.compression.layer_groups import LayerGroups
from kvservice.compression.sharing import SharingPlan
from kvservice.errors import ConfigError
from kvservice.models.adapter import LowRank, MatrixChange
from kvservice.training.attention import SharedAttention
from kvservice.training.loss import distances, kl_to, state_distance
from kvservice.training.network import LayerChanges, Network, Pass
from kvservice.training.settings import FIRST_DISTANT, TrainingSettings
from kvservice.training.texts import Texts

MOST_GRADIENT = 1.0
"""Norm of all gradients together; longer ones are cut to it."""

BETAS = (0.9, 0.95)


@dataclass(frozen=True, slots=True)
class Step:
    """What one step of training did.

    Attributes:
        step: from 1 on.
        tokens: read so far.
        seconds: that the step took.
        learning_rate: of the step.
        kl: KL(dense ‖ sharing) of the next token, in nats; mean over the step's texts.
        state_distance: see `loss.state_distance`, mean over layers; 0 where it isn't asked for.
        gradient: its norm.
    """

    step: int
    tokens: int
    seconds: float
    learning_rate: float
    kl: float
    state_distance: float
    gradient: float


@dataclass(frozen=True, slots=True)
class Held:
    """Distance from dense on texts that aren't trained on, each weighing the same.

    Attributes:
        kl: KL(dense ‖ sharing) of the next token, in nats.
        nll: of the texts' own tokens, in nats.
        dense_nll: the same of the dense model.
        unshared_nll: of the adapted weights where every layer attends by its own keys.
        top1: share of tokens for which both rank the same one first.
    """

    kl: float
    nll: float
    dense_nll: float
    unshared_nll: float
    top1: float


class Trainer:
    """One run.

    Args:
        network: the model as it is.
        groups: which layers share.
        settings: see there.
        texts: to train on.
        held: not to train on; may be none.

    Raises:
        ConfigError: the groups share nothing.
    """

    def __init__(
        self, network: Network, groups: LayerGroups, settings: TrainingSettings, texts: Texts, held: Texts | None
    ) -> None:
        self.network = network
        self.settings = settings
        self._texts = texts
        self._held = [] if held is None else held.one_of_each(settings.seed)
        self._dense = SharedAttention(None, network.device)
        self._shared = SharedAttention(SharingPlan(groups, settings.mode), network.device)
        self._layers = _changed_layers(groups, settings)
        self.changes = self._first_changes()
        self.optimizer = torch.optim.AdamW(self.parameters, lr=settings.learning_rate, betas=BETAS, weight_decay=0.0)
        self.step_number = 0

    @property
    def parameters(self) -> list[Tensor]:
        """What is trained, in fp32, always in the same order."""
        found: list[Tensor] = []
        for of_layer in self.changes.values():
            for change in of_layer.values():
                found += [change.a, change.b] if isinstance(change, LowRank) else [change]
        return found

    @property
    def tokens(self) -> int:
        """Read so far."""
        return self.step_number * self.settings.texts_per_step * self.settings.context

    def step(self) -> Step:
        """One step. Blocks for seconds."""
        settings, began = self.settings, time.monotonic()
        rate = settings.rate(self.step_number)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        kl, distance = 0.0, 0.0
        for index in range(settings.texts_per_step):
            number = self.step_number * settings.texts_per_step + index
            of_text = self._backward(number)
            kl += of_text[0] / settings.texts_per_step
            distance += of_text[1] / settings.texts_per_step
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, MOST_GRADIENT))
        self.optimizer.step()
        self.step_number += 1
        return Step(self.step_number, self.tokens, time.monotonic() - began, rate, kl, distance, norm)

    @torch.no_grad()
    def evaluate(self) -> Held | None:
        """How far it is from dense on the texts held out; None if there are none."""
        if not self._held:
            return None
        rows = []
        for token_ids in self._held:
            dense = self.network.run(token_ids[:-1], self._dense, {}).out
            last = slice(max(FIRST_DISTANT, dense.shape[0] - self.settings.loss_tokens), None)
            others = [self.network.run(token_ids[:-1], each, self.changes).out for each in (self._shared, self._dense)]
            ids = token_ids[1:][last].to(self.network.device)
            shared, unshared = (distances(dense[last], out[last], self.network.head, ids) for out in others)
            rows.append((shared.kl, shared.nll, shared.dense_nll, unshared.nll, shared.top1))
        return Held(*(sum(column) / len(rows) for column in zip(*rows, strict=True)))

    def _backward(self, number: int) -> tuple[float, float]:
        """Adds one text's gradients; the two parts of its loss."""
        settings = self.settings
        token_ids = self._texts.part(settings.seed, number)
        keep = settings.state_weight > 0
        with torch.no_grad():
            dense = self.network.run(token_ids, self._dense, {}, keep_states=keep)
        shared = self.network.run(token_ids, self._shared, self.changes, recompute=settings.recompute, keep_states=keep)
        drawn = torch.Generator().manual_seed(settings.seed * 1_000_003 + number)
        rows = torch.randperm(settings.context - FIRST_DISTANT, generator=drawn)[: settings.loss_tokens]
        rows = (rows.sort().values + FIRST_DISTANT).to(self.network.device)
        kl = kl_to(dense.out[rows], shared.out[rows], self.network.head)
        distance = self._state_distance(dense, shared) if keep else torch.zeros(())
        loss = (kl + settings.state_weight * distance) / settings.texts_per_step
        loss.backward()  # type: ignore[no-untyped-call]
        return float(kl.detach()), float(distance.detach())

    def _state_distance(self, dense: Pass, shared: Pass) -> Tensor:
        pairs = [(dense.states[layer], shared.states[layer]) for layer in self._layers]
        return torch.stack([state_distance(wanted, found) for wanted, found in pairs]).mean()

    def _first_changes(self) -> dict[int, LayerChanges]:
        """None at all, in effect: `b` is zero."""
        drawn = torch.Generator().manual_seed(self.settings.seed)
        return {
            layer: {
                name: self._first_change(getattr(self.network.layers[layer], name), drawn)
                for name in self.settings.matrices
            }
            for layer in self._layers
        }

    def _first_change(self, weight: Tensor, drawn: torch.Generator) -> MatrixChange:
        out_width, in_width = weight.shape
        if self.settings.method == "full":
            return torch.zeros(out_width, in_width, device=weight.device, requires_grad=True)
        bound = in_width**-0.5
        a = torch.empty(self.settings.rank, in_width).uniform_(-bound, bound, generator=drawn)
        b = torch.zeros(out_width, self.settings.rank)
        return LowRank(*(x.to(weight.device).requires_grad_() for x in (a, b)))


def _changed_layers(groups: LayerGroups, settings: TrainingSettings) -> Sequence[int]:
    if settings.layers == "all":
        return range(groups.num_layers)
    heads = range(groups.num_kv_heads)
    found = [
        layer for layer in range(groups.num_layers) if not all(groups.stores_distant_key(layer, head) for head in heads)
    ]
    if not found:
        raise ConfigError("the map shares no keys: there is nothing to train; make one with a lower --delta")
    return found
