"""The low-bit key index, scored group by group from the most promising one on. For evaluation only, as yet."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvservice.compression.protocols import RECALL_INDEXES, Choice, RecallIndex, Selection
from kvservice.types import GROUP_TOKENS

ROUNDING = 1e-4
"""By how much more mass the last token chosen must have than any left out, so that rounding can't turn them round."""


@dataclass(frozen=True, slots=True)
class _Outlook:
    """What is known of groups before their tokens are scored, each fp32 `[kv, r, groups]`.

    Attributes:
        most: no token of the group scores more.
        typical: the logarithm of the mean of `exp(score)`, if its keys' numbers were spread as usual; at most `most`.
    """

    most: Tensor
    typical: Tensor


class PagedKeyIndex:
    """`key_index` in pages of 64 tokens: whether a group can hold any of the best tokens is told by its params alone.

    A decoded key lies within `middle ± step * (2^bits - 1) / 2` in each channel, so its score is at most
    `scale * (q · middle + |q| · step * (2^bits - 1) / 2)`: the bound of Tang et al., "Quest: Query-Aware Sparsity for
    Efficient Long-Context LLM Inference", arXiv:2406.10774, §3.3, over the box that the quantiser of `key_index` keeps
    anyway. Deviates from the paper: tokens are chosen, not pages, and the bound decides only where to look. Groups are
    scored in falling order of what they promise, until every chooser has as many tokens as its budget that beat
    whatever the groups left over could hold. So the groups scored always hold the choice of a full scan.

    A token's mass is `exp(score - norm)`, and the norm sums over tokens that aren't scored. It is never less than over
    those that are, and never more than with every other token at its group's bound. Mass of what is scored is compared
    at the greatest norm, mass of what is not at the least, so the comparison holds for the true norm of every head.
    Where rows choose alone the norm takes no part: it is the same on both sides. Tokens that aren't scored are given
    their group's typical score, which is at most its bound: the norm that follows lies between the two. It may differ
    from that of a full scan, and so may, at the edge of the budget, the say of one head beside another's; which groups
    are scored doesn't depend on it.
    """

    paper = "Tang et al., Quest, arXiv:2406.10774 (the bound), over Liu et al., KIVI, arXiv:2402.02750"
    summary = "low-bit keys, scored only where a group's bound lets the best tokens be (evaluation only)"
    is_key_index = False

    def encode(self, keys: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """As `key_index`."""
        return _key_index().encode(keys, bits)

    def scores(self, ask: Selection) -> Tensor:
        """Scores of `key_index` in the groups that could matter to `ask.choice`, typical ones elsewhere."""
        choice, num_groups = ask.choice, ask.codes.shape[1]
        if choice is None or choice.budget >= ask.num_distant:
            _count(choice, ask.q.shape[0], num_groups, num_groups)
            return _key_index().scores(ask)
        outlook = _outlook(ask)
        order = _promise(outlook, choice).argsort(stable=True, dim=-1, descending=True)
        scores = outlook.typical.repeat_interleave(GROUP_TOKENS, dim=-1)
        scanned = torch.zeros(order.shape, dtype=torch.bool, device=order.device)
        start, stop = 0, -(-choice.budget // GROUP_TOKENS)
        while start < num_groups:
            stop = min(stop, num_groups)
            _scan(ask, order[:, start:stop], scores)
            scanned.scatter_(1, order[:, start:stop], value=True)
            if stop == num_groups or _is_proven(scores, outlook, scanned, choice):
                break
            start, stop = stop, 2 * stop
        _count(choice, ask.q.shape[0], num_groups, stop)
        return scores


def _key_index() -> RecallIndex:
    """Found by name, since methods import none of one another."""
    return RECALL_INDEXES.get("key_index")


def _outlook(ask: Selection) -> _Outlook:
    dim = ask.q.shape[-1]
    bits = 8 * ask.codes.shape[2] // (GROUP_TOKENS * dim)
    half = (2**bits - 1) / 2
    step, middle = ask.params.float().unbind(2)
    q = ask.q.float()
    reach = half * (q.abs() @ step.transpose(1, 2))
    central = q @ middle.transpose(1, 2)
    # Scores are computed in the dtype of the queries, so that they may be above what is true by its rounding.
    slack = torch.finfo(ask.q.dtype).eps + dim * torch.finfo(torch.float32).eps
    most = ask.scale * (central + reach + slack * (reach + q.abs() @ middle.abs().transpose(1, 2)))
    # Were levels spread evenly, a score's variance would be that of a sum of independent numbers, and its exp's mean
    # that of a log-normal.
    variance = ((2**bits) ** 2 - 1) / 12 * ((q * q) @ (step * step).transpose(1, 2))
    return _Outlook(most, torch.minimum(ask.scale * central + ask.scale**2 * variance / 2, most))


def _promise(outlook: _Outlook, choice: Choice) -> Tensor:
    """The most mass that a token of a group could have for any of the choosers, `[kv, groups]`."""
    distant = (outlook.typical + torch.tensor(float(GROUP_TOKENS)).log()).logsumexp(-1)
    norm = torch.logaddexp(distant, choice.proximal_lse)
    return _mass(outlook.most, norm, choice).amax(1)


def _scan(ask: Selection, groups: Tensor, scores: Tensor) -> None:
    """Puts the scores of some groups, int64 `[kv, n]`, among `scores`, `[kv, r, 64 * groups]`."""
    num_kv, count = groups.shape
    heads = torch.arange(num_kv, device=groups.device).unsqueeze(1)
    part = replace(
        ask,
        codes=ask.codes[heads, groups],
        params=ask.params[heads, groups],
        num_distant=count * GROUP_TOKENS,
        choice=None,
    )
    tokens = groups.unsqueeze(2) * GROUP_TOKENS + torch.arange(GROUP_TOKENS, device=groups.device)
    where = tokens.view(num_kv, 1, -1).expand(-1, scores.shape[1], -1)
    scores.scatter_(2, where, _key_index().scores(part))


def _is_proven(scores: Tensor, outlook: _Outlook, scanned: Tensor, choice: Choice) -> bool:
    """Whether no token of a group that wasn't scanned can be among any chooser's best, whatever the true norms."""
    known = scanned.unsqueeze(1).repeat_interleave(GROUP_TOKENS, dim=-1)
    hidden = outlook.most.masked_fill(scanned.unsqueeze(1), -torch.inf)
    least = torch.logaddexp(scores.masked_fill(~known, -torch.inf).logsumexp(-1), choice.proximal_lse)
    greatest = least
    if scores.shape[1] > choice.num_choosers:
        beyond = hidden.logsumexp(-1) + torch.tensor(float(GROUP_TOKENS)).log()
        greatest = torch.logaddexp(least, beyond)
    sure = _mass(scores, greatest, choice).masked_fill(~known, 0.0)
    last = sure.topk(choice.budget, dim=-1).values[..., -1]
    return bool((last > (1 + ROUNDING) * _mass(hidden, least, choice).amax(-1)).all())


def _mass(scores: Tensor, norm: Tensor, choice: Choice) -> Tensor:
    """Mass for each chooser, `[kv, choosers, n]`, of scores `[kv, r, n]` under norms `[kv, r]`."""
    num_kv, rows, count = scores.shape
    each = (scores - norm.unsqueeze(-1)).exp()
    return each.view(num_kv, choice.num_choosers, rows // choice.num_choosers, count).sum(2)


def _count(choice: Choice | None, num_kv: int, num_groups: int, num_scanned: int) -> None:
    if choice is not None:
        choice.tally.groups += num_kv * num_groups
        choice.tally.scanned += num_kv * num_scanned


RECALL_INDEXES.register("paged_key_index")(PagedKeyIndex())
