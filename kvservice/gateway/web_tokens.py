"""JSON web tokens as keys: whose they are, if their signature and claims hold. The only place that knows PyJWT.

Only signatures with public keys are taken, each with the algorithm that its key in the file is for.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable

import jwt

from kvservice.config.identity import JwtConfig
from kvservice.config.watched_file import WatchedFile
from kvservice.errors import ConfigError, Unauthenticated
from kvservice.gateway.auth import Caller
from kvservice.types import Role, TenantId

logger = logging.getLogger(__name__)

MAX_TOKEN_BYTES = 8 * 1024
"""Beyond it nothing is parsed."""
MAX_TENANT_CHARS = 128


def _read_keys(config: JwtConfig) -> dict[str, jwt.PyJWK]:
    """The public keys in the file, by `kid`; those for algorithms that aren't taken are left out.

    Raises:
        ConfigError: it can't be read, isn't of that form, or holds no key that is taken.
    """
    path = config.jwks_file
    try:
        entries = json.loads(path.read_bytes())["keys"]
        keys = {str(entry["kid"]): jwt.PyJWK(entry) for entry in entries if entry.get("use", "sig") == "sig"}
    except OSError as error:
        raise ConfigError(f"JWKS file {path}: {error.strerror}; give the path of a readable file") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, jwt.PyJWTError):
        # What the library says may quote the file.
        raise ConfigError(f'JWKS file {path}: must hold {{"keys": [...]}} of RFC 7517, each with `kid`') from None
    taken = {kid: key for kid, key in keys.items() if key.algorithm_name in config.algorithms}
    if not taken:
        raise ConfigError(f"JWKS file {path}: holds no key for {', '.join(config.algorithms)}")
    return taken


class WebTokens:
    """Verifies tokens. The file of keys is read again when it changes; one that can't be used changes nothing."""

    def __init__(self, config: JwtConfig, clock: Callable[[], float] = time.monotonic) -> None:
        """Reads the keys; raises ConfigError when they can't be used."""
        self._config = config
        self._file = WatchedFile(config.jwks_file, clock)
        self._keys = _read_keys(config)
        self.failed_reads = 0

    def caller(self, token: str) -> Caller:
        """Whom the token was given to.

        Raises:
            Unauthenticated: it doesn't hold; the message says why, and nothing of the token.
        """
        if len(token) > MAX_TOKEN_BYTES:
            raise Unauthenticated(f"the token has more than {MAX_TOKEN_BYTES} bytes")
        claims = self._verified(token)
        tenant = claims.get(self._config.tenant_claim)
        if not isinstance(tenant, str) or not 1 <= len(tenant) <= MAX_TENANT_CHARS or not tenant.isprintable():
            raise Unauthenticated(f"the token names no tenant: its claim `{self._config.tenant_claim}` must be a name")
        role = claims.get(self._config.role_claim, Role.TENANT.value)
        if role not in [each.value for each in Role]:
            raise Unauthenticated(f"the token's claim `{self._config.role_claim}` must be tenant or operator")
        subject = claims.get("sub")
        return Caller(TenantId(tenant), Role(role), f"jwt:{subject}" if isinstance(subject, str) else "jwt")

    def _verified(self, token: str) -> dict[str, object]:
        config = self._config
        try:
            kid = jwt.get_unverified_header(token).get("kid")
            key = self._current_keys().get(kid) if isinstance(kid, str) else None
            if key is None:
                raise Unauthenticated("the token's key is unknown: its `kid` must name one of the issuer's keys")
            claims: dict[str, object] = jwt.decode(
                token,
                key,
                # With a key of the file its own algorithm is the only one; this bounds the file too.
                algorithms=list(config.algorithms),
                issuer=config.issuer,
                audience=config.audience,
                leeway=config.leeway_s,
                options={"require": ["exp", "iss", "aud"]},
            )
        except jwt.ExpiredSignatureError:
            raise Unauthenticated("the token has expired: get a new one from its issuer") from None
        except (jwt.InvalidAudienceError, jwt.InvalidIssuerError):
            raise Unauthenticated("the token is for another service, or of another issuer") from None
        except jwt.PyJWTError:
            raise Unauthenticated("the token doesn't hold: get one from the service's issuer") from None
        return claims

    def _current_keys(self) -> dict[str, jwt.PyJWK]:
        if self._file.has_changed():
            try:
                self._keys = _read_keys(self._config)
            except ConfigError as error:
                self.failed_reads += 1
                logger.error("jwks_not_read", extra={"why": error.message, "failed_reads": self.failed_reads})
            else:
                logger.info("jwks_read", extra={"num_keys": len(self._keys)})
        return self._keys
