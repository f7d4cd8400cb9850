"""Calls that are made twice under one request id are carried out once. Knows nothing of what they do."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from google.protobuf.message import Message

from kvservice.errors import Conflict, KVServiceError
from kvservice.store.base import InProgress, Replay, StateStore
from kvservice.store.tasks import end_tasks
from kvservice.types import TenantId

logger = logging.getLogger(__name__)

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
    """Claims requests in the store. A request without an id is always new, and nothing of it is kept.

    Args:
        store: keeps claims and answers.
        memory_s: how long an answer is kept.
        claim_ttl_s: a request may be made again so soon after the gateway that carried it out was lost.
    """

    def __init__(self, store: StateStore, memory_s: float, claim_ttl_s: float) -> None:
        self._store = store
        self._memory_s = memory_s
        self._claim_ttl_s = claim_ttl_s

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
        owner = secrets.token_hex(8)
        found = await self._store.begin_request(tenant, request_id, request_digest, self._claim_ttl_s, owner=owner)
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
        renewal = asyncio.create_task(self._renew(tenant, request_id, owner))
        try:
            yield claim
        finally:
            await end_tasks([renewal])
            await self._end(tenant, request_id, owner, claim.answer)

    async def _end(self, tenant: TenantId, request_id: str, owner: str, answer: Sequence[bytes] | None) -> None:
        try:
            if answer is None:
                await self._store.forget_request(tenant, request_id, owner=owner)
            else:
                await self._store.finish_request(tenant, request_id, answer, self._memory_s, owner=owner)
        except KVServiceError as error:
            # The caller is told how the call itself went; the claim lapses, and the session knows its last request.
            logger.warning("claim_not_ended", extra={"why": error.message, "answered": answer is not None})

    async def _renew(self, tenant: TenantId, request_id: str, owner: str) -> None:
        while True:
            await asyncio.sleep(self._claim_ttl_s / 3)
            try:
                held = await self._store.renew_request(tenant, request_id, self._claim_ttl_s, owner=owner)
            except KVServiceError as error:
                logger.warning("claim_not_renewed", extra={"why": error.message})
                continue
            if not held:
                # The call's write at its end fails if another has carried it out meanwhile.
                logger.warning("claim_lost")
                return
