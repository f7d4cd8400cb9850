"""Choosing the next token of every running answer at once. Knows logits, parameters and positions; no model, no call.

The stages, in order. Each is one pass of tensor operations over the rows that ask for it:

    logit bias               added to the logits of the named tokens (OpenAI)
    repetition penalty       tokens of context and answer: positive logits divided by it, negative ones multiplied
                             (CTRL, Keskar et al., arXiv:1909.05858; HF's RepetitionPenaltyLogitsProcessor)
    frequency, presence      subtracted for tokens of the answer: times their count, and once (OpenAI, TGI)
    grammar                  tokens that can't follow get minus infinity
    ── log-probabilities are taken here: log_softmax of the logits as they are now
    temperature              divides the logits; at 0 the largest one is taken and nothing below is done
    top-k                    see truncation.py for this and the next three; each sees what the one before it left
    typical-p                arXiv:2202.00666
    top-p                    arXiv:1904.09751
    min-p                    arXiv:2407.01082
    draw                     one number in [0, 1) made from (seed, position), against the sums of the weights in the
                             order of token ids

A row's token and log-probabilities are the same bits alone, in any batch, in any order, with any number of threads:
sums over the vocabulary are either exact (the weights are whole numbers) or softmax's own, which go along one row. On a
CPU, what is below the line is done by a kernel, a row by one thread; its weights are rounded elsewhere, so that now and
then, by either way, a token at a border of what is kept stays or doesn't.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kvservice.engine.grammar import TokenMatcher
from kvservice.engine.truncation import keep_min_p, keep_top_k, keep_top_p, keep_typical, weights_of
from kvservice.errors import InternalError, KVServiceError
from kvservice.kernels import cpu
from kvservice.types import SamplingParams, TokenLogprob

_DRAW_BITS = 53
_LEAST_TEMPERATURE = 1e-30
"""Below it, fp32 has nothing to divide by."""
_ROW_ALIGNMENT = 4
"""Logits in 16 bytes. Kernels may add up a row that begins elsewhere in another order."""

_Entries = tuple[Sequence[int], Sequence[float]]
"""Token ids and a number for each."""


class SamplerRow:
    """What choosing the tokens of one answer needs to know of it. Changes with every token."""

    __slots__ = ("_answer", "_new", "_seen", "_seen_ids", "bias", "matcher", "params", "seed")

    def __init__(
        self, params: SamplingParams, index: int, context: Sequence[int], matcher: TokenMatcher | None = None
    ) -> None:
        """For an answer that has no token yet.

        Args:
            params: as asked for.
            index: number of the answer among the call's `n`.
            context: the tokens before the answer.
            matcher: holds the answer to a grammar.
        """
        self.params = params
        self.matcher = matcher
        self.seed = params.seed if index == 0 else _hash(params.seed, index, 64)
        """Answers to one prompt differ; the first is the one that `n` = 1 gives."""
        bias = dict(params.logit_bias)
        self.bias: _Entries = (list(bias), list(bias.values()))
        self._answer: Counter[int] = Counter()
        self._seen = set(context) if params.repetition_penalty != 1.0 else set()
        self._seen_ids = torch.tensor(sorted(self._seen), dtype=torch.int64)
        self._new: list[int] = []

    def accept(self, token_id: int) -> None:
        """Counts in a token that was chosen for this answer, also the one that ends it."""
        params = self.params
        if params.frequency_penalty != 0.0 or params.presence_penalty != 0.0:
            self._answer[token_id] += 1
        if params.repetition_penalty != 1.0 and token_id not in self._seen:
            self._seen.add(token_id)
            self._new.append(token_id)
        if self.matcher is not None:
            self.matcher.accept(token_id)

    def seen_ids(self, device: torch.device) -> Tensor:
        """Distinct tokens of context and answer, int64, if there is a repetition penalty."""
        if self._new or self._seen_ids.device != device:
            new = torch.tensor(self._new, dtype=torch.int64, device=device)
            self._seen_ids = torch.cat([self._seen_ids.to(device), new])
            self._new.clear()
        return self._seen_ids

    def answer_penalties(self) -> _Entries:
        """Tokens of the answer and what is taken from their logits, if there is a frequency or presence penalty."""
        frequency, presence = self.params.frequency_penalty, self.params.presence_penalty
        return list(self._answer), [count * frequency + presence for count in self._answer.values()]


@dataclass(frozen=True, slots=True)
class Sampled:
    """The next token of an answer.

    Attributes:
        token_id: the token.
        logprobs: if asked for, the token's first, then the most likely ones, the likeliest first. Tokens that have no
            probability are left out.
    """

    token_id: int
    logprobs: tuple[TokenLogprob, ...] = ()


def sample(logits: Tensor, rows: Sequence[SamplerRow], positions: Sequence[int]) -> list[Sampled | KVServiceError]:
    """The next token of each row, or what went wrong with this row alone.

    That is an InternalError if it has a logit that is NaN, or none that is finite, and what its matcher raised.

    Args:
        logits: fp32 `[n, vocab]`; not changed.
        rows: one for each row of logits. Not changed: `accept` the token afterwards.
        positions: where each token will stand in its sequence.
    """
    if not rows:
        return []
    vocab_size = logits.shape[1]
    if vocab_size % _ROW_ALIGNMENT:
        logits = functional.pad(logits, (0, -vocab_size % _ROW_ALIGNMENT), value=-torch.inf)
    highest, tokens = _highest(logits)
    is_sound = highest.isfinite()
    faults: dict[int, KVServiceError] = {}
    adjusted = _adjusted(logits, rows, faults)
    if adjusted is not logits:
        highest, tokens = _highest(adjusted)
        is_sound &= highest.isfinite()
    for i, sound in enumerate(is_sound.tolist()):
        if not sound:
            faults.setdefault(i, InternalError(f"the model gave no finite logits for position {positions[i]}"))
    hot = [i for i, row in enumerate(rows) if row.params.temperature > 0.0 and i not in faults]
    if hot:
        at = torch.tensor(hot, device=logits.device)
        drawn = _drawn_by_kernel if _has_kernels(logits) else _drawn
        tokens[at] = drawn(adjusted[at], [rows[i] for i in hot], [positions[i] for i in hot])
    chosen = tokens.tolist()
    logprobs = _logprobs(adjusted, rows, tokens)
    return [faults.get(i) or Sampled(token, logprobs.get(i, ())) for i, token in enumerate(chosen)]


def _has_kernels(logits: Tensor) -> bool:
    return logits.device.type == "cpu" and cpu.isa() != "none"


def _highest(logits: Tensor) -> tuple[Tensor, Tensor]:
    if _has_kernels(logits):
        return cpu.highest(logits)
    values, tokens = logits.max(-1)
    return values, tokens


# -- what changes logits -----------------------------------------------------------------------------------------------


def _adjusted(logits: Tensor, rows: Sequence[SamplerRow], faults: dict[int, KVServiceError]) -> Tensor:
    """Logits after bias, penalties and grammars; the given ones if no row asks for any. Notes matchers' faults."""
    biased = _wanting(rows, lambda row: bool(row.bias[0]))
    repeating = _wanting(rows, lambda row: row.params.repetition_penalty != 1.0)
    counting = _wanting(rows, lambda row: row.params.frequency_penalty != 0.0 or row.params.presence_penalty != 0.0)
    matching = [(i, row.matcher) for i, row in enumerate(rows) if row.matcher is not None]
    if not (biased or repeating or counting or matching):
        return logits
    logits = logits.clone()
    if biased:
        _add(logits, ((i, rows[i].bias) for i in biased), 1.0)
    if repeating:
        _penalise_repetition(logits, rows, repeating)
    if counting:
        _add(logits, ((i, rows[i].answer_penalties()) for i in counting), -1.0)
    if matching:
        _mask(logits, matching, faults)
    return logits


