"""Who may call, and how connections are secured: names of files, and what tokens must say. Reads no file.

The files of certificates and keys are PEM; they are read again when they change, so that a renewal needs no restart.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

JwtAlgorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
"""Signatures with a public key. None with a shared secret, and never `none`."""


class JwtConfig(BaseModel):
    """Which JSON web tokens are taken for keys (RFC 7519). All of issuer, audience, expiry and tenant must be there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    issuer: str = Field(min_length=1, description="What the claim `iss` must be.")
    audience: str = Field(min_length=1, description="What the claim `aud` must be, or hold.")
    jwks_file: Path = Field(description="File of the issuer's public keys (RFC 7517), each with `kid`.")
    algorithms: tuple[JwtAlgorithm, ...] = Field(
        ("RS256", "ES256", "EdDSA"), min_length=1, description="Signatures that are taken, all with public keys."
    )
    leeway_s: float = Field(30.0, ge=0, le=300, description="How far the issuer's clock may be off.")
    tenant_claim: str = Field("tenant", min_length=1, description="Claim that names the tenant.")
    role_claim: str = Field("role", min_length=1, description="Claim with `tenant` or `operator`; without it: tenant.")


class TlsConfig(BaseModel):
    """TLS of the public API."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cert: Path = Field(description="The server's certificate, and those between it and its root.")
    key: Path = Field(description="Its private key.")
    client_ca: Path | None = Field(
        None, description="Clients must have a certificate of this authority. A key is still needed. Unset: none."
    )


class InternalTlsConfig(BaseModel):
    """Mutual TLS between gateways and workers: each shows a certificate of one authority that is theirs alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cert: Path = Field(description="This process's certificate.")
    key: Path = Field(description="Its private key.")
    ca: Path = Field(description="The authority of all gateways' and workers' certificates, and of no others.")
    server_name: str = Field(
        "kvservice-worker", min_length=1, description="DNS name in the certificate of every worker."
    )
