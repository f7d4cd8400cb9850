"""Keys that come and go, and tokens that hold or don't."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import time
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from kvservice.config.api_keys import ApiKeyFile
from kvservice.config.identity import JwtConfig
from kvservice.errors import ConfigError, PermissionDenied, Unauthenticated
from kvservice.gateway.auth import Authenticator, Caller
from kvservice.gateway.web_tokens import WebTokens
from kvservice.types import Role, TenantId
from tests.unit.gateway.conftest import keys, running

METHOD = "/kvservice.v1.SessionService/List"
ISSUER, AUDIENCE = "https://issuer.example", "kvservice"


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def entry(key: str, tenant: str = "acme", **more: object) -> dict[str, object]:
    return {"sha256": hashlib.sha256(key.encode()).hexdigest(), "tenant": tenant, **more}


def write(path: Path, *entries: dict[str, object]) -> Path:
    path.write_text(json.dumps({"keys": entries}))
    path.chmod(0o600)
    return path


def bearer(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


def test_a_key_is_rotated_without_a_restart(tmp_path: Path) -> None:
    clock = Clock()
    path = write(tmp_path / "keys.json", entry("old", id="k1"))
    auth = Authenticator(ApiKeyFile(path, clock))
    assert auth.caller(METHOD, bearer("old")) == Caller(TenantId("acme"), Role.TENANT, "k1")
    write(path, entry("old", id="k1"), entry("new", id="k2"))
    clock.now += 2
    assert auth.caller(METHOD, bearer("old")).key_id == "k1"
    assert auth.caller(METHOD, bearer("new")).key_id == "k2"
    write(path, entry("new", id="k2"))
    clock.now += 2
    with pytest.raises(Unauthenticated):
        auth.caller(METHOD, bearer("old"))
    assert auth.caller(METHOD, bearer("new")).tenant == "acme"


def test_a_damaged_key_file_leaves_the_keys_as_they_were(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    path = write(tmp_path / "keys.json", entry("good"))
    file = ApiKeyFile(path, clock)
    path.write_text('{"keys": [')
    clock.now += 2
    assert len(file.current().keys) == 1
    assert file.failed_reads == 1
    assert caplog.records[-1].getMessage() == "api_keys_not_read"
    path.unlink()
    clock.now += 2
    assert len(file.current().keys) == 1


def test_a_key_ends_at_its_time_and_then_answers_as_one_that_never_was(tmp_path: Path) -> None:
    path = write(tmp_path / "keys.json", entry("short", expires_at="2027-01-01T00:00:00Z"))
    clock = Clock()
    clock.now = 1_798_761_599.0
    auth = Authenticator(ApiKeyFile(path), clock=clock)
    assert auth.caller(METHOD, bearer("short")).key_id == hashlib.sha256(b"short").hexdigest()[:12]
    clock.now += 1
    told = []
    for key in ("short", "never was"):
        with pytest.raises(Unauthenticated) as caught:
            auth.caller(METHOD, bearer(key))
        told.append(caught.value.message)
    assert told[0] == told[1]


def test_a_time_without_a_zone_and_two_keys_of_one_id_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expires_at"):
        ApiKeyFile(write(tmp_path / "a.json", entry("k", expires_at="2027-01-01T00:00:00")))
    with pytest.raises(ConfigError, match="two keys have the id 'same'"):
        ApiKeyFile(write(tmp_path / "b.json", entry("k", id="same"), entry("l", id="same")))


# Tokens

SIGNING = ec.generate_private_key(ec.SECP256R1())
OTHER = ec.generate_private_key(ec.SECP256R1())
EDWARDS = ed25519.Ed25519PrivateKey.generate()


def jwk(key: Any, kid: str) -> dict[str, object]:
    algorithm = jwt.algorithms.ECAlgorithm if hasattr(key, "curve") else jwt.algorithms.OKPAlgorithm
    return {**json.loads(algorithm.to_jwk(key.public_key())), "kid": kid}


@pytest.fixture
def config(tmp_path: Path) -> JwtConfig:
    path = tmp_path / "jwks.json"
    shared = {"kty": "oct", "kid": "shared", "alg": "HS256", "k": base64.urlsafe_b64encode(b"s" * 32).decode()}
    path.write_text(json.dumps({"keys": [jwk(SIGNING, "one"), jwk(EDWARDS, "ed"), shared]}))
    return JwtConfig(issuer=ISSUER, audience=AUDIENCE, jwks_file=path)


def claims(**changes: object) -> dict[str, object]:
    made = {"iss": ISSUER, "aud": AUDIENCE, "exp": time.time() + 60, "tenant": "acme", "sub": "svc", **changes}
    return {name: value for name, value in made.items() if value is not None}


def token(key: Any = SIGNING, algorithm: str = "ES256", kid: str | None = "one", **changes: object) -> str:
    headers = {"kid": kid} if kid is not None else {}
    return jwt.encode(claims(**changes), key, algorithm=algorithm, headers=headers)


def by_hand(header: dict[str, object], payload: dict[str, object], secret: bytes) -> str:
    """A token that no library would make."""
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in (header, payload)]
    signed = b".".join(parts)
    mac = base64.urlsafe_b64encode(hmac.digest(secret, signed, "sha256")).rstrip(b"=") if secret else b""
    return (signed + b"." + mac).decode()


def public_pem() -> bytes:
    from cryptography.hazmat.primitives import serialization

    return SIGNING.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def test_a_token_names_tenant_and_role(config: JwtConfig) -> None:
    tokens = WebTokens(config)
    assert tokens.caller(token()) == Caller(TenantId("acme"), Role.TENANT, "jwt:svc")
    assert tokens.caller(token(role="operator")).role is Role.OPERATOR
    assert tokens.caller(token(EDWARDS, "EdDSA", "ed")).tenant == "acme"
    assert tokens.caller(token(aud=["other", AUDIENCE])).tenant == "acme"
    # Within the leeway.
    assert tokens.caller(token(exp=time.time() - 5)).tenant == "acme"


BAD = {
    "expired": lambda: token(exp=time.time() - 120),
    "not yet": lambda: token(nbf=time.time() + 120),
    "no expiry": lambda: token(exp=None),
    "another issuer": lambda: token(iss="https://evil.example"),
    "no issuer": lambda: token(iss=None),
    "another service": lambda: token(aud="other"),
    "no audience": lambda: token(aud=None),
    "no tenant": lambda: token(tenant=None),
    "empty tenant": lambda: token(tenant=""),
    "tenant that is a list": lambda: token(tenant=["acme"]),
    "tenant with a NUL": lambda: token(tenant="acme\0"),
    "unknown role": lambda: token(role="root"),
    "role that is a list": lambda: token(role=["operator"]),
    "another key of that name": lambda: token(OTHER),
    "unknown key": lambda: token(kid="two"),
    "no key": lambda: token(kid=None),
    "no signature": lambda: by_hand({"alg": "none", "kid": "one"}, claims(), b""),
    "no signature, spelt otherwise": lambda: by_hand({"alg": "nOnE", "kid": "one"}, claims(), b""),
    "the public key as a shared secret": lambda: by_hand({"alg": "HS256", "kid": "one"}, claims(), public_pem()),
    "a shared secret of the file": lambda: by_hand({"alg": "HS256", "kid": "shared"}, claims(), b"s" * 32),
    "two tokens": lambda: token() + token(),
    "no token": lambda: "a.b.c",
    "much too long": lambda: "a." + "b" * 10_000 + ".c",
}


@pytest.mark.parametrize("name", list(BAD))
def test_a_token_that_does_not_hold_is_refused_and_not_quoted(config: JwtConfig, name: str) -> None:
    bad = BAD[name]()
    with pytest.raises(Unauthenticated) as caught:
        WebTokens(config).caller(bad)
    assert bad not in caught.value.message
    assert "acme" not in caught.value.message


def test_the_issuers_keys_are_read_again_when_they_change(config: JwtConfig) -> None:
    clock = Clock()
    tokens = WebTokens(config, clock)
    config.jwks_file.write_text(json.dumps({"keys": [jwk(OTHER, "two")]}))
    clock.now += 2
    assert tokens.caller(token(OTHER, kid="two")).tenant == "acme"
    with pytest.raises(Unauthenticated):
        tokens.caller(token())
    config.jwks_file.write_text("{}")
    clock.now += 2
    assert tokens.caller(token(OTHER, kid="two")).tenant == "acme"
    assert tokens.failed_reads == 1


def test_a_file_of_keys_that_are_not_taken_is_refused(config: JwtConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no key for RS256"):
        WebTokens(config.model_copy(update={"algorithms": ("RS256",)}))
    with pytest.raises(ConfigError, match="No such file"):
        WebTokens(config.model_copy(update={"jwks_file": tmp_path / "none"}))


async def test_tokens_and_keys_work_side_by_side_over_grpc(config: JwtConfig) -> None:
    async with running(api_keys=keys(("key", "acme", Role.TENANT)), jwt=config) as service:
        by_key, by_token = await service.client("key"), await service.client(token())
        session = await by_key.create_session()
        assert (await by_token.get(session.session_id)).session_id == session.session_id
        with pytest.raises(PermissionDenied):
            await by_token.stats()
        assert await (await service.client(token(tenant="ops", role="operator"))).stats()


async def test_operators_calls_are_written_down_whoever_tried(caplog: pytest.LogCaptureFixture) -> None:
    two = keys(("tenant-key", "acme", Role.TENANT), ("operator-key", "ops", Role.OPERATOR))
    async with running(api_keys=two) as service:
        operator = await service.client("operator-key")
        with caplog.at_level(logging.INFO, "kvservice.audit"):
            await operator.drain("w1", grace_s=1)
            for key in ("tenant-key", "nobody's"):
                with pytest.raises((PermissionDenied, Unauthenticated)):
                    await (await service.client(key)).drain("w1")
            await operator.list_models()
    records = [record for record in caplog.records if record.name == "kvservice.audit"]
    assert [(r.by_tenant, r.by_role, r.code) for r in records] == [
        ("ops", "operator", "OK"),
        ("acme", "tenant", "PERMISSION_DENIED"),
        ("", "", "UNAUTHENTICATED"),
    ]
    assert records[0].method.endswith("/Drain")
    assert records[0].request["worker_id"] == "w1"
    assert records[0].by_key == hashlib.sha256(b"operator-key").hexdigest()[:12]
