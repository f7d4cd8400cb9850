"""Sessions whose stored KV no worker can use any more are computed again from their tokens, a few at a time.

A change of the model, its layout or its tokenizer gives KV another fingerprint. While workers are rolled both are
served; what only the old ones could read is computed at a session's next call, or before that, here. Knows no frames.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from kvservice.errors import Conflict, KVServiceError, NotFound
from kvservice.gateway.admission import Admission
from kvservice.gateway.catalogue import choose_recipe
from kvservice.gateway.dispatch import Order, Stopwatch, carry_out
from kvservice.gateway.fleet import Fleet
from kvservice.gateway.locks import hold_session
from kvservice.gateway.placement import PlacementRequest
from kvservice.gateway.sessions import Sessions
from kvservice.internal.convert import sampling_to_proto
from kvservice.store.base import SessionRecord, StateStore
from kvservice.types import SamplingParams, SessionId
from kvservice.v1 import common_pb2

logger = logging.getLogger(__name__)

LOOKED_AT = 500
"""Sessions of one round, those that expire first: a round reads all their tokens."""
PRIORITY = -100
"""The lowest there is: callers go first."""


@dataclass(slots=True)
class Refreshed:
    """What has been computed again since the start."""

    sessions: int = 0
    tokens: int = 0


class Refresher:
    """Computes stale sessions again, no faster than `tokens_per_s`. `sleep` is a parameter for tests."""

    def __init__(
        self,
        store: StateStore,
        sessions: Sessions,
        fleet: Fleet,
        admission: Admission,
        *,
        tokens_per_s: float,
        lock_ttl_s: float,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.done = Refreshed()
        self._store = store
        self._sessions = sessions
        self._fleet = fleet
        self._admission = admission
        self._tokens_per_s = tokens_per_s
        self._lock_ttl_s = lock_ttl_s
        self._sleep = sleep

    async def round(self) -> int:
        """Looks at the sessions once; gives the number of those that were computed again.

        Raises:
            KVServiceError: the store is away.
        """
        readable = await self._fingerprints()
        num_refreshed = 0
        for record in await self._store.expired_sessions(math.inf, LOOKED_AT):
            if not await self._is_stale(record, readable):
                continue
            # Waiting first keeps to the rate, whatever becomes of the call.
            await self._sleep(len(record.token_ids) / self._tokens_per_s)
            try:
                num_refreshed += await self._refresh(record.session_id, readable)
            except (Conflict, NotFound):
                continue  # It is in use, or closed: its next call sees to it.
            except KVServiceError as error:
                logger.warning("session_not_refreshed", extra={"session_id": record.session_id, "why": error.message})
        return num_refreshed

    async def _fingerprints(self) -> dict[str, set[str]]:
        """Of the KV that workers of each model read, where all of them tell."""
        found: dict[str, set[str]] = {}
        for worker in await self._fleet.stats():
            ledger = worker.ledger
            of_sharing = {ledger.sharing_fingerprint} - {""}  # of those that have a map
            found.setdefault(worker.model, set()).update({ledger.kv_fingerprint} | of_sharing)
        return {model: fingerprints for model, fingerprints in found.items() if "" not in fingerprints}

    async def _is_stale(self, record: SessionRecord, readable: dict[str, set[str]]) -> bool:
        """Whether KV of a session is stored, and neither held nor readable by any worker there is."""
        if not record.token_ids or record.model not in readable:
            return False
        if any((view.worker_id, view.epoch) == (record.worker_id, record.worker_epoch) for view in self._fleet.views()):
            return False
        manifest = await self._store.ledger.get_manifest(record.tenant, record.session_id)
        return manifest is not None and manifest.fingerprint.hex() not in readable[record.model]

    async def _refresh(self, session_id: SessionId, readable: dict[str, set[str]]) -> bool:
        async with hold_session(self._store, session_id, secrets.token_hex(8), self._lock_ttl_s):
            record = await self._store.get_session(session_id)
            if record is None or not await self._is_stale(record, readable):
                return False
            order = self._order(record)
            outcome = await carry_out(self._admission, order, Stopwatch(None))
            # Its tokens stay as they are: what was generated was only asked for so that there is a call.
            wanted = replace(record, worker_id=outcome.worker.worker_id, worker_epoch=outcome.worker.epoch)
            await self._sessions.write(record, wanted)
        tokens = outcome.done.usage.recomputed_tokens
        self.done.sessions += 1
        self.done.tokens += tokens
        logger.info(
            "session_refreshed",
            extra={"session_id": session_id, "tokens": tokens, "worker_id": outcome.worker.worker_id},
        )
        return True

    def _order(self, record: SessionRecord) -> Order:
        """A call that computes what there is, and one token."""
        recipe = choose_recipe(self._fleet.model(record.model), record.recipe, "")
        submit = self._sessions.submission(record, recipe.name)
        submit.priority = PRIORITY
        submit.on_miss = common_pb2.ON_MISS_RECOMPUTE
        submit.generate.sampling.CopyFrom(sampling_to_proto(SamplingParams(max_new_tokens=1, temperature=0.0)))
        num_tokens = len(record.token_ids)
        return Order(
            request=PlacementRequest(
                record.model, recipe, num_tokens + 1, "", 0, base_tokens=num_tokens, given_tokens=num_tokens
            ),
            submit=submit,
            on_admitted=lambda _: None,
            on_event=lambda _: None,
            deadline=None,
        )


async def refresh_forever(refresher: Refresher, interval_s: float) -> None:
    """Round after round. What fails now is tried again in the next."""
    while True:
        await asyncio.sleep(interval_s)
        started = time.monotonic()
        try:
            number = await refresher.round()
        except Exception:
            logger.exception("refresh_failed")
            continue
        if number:
            logger.info("round_of_refreshes", extra={"sessions": number, "seconds": time.monotonic() - started})
