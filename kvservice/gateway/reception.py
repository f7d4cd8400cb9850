"""What happens around every call of the public API, by gRPC or HTTP: the caller is found, counted and held to its
quota, and operators' calls are written down. Knows no call by its meaning, and no transport.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from kvservice.errors import InternalError, KVServiceError, Unauthenticated
from kvservice.gateway.audit import audit
from kvservice.gateway.auth import CALLER, OPERATOR_METHODS, Authenticator, Caller, check_role
from kvservice.gateway.quotas import Quotas
from kvservice.telemetry.logging import bind_log_fields
from kvservice.telemetry.metrics import GatewayMetrics
from kvservice.telemetry.tracing import TRACEPARENT, TRACING

logger = logging.getLogger(__name__)


def _as_service_error(error: Exception, method: str) -> KVServiceError:
    if isinstance(error, KVServiceError):
        return error
    # What went wrong inside is for the log, not for the caller.
    logger.error("rpc_failed", extra={"method": method}, exc_info=error)
    return InternalError(f"{method} failed inside the service; its log says why")


class Visit:
    """One call from its receipt to its end: what is told of it afterwards."""

    def __init__(self, method: str, metadata: tuple[tuple[str, str | bytes], ...], peer: str, request: object) -> None:
        self.method = method
        self.code = "OK"
        """Name of a status code."""
        self.caller: Caller | None = None
        self.metadata = metadata
        """Names in lower case, such as `authorization`."""
        self.peer = peer
        self.request = request

    @property
    def parent(self) -> str:
        """The caller's trace context."""
        values = [value for name, value in self.metadata if name == TRACEPARENT]
        return values[0] if values and isinstance(values[0], str) else ""

    def failed(self, error: Exception) -> KVServiceError:
        """The error as the caller is told of it."""
        found = _as_service_error(error, self.method)
        self.code = found.status
        return found


class Reception:
    """Lets callers in, and notes what became of their calls."""

    def __init__(self, authenticator: Authenticator, quotas: Quotas, metrics: GatewayMetrics) -> None:
        self._authenticator = authenticator
        self._quotas = quotas
        self._metrics = metrics

    @contextmanager
    def watched(self, visit: Visit) -> Iterator[Visit]:
        """The time of a call: traced, counted, and written down if it is an operator's."""
        started = time.perf_counter()
        with TRACING.span(visit.method.strip("/"), visit.parent) as note:
            try:
                yield visit
            except asyncio.CancelledError:
                visit.code = "CANCELLED"
                raise
            finally:
                note({"rpc.code": visit.code})
                self._metrics.note_rpc(visit.method, visit.code, time.perf_counter() - started)
                if visit.method.startswith(OPERATOR_METHODS):
                    audit(visit.method, visit.caller, visit.peer, visit.code, visit.request)

    async def admit(self, visit: Visit) -> None:
        """Lets the caller in, as the task's `CALLER`.

        Raises:
            KVServiceError: no key that holds, not the role for it, or no calls left in this minute.
        """
        try:
            caller = visit.caller = self._authenticator.identify(visit.metadata)
        except Unauthenticated:
            self._metrics.note_auth_failure()
            raise
        bind_log_fields(tenant=caller.tenant)
        session_id = getattr(visit.request, "session_id", "")
        if session_id:
            bind_log_fields(session_id=session_id)
        check_role(caller, visit.method)
        CALLER.set(caller)
        if not visit.method.startswith(OPERATOR_METHODS):
            await self._quotas.count_request(caller.tenant)
