"""Who calls, and what they may do. Knows nothing of sessions.

authorization: Bearer KEY ──► an API key of the file, by its hash ──► tenant, role
                        └───► a JSON web token of the issuer   ──► tenant, role
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

from kvservice.config.api_keys import ApiKeys
from kvservice.errors import PermissionDenied, Unauthenticated
from kvservice.types import Role, TenantId

LOCAL_TENANT = TenantId("local")
"""The one tenant of a service without API keys."""

OPERATOR_METHODS = ("/kvservice.v1.AdminService/", "/kvservice.v1.SessionService/Move")
OPEN_METHODS = ("/grpc.health.v1.Health/",)
"""The kubelet has no key."""

TAG_BYTES = 16
KEY_ID_BYTES = 2


@dataclass(frozen=True, slots=True)
class Caller:
    """The owner of the key that came with a call."""

    tenant: TenantId
    role: Role
    key_id: str = ""
    """What logs call the key; empty when none was needed."""


CALLER: ContextVar[Caller] = ContextVar("CALLER")
"""Set by the interceptor for the task of each RPC."""


class KeySource(Protocol):
    """Where API keys come from. They may change while the service runs."""

    def current(self) -> ApiKeys:
        """The keys that hold now."""


class TokenVerifier(Protocol):
    """Who checks tokens that others issued."""

    def caller(self, token: str) -> Caller:
        """Whom the issuer says the token was given to. Raises Unauthenticated when it doesn't hold."""


class Authenticator:
    """Finds the caller of an RPC. Without keys and tokens everybody is the operator of tenant `local`."""

    def __init__(
        self, keys: KeySource | None, tokens: TokenVerifier | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        """`clock` gives unix seconds."""
        self._keys = keys
        self._tokens = tokens
        self._clock = clock

    def caller(self, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> Caller:
        """Who calls `method`.

        Raises:
            Unauthenticated: no key, an unknown or expired one, or a token that doesn't hold.
            PermissionDenied: the key's role doesn't allow `method`.
        """
        caller = self.identify(metadata)
        check_role(caller, method)
        return caller

    def identify(self, metadata: Iterable[tuple[str, str | bytes]]) -> Caller:
        """Who calls, whatever they call.

        Raises:
            Unauthenticated: see `caller`.
        """
        if self._keys is None and self._tokens is None:
            return Caller(LOCAL_TENANT, Role.OPERATOR)
        values = [value for name, value in metadata if name == "authorization"]
        value = values[0] if len(values) == 1 else None
        scheme, _, sent = value.partition(" ") if isinstance(value, str) else ("", "", "")
        if scheme.lower() != "bearer":
            raise Unauthenticated("no API key: send the metadata `authorization: Bearer KEY`, once")
        found = self._owner(sent)
        if found is not None:
            return found
        if self._tokens is not None and sent.count(".") == 2:
            return self._tokens.caller(sent)
        raise Unauthenticated("unknown API key: ask the operator of the service for one")

    def _owner(self, sent: str) -> Caller | None:
        if self._keys is None:
            return None
        digest = hashlib.sha256(sent.encode()).digest()
        now = self._clock()
        found: Caller | None = None
        for key in self._keys.current().keys:
            # Every key is compared, so that the time says nothing about which one matched. One that has expired answers
            # as one that never was.
            if hmac.compare_digest(key.digest, digest) and key.is_valid(now):
                found = Caller(TenantId(key.tenant), key.role, key.key_id)
        return found


def check_role(caller: Caller, method: str) -> None:
    """Raises PermissionDenied when the caller's role doesn't allow `method`."""
    if caller.role is not Role.OPERATOR and method.startswith(OPERATOR_METHODS):
        raise PermissionDenied(f"{method} needs a key of role operator; this key has role {caller.role.value}")


def secret_key_id(secret: bytes) -> bytes:
    """Two bytes that tell one secret from the next, and nothing else about it."""
    return hashlib.blake2b(b"key id", digest_size=KEY_ID_BYTES, key=secret).digest()


def tenant_tag(secret: bytes, tenant: TenantId) -> bytes:
    """16 bytes that stand for the tenant in stored keys; the name can't be told from them without `secret`.

    The first two are the secret's key id: after a change of the secret one sees which blobs are of the old one.
    """
    # A text that no secret_key_id is made of, so that the one can't be had for the other.
    digest = hashlib.blake2b(b"tenant\0" + tenant.encode(), digest_size=TAG_BYTES - KEY_ID_BYTES, key=secret).digest()
    return secret_key_id(secret) + digest