def _wanting(rows: Sequence[SamplerRow], wants: Callable[[SamplerRow], bool]) -> list[int]:
    return [i for i, row in enumerate(rows) if wants(row)]


def _add(logits: Tensor, entries: Iterable[tuple[int, _Entries]], sign: float) -> None:
    at: list[int] = []
    token_ids: list[int] = []
    values: list[float] = []
    for i, (ids, numbers) in entries:
        at += [i] * len(ids)
        token_ids += ids
        values += numbers
    device = logits.device
    index = (
        torch.tensor(at, device=device, dtype=torch.int64),
        torch.tensor(token_ids, device=device, dtype=torch.int64),
    )
    # A token stands at most once in a row's entries, so nothing is added up here.
    logits[index] += sign * torch.tensor(values, device=device, dtype=torch.float32)


def _penalise_repetition(logits: Tensor, rows: Sequence[SamplerRow], at: Sequence[int]) -> None:
    device = logits.device
    seen = [rows[i].seen_ids(device) for i in at]
    lengths = torch.tensor([ids.numel() for ids in seen], device=device)
    row_of = torch.tensor(at, device=device).repeat_interleave(lengths)
    penalties = torch.tensor([rows[i].params.repetition_penalty for i in at], dtype=torch.float32, device=device)
    penalty = penalties.repeat_interleave(lengths)
    token_ids = torch.cat(seen)
    found = logits[row_of, token_ids]
    logits[row_of, token_ids] = torch.where(found > 0, found / penalty, found * penalty)


def _mask(logits: Tensor, matching: Sequence[tuple[int, TokenMatcher]], faults: dict[int, KVServiceError]) -> None:
    found: dict[int, Tensor] = {}
    for i, matcher in matching:
        try:
            found[i] = matcher.allowed()
        except KVServiceError as error:
            faults[i] = error
    if not found:
        return
    words = torch.stack(list(found.values())).to(logits.device)
    bits = (words[:, :, None] >> torch.arange(32, dtype=torch.int32, device=logits.device)) & 1
    forbidden = bits.flatten(1) == 0
    forbidden = functional.pad(forbidden, (0, logits.shape[1] - forbidden.shape[1]), value=True)
    index = torch.tensor(list(found), device=logits.device)
    logits[index] = logits[index].masked_fill_(forbidden, -torch.inf)


