"""What is amiss with what a deployment was told: certificates, where it listens, how many may come, what tenants may
store. Reads the certificates that settings name, and nothing else.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from kvservice.client import ServiceStats
from kvservice.drill.doctor import Finding, Level, MachineFacts, RedisFacts

SOON = dt.timedelta(days=14)
SPARE_FILES = 512
"""That a gateway has open beside its callers' connections."""
PORTS = 2
"""gRPC and HTTP: each takes so many connections."""


def of_certificate(subject: str, cert: Path, key: Path, now: dt.datetime) -> Finding:
    """Whether it can be used, and how long still."""
    try:
        found = x509.load_pem_x509_certificate(cert.read_bytes())
        private = load_pem_private_key(key.read_bytes(), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        said = f"{cert} or {key} can't be used: {type(error).__name__}"
        return Finding(subject, Level.BROKEN, said, "name files that this user may read, PEM, the key without password")
    if _der(found.public_key()) != _der(private.public_key()):
        return Finding(subject, Level.BROKEN, f"{key} isn't the key of {cert}", "name the two that belong together")
    until = found.not_valid_after_utc
    if now > until or now < found.not_valid_before_utc:
        said = f"{cert} holds from {found.not_valid_before_utc:%Y-%m-%d} to {until:%Y-%m-%d}"
        return Finding(subject, Level.BROKEN, said, "renew it, or set this machine's clock")
    if until - now < SOON:
        said = f"{cert} ends on {until:%Y-%m-%d}"
        return Finding(subject, Level.WARNING, said, "renew it: the file is read again when it changes")
    return Finding(subject, Level.FINE, f"{cert} holds until {until:%Y-%m-%d}")


def of_listening(host: str, *, has_tls: bool, has_keys: bool) -> list[Finding]:
    """Whether strangers can read or call what goes over the public ports."""
    if _is_loopback(host):
        return []
    found = []
    if not has_tls:
        advice = "set gateway.tls, or let nobody reach it but through something that ends TLS: keys go over it"
        found.append(Finding("public API", Level.WARNING, f"it listens on {host} without TLS", advice))
    if not has_keys:
        found.append(Finding("public API", Level.BROKEN, f"{host} without API keys is refused", "set api_keys"))
    return found


def of_connections(most: int, machine: MachineFacts) -> list[Finding]:
    """Whether as many callers may come as the gateway is told."""
    needed = PORTS * most + SPARE_FILES
    if needed <= machine.open_files:
        return []
    said = f"{most:,} to each of {PORTS} ports need {needed:,} descriptors, a process may have {machine.open_files:,}"
    advice = "raise the limit (ulimit -n), or lower gateway.limits.connections"
    return [Finding("connections", Level.WARNING, said, advice)]


def of_quotas(stored_bytes: int, kv: RedisFacts | None, stats: ServiceStats | None) -> list[Finding]:
    """Whether what tenants may have fits into what there is. `stored_bytes`: of one without a quota of its own."""
    found = []
    most = kv.facts.maxmemory_bytes if kv is not None else None
    if most and stored_bytes > most:
        said = f"a tenant may store {stored_bytes >> 20:,} MiB, the kv Redis holds {most >> 20:,}"
        advice = "lower worker.tenant_stored_bytes, else one tenant can push the KV of all others out"
        found.append(Finding("quotas", Level.NOTE, said, advice))
    if stats is None or not stats.workers:
        return found
    device = max(worker.device_capacity_bytes for worker in stats.workers)
    host = max(worker.host_capacity_bytes for worker in stats.workers)
    for tenant in stats.tenants:
        for name, quota, there in (
            ("device_bytes", tenant.device_bytes, device),
            ("host_bytes", tenant.host_bytes, host),
        ):
            if quota is not None and quota > there:
                said = f"its {name} are {quota >> 20:,} MiB, more than any worker's {there >> 20:,}: they bound nothing"
                found.append(Finding(f"tenant {tenant.tenant}", Level.NOTE, said, "lower them (kvservice tenants set)"))
    return found


def _der(public: PublicKeyTypes) -> bytes:
    return public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
