"""Who calls, and what they may do. Knows nothing of sessions."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass

from kvservice.config.api_keys import ApiKeys
from kvservice.errors import PermissionDenied, Unauthenticated
from kvservice.types import Role, TenantId

LOCAL_TENANT = TenantId("local")
"""The one tenant of a service without API keys."""

OPERATOR_METHODS = ("/kvservice.v1.AdminService/", "/kvservice.v1.SessionService/Move")
OPEN_METHODS = ("/grpc.health.v1.Health/",)
"""The kubelet has no key."""


@dataclass(frozen=True, slots=True)
class Caller:
    """The owner of the key that came with a call."""

    tenant: TenantId
    role: Role


CALLER: ContextVar[Caller] = ContextVar("CALLER")
"""Set by the interceptor for the task of each RPC."""


class Authenticator:
    """Finds the caller of an RPC. Without keys everybody is the operator of tenant `local`."""

    def __init__(self, keys: ApiKeys | None) -> None:
        self._keys = keys.keys if keys else None

    def caller(self, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> Caller:
        """Who calls `method`.

        Raises:
            Unauthenticated: no key, or an unknown one.
            PermissionDenied: the key's role doesn't allow `method`.
        """
        caller = self._identify(metadata)
        if caller.role is not Role.OPERATOR and method.startswith(OPERATOR_METHODS):
            raise PermissionDenied(f"{method} needs a key of role operator; this key has role {caller.role.value}")
        return caller

    def _identify(self, metadata: Iterable[tuple[str, str | bytes]]) -> Caller:
        if self._keys is None:
            return Caller(LOCAL_TENANT, Role.OPERATOR)
        value = next((value for name, value in metadata if name == "authorization"), None)
        scheme, _, key_sent = value.partition(" ") if isinstance(value, str) else ("", "", "")
        if scheme.lower() != "bearer":
            raise Unauthenticated("no API key: send the metadata `authorization: Bearer KEY`")
        digest = hashlib.sha256(key_sent.encode()).digest()
        found: Caller | None = None
        for key in self._keys:
            # Every key is compared, so that the time says nothing about which one matched.
            if hmac.compare_digest(key.digest, digest):
                found = Caller(TenantId(key.tenant), key.role)
        if found is None:
            raise Unauthenticated("unknown API key: ask the operator of the service for one")
        return found


def tenant_tag(secret: bytes, tenant: TenantId) -> bytes:
    """16 bytes that stand for the tenant in stored keys; the name can't be told from them without `secret`."""
    return hashlib.blake2b(tenant.encode(), digest_size=16, key=secret).digest()