# -- what is told of them ----------------------------------------------------------------------------------------------


def _logprobs(logits: Tensor, rows: Sequence[SamplerRow], tokens: Tensor) -> dict[int, tuple[TokenLogprob, ...]]:
    """Of the rows that ask for it."""
    asking = _wanting(rows, lambda row: row.params.logprobs is not None)
    if not asking:
        return {}
    index = torch.tensor(asking, device=logits.device)
    logprobs = logits[index].log_softmax(-1)
    chosen = tokens[index, None]
    counts = [rows[i].params.logprobs or 0 for i in asking]
    likeliest = _likeliest(logprobs, min(max(counts), logits.shape[1]))
    reported = torch.cat([chosen, likeliest], 1)
    pairs = zip(reported.tolist(), logprobs.gather(1, reported).tolist(), strict=True)
    return {
        i: tuple(
            TokenLogprob(token_id, logprob)
            for token_id, logprob in zip(ids[: 1 + count], values[: 1 + count], strict=True)
            if math.isfinite(logprob)
        )
        for i, count, (ids, values) in zip(asking, counts, pairs, strict=True)
    }


def _likeliest(logprobs: Tensor, count: int) -> Tensor:
    """Ids `[n, count]` of the greatest log-probabilities; of equal ones the lower id is first."""
    # No two tokens have the same key: the bits of a float that isn't positive, then the id.
    magnitude = logprobs.view(torch.int32) & 0x7FFFFFFF
    key = (magnitude.long() << 32) | torch.arange(logprobs.shape[1], device=logprobs.device)
    return key.topk(count, largest=False).indices


# -- the draw ----------------------------------------------------------------------------------------------------------


def _drawn_by_kernel(logits: Tensor, rows: Sequence[SamplerRow], positions: Sequence[int]) -> Tensor:
    """As `_drawn`."""
    draws = []
    for row, position in zip(rows, positions, strict=True):
        params = row.params
        draws.append(
            cpu.Draw(
                draw=_hash(row.seed, position, _DRAW_BITS),
                temperature=max(params.temperature, _LEAST_TEMPERATURE),
                top_k=params.top_k,
                typical_p=params.typical_p,
                top_p=params.top_p,
                min_p=params.min_p,
            )
        )
    return cpu.draw_tokens(logits, draws)


def _drawn(logits: Tensor, rows: Sequence[SamplerRow], positions: Sequence[int]) -> Tensor:
    """Token ids `[n]` drawn from rows whose temperature isn't 0."""
    temperature = _column(logits, [row.params.temperature for row in rows])[:, None].float()
    # From the largest down, so that a low temperature can't make an infinity of it.
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature.clamp_(min=_LEAST_TEMPERATURE)
    top_k = [row.params.top_k for row in rows]
    if cut := _wanting(rows, lambda row: 0 < row.params.top_k < logits.shape[1]):
        index = torch.tensor(cut, device=logits.device)
        logits[index] = keep_top_k(logits[index], torch.tensor([top_k[i] for i in cut], device=logits.device))
    weights = weights_of(logits)
    if typical := _wanting(rows, lambda row: row.params.typical_p < 1.0):
        index, mass = _parameter(weights, typical, [rows[i].params.typical_p for i in typical])
        weights[index] = keep_typical(weights[index], logits[index].log_softmax(-1), mass)
    if nucleus := _wanting(rows, lambda row: row.params.top_p < 1.0):
        index, mass = _parameter(weights, nucleus, [rows[i].params.top_p for i in nucleus])
        weights[index] = keep_top_p(weights[index], mass)
    if relative := _wanting(rows, lambda row: row.params.min_p > 0.0):
        index, share = _parameter(weights, relative, [rows[i].params.min_p for i in relative])
        weights[index] = keep_min_p(weights[index], share)
    sums = weights.cumsum(-1)
    draws = [_hash(row.seed, position, _DRAW_BITS) for row, position in zip(rows, positions, strict=True)]
    # Whole numbers below 2^53: fp64 holds each exactly.
    thresholds = [draw * int(total) >> _DRAW_BITS for draw, total in zip(draws, sums[:, -1].tolist(), strict=True)]
    return torch.searchsorted(sums, _column(sums, thresholds)[:, None], right=True)[:, 0]


def _parameter(weights: Tensor, at: Sequence[int], values: Sequence[float]) -> tuple[Tensor, Tensor]:
    return torch.tensor(at, device=weights.device), _column(weights, values)


def _column(like: Tensor, values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)


def _hash(seed: int, number: int, bits: int) -> int:
    """A number of `bits` ≤ 64 that looks random, from two others."""
    digest = hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> (64 - bits)
