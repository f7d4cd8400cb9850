"""Calls that are made twice under one request id are carried out once. Knows nothing of what they do."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from google.protobuf.message import Message

from kvservice.errors import Conflict
from kvservice.store.base import InProgress, Replay, StateStore
from kvservice.types import TenantId

RETRY_AFTER_S = 0.5


def digest(kind: str, *parts: Message | bytes) -> bytes:
    """Stands for all that a request says. `kind` keeps requests of different RPCs apart."""
    hasher = hashlib.blake2b(kind.encode(), digest_size=32)
    for part in parts:
        data = part if isinstance(part, bytes) else part.SerializeToString(deterministic=True)
        hasher.update(len(data).to_bytes(8, "little"))
        hasher.update(data)
    return hasher.digest()


class Claim:
    """A request that is the caller's to carry out, unless `kept` holds the answer it was given before."""

    def __init__(self, kept: tuple[bytes, ...] | None) -> None:
        self.kept = kept
        self.answer: Sequence[bytes] | None = None

    def keep(self, answer: Sequence[Message]) -> None:
        """Says what a repeat is to be answered with."""
        self.answer = [message.SerializeToString() for message in answer]


class Repeats:
    """Claims requests in the store. A request without an id is always new, and nothing of it is kept."""

    def __init__(self, store: StateStore, memory_s: float) -> None:
        self._store = store
        self._memory_s = memory_s

    @asynccontextmanager
    async def claim(self, tenant: TenantId, request_id: str, request_digest: bytes) -> AsyncIterator[Claim]:
        """Claims a request for the time of the block. At its end the answer is kept; without one the claim is dropped,
        and the request may be made again.

        Raises:
            Conflict: it is being carried out at this moment.
            InvalidRequest: the id was used for another request.
        """
        if not request_id:
            yield Claim(None)
            return
        found = await self._store.begin_request(tenant, request_id, request_digest, self._memory_s)
        if isinstance(found, InProgress):
            raise Conflict(
                f"request {request_id!r} is being carried out; repeat it later to get its outcome",
                reason="request_in_flight",
                retry_after_s=RETRY_AFTER_S,
            )
        if isinstance(found, Replay):
            yield Claim(found.messages)
            return
        claim = Claim(None)
        try:
            yield claim
        finally:
            if claim.answer is None:
                await self._store.forget_request(tenant, request_id)
            else:
                await self._store.finish_request(tenant, request_id, claim.answer, self._memory_s)
