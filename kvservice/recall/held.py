"""What a sequence that drops tokens holds, what it remembers of them, and how it drops some.

Knows nothing of attention, scheduling or models. Which tokens stay, and what becomes of the others, methods say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from kvservice.compression.methods import EMPTY, Dropping, Held, Stages
from kvservice.errors import InternalError
from kvservice.kv.sequence import SequenceState
from kvservice.types import BLOCK_TOKENS


class HeldStep:
    """The next tokens of a sequence on their way through the layers. Nothing of it counts until it is committed.

    Attributes:
        num_tokens: of them.
        positions: int64 `[rows, t]`, of the slots that there will be; a row's new tokens lie behind its old ones.
        has_empty: some rows hold fewer tokens than others.
        widest: the most tokens that a row held before.
        num_after: tokens that come behind them before some are dropped.
        remembered: fp32 `[rows, t]` each; of a layer that has been passed, with what was seen there.
    """

    def __init__(
        self, num_tokens: int, positions: Tensor, widest: int, num_after: int, remembered: dict[str, Tensor]
    ) -> None:
        self.num_tokens = num_tokens
        self.positions = positions
        self.has_empty = bool((positions == EMPTY).any())
        self.widest = widest
        self.num_after = num_after
        self.remembered = remembered

    def of_layer(self, rows: slice) -> dict[str, Tensor]:
        """What is remembered of the tokens of one layer."""
        return {name: numbers[rows] for name, numbers in self.remembered.items()}

    def learn(self, rows: slice, remembered: Mapping[str, Tensor]) -> None:
        """Takes in what was seen in a layer."""
        for name, numbers in self.remembered.items():
            numbers[rows] = remembered[name]


class HeldTokens:
    """Drops tokens of one sequence by the methods of its recipe.

    Args:
        stages: these.
        state: the sequence's KV; all of it is on the device when this is used.
        separators: the model's, see `Held`.

    Attributes:
        read_until: tokens behind this position are those of an answer.
        num_dropped: tokens that it dropped so far, over all (layer, KV head)s.
    """

    def __init__(self, stages: Stages, state: SequenceState, separators: frozenset[int] = frozenset()) -> None:
        self.stages = stages
        self.state = state
        self.read_until = 0
        self._separators = separators
        self.step: HeldStep | None = None
        self._remembered: dict[str, Tensor] = {}
        self._limits: Tensor | None = None
        self._thresholds: list[float | None] = [None] * state.layout.num_layers
        self.num_dropped = 0

    @property
    def num_held(self) -> int:
        """Tokens that a (layer, KV head) holds, on average, rounded up."""
        state = self.state
        return -(-int(state.counts.sum()) // self._num_rows) if state.is_ragged else state.num_computed

    @property
    def turns_keys(self) -> bool:
        """Whether kept tokens are taken to stand elsewhere than they did."""
        return self.stages.positions is not None

    @property
    def num_surplus(self) -> int:
        """Of these, those beyond what it may keep: more is being read."""
        return max(0, self.num_held - self.stages.limits.kept_tokens)

    @property
    def remembered_bytes(self) -> int:
        """What the method remembers of the held tokens: not in the arena."""
        return sum(numbers.nbytes for numbers in self._remembered.values())

    @property
    def tokens_until_drop(self) -> int:
        """How many tokens may be read before it must drop some."""
        return max(1, self.stages.limits.read_tokens - self.num_held)

    def begin(self, num_tokens: int) -> HeldStep:
        """The sequence's next tokens begin their way through the layers; room for them has been made."""
        state = self.state
        old = self._positions()
        counts = (old != EMPTY).sum(1, keepdim=True)
        widest = old.shape[1]
        positions = old.new_full((old.shape[0], widest + num_tokens), EMPTY)
        positions[:, :widest] = old
        new = torch.arange(num_tokens, device=old.device)
        positions.scatter_(1, counts + new, (state.num_computed + new).expand(old.shape[0], -1))
        remembered = {}
        for name in self.stages.scorer.remembers:
            numbers = torch.zeros(positions.shape, device=old.device)
            if name in self._remembered:
                numbers[:, :widest] = self._remembered[name]
            remembered[name] = numbers
        self.step = HeldStep(num_tokens, positions, widest, self._num_after(num_tokens), remembered)
        return self.step

    def commit(self) -> int:
        """The step's tokens are computed, and counted in by the state: drops what there are too many of.

        Returns:
            How many tokens it holds less than before, on average.
        """
        step, self.step = self.step, None
        if step is None:
            raise InternalError("tokens are committed that no step computed")
        self._remembered = step.remembered
        limits, num_held = self.stages.limits, self.num_held
        is_read = self.state.num_computed == len(self.state.tokens)
        if num_held <= limits.kept_tokens or not (is_read or num_held >= limits.read_tokens):
            return 0
        self._drop()
        return num_held - self.num_held

    def fork(self, state: SequenceState) -> HeldTokens:
        """The same of another sequence, which holds the same tokens."""
        twin = HeldTokens(self.stages, state, self._separators)
        twin.read_until = self.read_until
        twin._remembered = dict(self._remembered)
        twin._limits = self._limits
        twin._thresholds = list(self._thresholds)
        twin.num_dropped = self.num_dropped
        return twin

    def forget(self) -> None:
        """There are no tokens any more."""
        self.step = None
        self._remembered = {}
        self._limits = None
        self._thresholds = [None] * len(self._thresholds)

    # ----------------------------------------------------------------------------------------------------------------

    @property
    def _num_rows(self) -> int:
        layout = self.state.layout
        return layout.num_layers * layout.num_kv_heads

    def _positions(self) -> Tensor:
        return self.state.positions.long().expand(self._num_rows, -1)

    def _num_after(self, num_tokens: int) -> int:
        """Tokens behind the next `num_tokens` that come before some are dropped."""
        limits, held = self.stages.limits, self.num_held + num_tokens
        pending = len(self.state.tokens) - self.state.num_computed - num_tokens
        if held + pending <= limits.kept_tokens:
            return limits.kept_tokens + 1 - held
        return max(0, min(pending, limits.read_tokens - held))

    def _drop(self) -> None:
        state, stages = self.state, self.stages
        positions = self._positions()
        held = Held(
            positions=positions,
            num_tokens=state.num_computed,
            token_ids=state.tokens,
            limits=self._limits if self._limits is not None else self._even(positions),
            num_kv_heads=state.layout.num_kv_heads,
            remembered=self._remembered,
            separators=self._separators,
        )
        if self._limits is None:
            self._limits = self._allocate(held)
            held = replace(held, limits=self._limits)
        scores = stages.scorer.score(held).masked_fill(positions == EMPTY, -torch.inf)
        stays = highest(scores, self._limits - stages.scorer.slack(stages.limits.kept_tokens))
        self.num_dropped += int((positions != EMPTY).sum() - stays.sum())
        if stages.merger is not None:
            self._merge(stays, positions != EMPTY)
        source = state.keep(stays)
        if stages.scorer.restarts:
            self._remembered = {}
        else:
            self._remembered = {name: numbers.gather(1, source) for name, numbers in self._remembered.items()}

    def _even(self, positions: Tensor) -> Tensor:
        return positions.new_full((positions.shape[0],), self.stages.limits.kept_tokens)

    def _allocate(self, held: Held) -> Tensor:
        """What each row may keep, from now on."""
        allocator = self.stages.allocator
        if allocator is None:
            return held.limits
        rows = held.positions.shape[0]
        num_blocks = rows * (self.stages.limits.kept_tokens // BLOCK_TOKENS)
        blocks = allocator.allocate(held, num_blocks)
        if int(blocks.sum()) > num_blocks or int(blocks.min()) < 1:
            raise InternalError(f"{blocks.tolist()} blocks were shared out among {rows} rows, of {num_blocks}")
        return blocks * BLOCK_TOKENS

    def _merge(self, stays: Tensor, is_held: Tensor) -> None:
        """Puts what is dropped into what stays, layer by layer."""
        merger, num_kv = self.stages.merger, self.state.layout.num_kv_heads
        assert merger is not None
        self.state.own_all()
        for layer in range(self.state.layout.num_layers):
            rows = slice(layer * num_kv, (layer + 1) * num_kv)
            goes = is_held[rows] & ~stays[rows]
            if bool(goes.any()):
                keys, values = self._read(layer)
                dropping = Dropping(keys, values, stays[rows], goes)
                keys, values, self._thresholds[layer] = merger.absorb(dropping, self._thresholds[layer])
                self.state.write(layer, keys, values, stays[rows])

    def _read(self, layer: int) -> tuple[Tensor, Tensor]:
        keys, values = self.state.read(layer, self.state.num_resident)
        return keys.float(), values.float()


def highest(scores: Tensor, limits: Tensor) -> Tensor:
    """The `limits[row]` highest of each row, bool `[rows, t]`; minus infinity is never among them.

    Of equal ones the earlier slots.
    """
    stays = scores > -torch.inf
    surplus = stays.sum(1, keepdim=True) - limits.unsqueeze(1)
    if int(surplus.max()) <= 1:
        # The usual case, told quickly: a token came, and one goes.
        last = scores.shape[1] - 1 - scores.masked_fill(~stays, torch.inf).flip(1).argmin(1, keepdim=True)
        return stays.scatter(1, last, stays.gather(1, last) & (surplus < 1))
    order = scores.argsort(dim=1, descending=True, stable=True)
    chosen = torch.arange(scores.shape[1], device=scores.device) < limits.unsqueeze(1)
    return torch.zeros_like(chosen).scatter(1, order, chosen) & stays
