"""What a sequence that drops tokens holds, what it remembers of them, and how it drops some.

Knows nothing of attention, scheduling or models. Which tokens stay, and what becomes of the others, methods say.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvservice.compression.methods import EMPTY, Dropping, Held, Stages
from kvservice.errors import InternalError
from kvservice.kernels.cpu import HeldPart
from kvservice.kv.sequence import SequenceState
from kvservice.recall.packed import PackedTokens
from kvservice.types import BLOCK_TOKENS


class HeldStep:
    """The next tokens of a sequence on their way through the layers. Nothing of it counts until it is committed.

    Attributes:
        num_tokens: of them.
        positions: int64 `[rows, t]`, of the slots that there will be; a row's new tokens lie behind its old ones.
        has_empty: some rows hold fewer tokens than others.
        widest: the most tokens that a row held before.
        num_after: tokens that come behind them before some are dropped.
        counts: int32 `[rows]`, the tokens that each row held before.
        remembered: fp32 `[rows, t]` each; of a layer that has been passed, with what was seen there. The step's own.
    """

    def __init__(
        self,
        num_tokens: int,
        positions: Tensor,
        widest: int,
        num_after: int,
        counts: Tensor,
        remembered: dict[str, Tensor],
    ) -> None:
        self.num_tokens = num_tokens
        self.positions = positions
        self.counts = counts
        self.has_empty = bool((positions == EMPTY).any())
        self.widest = widest
        self.num_after = num_after
        self.remembered = remembered


class HeldTokens:
    """Drops tokens of one sequence by the methods of its recipe.

    Args:
        stages: these.
        state: the sequence's KV; all of it is on the device when this is used.
        separators: the model's, see `Held`.
        packed: what it keeps in few bits, if its recipe has a codec. Its slots come before those of the state.
        most_groups: of packed tokens.

    Attributes:
        read_until: tokens behind this position are those of an answer.
        num_dropped: tokens that it dropped so far, over all (layer, KV head)s.
    """

    def __init__(
        self,
        stages: Stages,
        state: SequenceState,
        separators: frozenset[int] = frozenset(),
        packed: PackedTokens | None = None,
        most_groups: int = 0,
    ) -> None:
        self.stages = stages
        self.state = state
        self.packed = packed
        self.read_until = 0
        self._most_groups = most_groups
        self._separators = separators
        self.step: HeldStep | None = None
        self._remembered: dict[str, Tensor] = {}
        self._limits: Tensor | None = None
        self._thresholds: list[float | None] = [None] * state.layout.num_layers
        self.num_dropped = 0

    @property
    def num_held(self) -> int:
        """Tokens that a (layer, KV head) holds, on average, rounded up; packed ones count by their bytes."""
        state = self.state
        exact = -(-int(state.counts.sum()) // self._num_rows) if state.is_ragged else state.num_computed
        return exact + (self.packed.worth_tokens if self.packed else 0)

    @property
    def num_slots(self) -> int:
        """Slots of a (layer, KV head)."""
        return self._num_packed + self.state.num_resident

    @property
    def positions(self) -> Tensor:
        """The position in each slot, int64 `[layers * kv, num_slots]`; EMPTY where there is none."""
        return self._positions()

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
        counts = counts.squeeze(1).to(torch.int32)
        self.step = HeldStep(num_tokens, positions, widest, self._num_after(num_tokens), counts, remembered)
        return self.step

    @property
    def needs_weights(self) -> bool:
        """Whether the step's attention can't be left to kernels that tell no weights, of tokens that stand in order."""
        assert self.step is not None
        return self.state.is_ragged or self.stages.scorer.watches(self.step.num_after)

    def commit(self) -> int:
        """The step's tokens are computed, and counted in by the state: drops what there are too many of.

        Returns:
            How many tokens it holds less than before, on average.
        """
        step, self.step = self.step, None
        if step is None:
            raise InternalError("tokens are committed that no step computed")
        self._remembered = step.remembered
        self._meet(step)
        limits, num_held = self.stages.limits, self.num_held
        is_read = self.state.num_computed == len(self.state.tokens)
        if num_held <= limits.kept_tokens or not (is_read or num_held >= limits.read_tokens):
            return 0
        self._drop()
        return num_held - self.num_held

    def read(self, layer: int, num_slots: int) -> tuple[Tensor, Tensor]:
        """Copies of K and V in the first slots of a layer, each `[kv, num_slots, d]`."""
        keys, values = self.state.read(layer, num_slots - self._num_packed)
        if self.packed is None or not self._num_packed:
            return keys, values
        packed_keys, packed_values = self.packed.read(layer)
        return torch.cat([packed_keys, keys], 1), torch.cat([packed_values, values], 1)

    def part(self, layer: int, num_slots: int) -> HeldPart | None:
        """The same as kernels take it; None if they can't unpack it."""
        packed = None
        if self.packed is not None and self._num_packed:
            packed = self.packed.for_kernels(layer)
            if packed is None:
                return None
        arena, table = self.state.cells(layer)
        return HeldPart(arena, table, num_slots, packed)

    def fork(self, state: SequenceState) -> HeldTokens:
        """The same of another sequence, which holds the same tokens."""
        packed = self.packed.fork() if self.packed else None
        twin = HeldTokens(self.stages, state, self._separators, packed, self._most_groups)
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

    @property
    def _num_packed(self) -> int:
        return self.packed.num_tokens if self.packed else 0

    def _positions(self) -> Tensor:
        exact = self.state.positions.long().expand(self._num_rows, -1)
        return torch.cat([self.packed.positions, exact], 1) if self.packed else exact

    def _num_after(self, num_tokens: int) -> int:
        """Tokens behind the next `num_tokens` that come before some are dropped."""
        limits, held = self.stages.limits, self.num_held + num_tokens
        pending = len(self.state.tokens) - self.state.num_computed - num_tokens
        if held + pending <= limits.kept_tokens:
            return limits.kept_tokens + 1 - held
        return max(0, min(pending, limits.read_tokens - held))

    def _meet(self, step: HeldStep) -> None:
        """Remembers what follows from the keys of a step's tokens."""
        if not self.stages.scorer.goes_by_keys:
            return
        new = step.counts.long().unsqueeze(1) + torch.arange(step.num_tokens, device=step.counts.device)
        keys = self._at(new - self._num_packed)[0].float()
        for name, numbers in self.stages.scorer.meet(keys).items():
            self._remembered[name].scatter_(1, new, numbers)

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
        if self.packed is not None:
            self._pack(self.packed, scores, positions)
            return
        stays = highest(scores, self._limits - stages.scorer.slack(stages.limits.kept_tokens))
        self.num_dropped += int((positions != EMPTY).sum() - stays.sum())
        if stages.merger is not None:
            self._merge(stays, positions != EMPTY)
        self._reorder(state.keep(stays))

    def _pack(self, packed: PackedTokens, scores: Tensor, positions: Tensor) -> None:
        """Packs all exact tokens but the latest, or the best of them, and drops the groups that are worth least."""
        codec, state, size, first = self.stages.codec, self.state, packed.group_tokens, packed.num_tokens
        assert codec is not None
        old = positions[:, first:].argsort(dim=1)[:, : state.num_resident - codec.exact_tokens]
        count = min(old.shape[1] // size, self._most_groups)
        new = old[:, : count * size]
        if count == self._most_groups:
            best = scores[:, first:].gather(1, old).topk(count * size, dim=1).indices
            new = old.gather(1, best.sort(dim=1).values)
            gone = old
        else:
            gone = new
        parts = packed.pack(*self._at(new))
        worth = torch.cat([scores[:, :first], scores[:, first:].gather(1, new)], 1)
        worth = worth.view(self._num_rows, -1, size).mean(2)
        kept = worth.topk(min(worth.shape[1], self._most_groups), dim=1).indices.sort(dim=1).values
        before = int((positions != EMPTY).sum())
        stays = torch.ones_like(positions[:, first:], dtype=torch.bool).scatter_(1, gone, value=False)
        source = state.keep(stays)
        packed.replace(parts, positions[:, first:].gather(1, new), kept)
        self.num_dropped += before - int((self._positions() != EMPTY).sum())
        slots = torch.cat([torch.arange(first, device=new.device).expand(self._num_rows, -1), new + first], 1)
        slots = slots.view(self._num_rows, -1, size).gather(1, kept.unsqueeze(2).expand(-1, -1, size)).flatten(1)
        self._reorder(torch.cat([slots, source + first], 1))

    def _reorder(self, source: Tensor) -> None:
        """What is remembered goes with the tokens: `source` is where each slot was before, int64 `[rows, t]`."""
        if self.stages.scorer.restarts:
            self._remembered = {}
        else:
            self._remembered = {name: numbers.gather(1, source) for name, numbers in self._remembered.items()}

    def _at(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of some of the state's slots of each row, `[rows, n, d]`; `slots` is int64 `[rows, n]`."""
        by_layer = slots.view(-1, self.state.layout.num_kv_heads, slots.shape[1])
        pairs = [self.state.read_at(layer, some) for layer, some in enumerate(by_layer)]
        return torch.cat([keys for keys, _ in pairs]), torch.cat([values for _, values in pairs])

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
