"""Names of leading tokens, the same at a gateway and at a worker. Knows token ids and hashes; no KV.

A prefix is named by a hash chained over its groups of 64 tokens. The tenant's tag and the recipe are hashed first, so
nobody meets another tenant's names, or KV that was made otherwise.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence

from kvservice.types import GROUP_TOKENS, SINK_TOKENS

_DIGEST_BYTES = 16
_SHORT_BYTES = 8

MAX_REPORTED = 512
"""Names that a worker reports, 8 bytes each."""


def prefix_names(tenant_tag: bytes, recipe: str, tokens: Sequence[int], known: Sequence[bytes] = ()) -> Iterator[bytes]:
    """Names of the prefixes of 16 + 64k tokens, the shortest first, after those that are `known`."""
    name = known[-1] if known else _hash(recipe.encode() + array("I", tokens[:SINK_TOKENS]).tobytes(), tenant_tag)
    for start in range(SINK_TOKENS + len(known) * GROUP_TOKENS, len(tokens) - GROUP_TOKENS + 1, GROUP_TOKENS):
        name = _hash(name + array("I", tokens[start : start + GROUP_TOKENS]).tobytes(), tenant_tag)
        yield name


def prefix_tokens(number: int) -> int:
    """Length of the prefix whose name comes `number`-th, counted from 0."""
    return SINK_TOKENS + (number + 1) * GROUP_TOKENS


def short_name(name: bytes) -> int:
    """The form in which names are told to gateways: a hint needs no more bits."""
    return int.from_bytes(name[:_SHORT_BYTES], "little")


def reported(names: Sequence[bytes]) -> list[int]:
    """Which names of one sequence a worker reports: that of the whole, and of 1, 2, 4, 8... groups.

    So a gateway finds the worker that holds a document whole, and one that holds at least half of what it shares.
    """
    depths = {len(names)} | {1 << power for power in range(len(names).bit_length())}
    return [short_name(names[depth - 1]) for depth in sorted(depths, reverse=True) if depth]


def lengths_by_name(tenant_tag: bytes, recipe: str, tokens: Sequence[int]) -> dict[int, int]:
    """What a gateway looks for: the short names of a call's prefixes, and how many tokens each stands for.

    Without a tenant's tag nothing is shared, and nothing found.
    """
    if not tenant_tag:
        return {}
    names = prefix_names(tenant_tag, recipe, tokens)
    return {short_name(name): prefix_tokens(number) for number, name in enumerate(names)}


def _hash(data: bytes, key: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES, key=key, person=b"kv1-prefix").digest()
