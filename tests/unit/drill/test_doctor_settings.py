"""What the doctor says of settings: certificates, ports, callers, quotas."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from kvservice.client import ServiceStats, TenantReport
from kvservice.drill import doctor_settings as doctor
from kvservice.drill.doctor import Level, MachineFacts, RedisFacts
from kvservice.store.servers import ServerFacts

from .test_doctor import WORKER

NOW = dt.datetime(2026, 11, 22, tzinfo=dt.UTC)
DAY = dt.timedelta(days=1)


@pytest.fixture
def pair(tmp_path):
    """Writes a certificate and its key; gives their files."""

    def write(name, begins, ends):
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        cert = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(1)
            .not_valid_before(begins)
            .not_valid_after(ends)
            .sign(key, hashes.SHA256())
        )
        files = tmp_path / f"{name}.crt", tmp_path / f"{name}.key"
        files[0].write_bytes(cert.public_bytes(serialization.Encoding.PEM))
        form = serialization.PrivateFormat.PKCS8
        files[1].write_bytes(
            key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()),
        )
        return files

    return write


@pytest.mark.parametrize(
    ("begins", "ends", "level"),
    [
        (NOW - DAY, NOW + 100 * DAY, Level.FINE),
        (NOW - DAY, NOW + 3 * DAY, Level.WARNING),
        (NOW - 9 * DAY, NOW - DAY, Level.BROKEN),
        (NOW + DAY, NOW + 9 * DAY, Level.BROKEN),
    ],
)
def test_certificate_is_told_before_it_ends(pair, begins, ends, level):
    assert doctor.of_certificate("TLS", *pair("a", begins, ends), NOW).level is level


def test_key_of_another_certificate_or_none_is_broken(pair, tmp_path):
    cert, _ = pair("a", NOW - DAY, NOW + 100 * DAY)
    _, other = pair("b", NOW - DAY, NOW + 100 * DAY)
    assert "isn't the key" in doctor.of_certificate("TLS", cert, other, NOW).found
    assert doctor.of_certificate("TLS", cert, tmp_path / "none", NOW).level is Level.BROKEN
    other.write_bytes(b"no key")
    assert doctor.of_certificate("TLS", cert, other, NOW).level is Level.BROKEN


def test_open_port_needs_tls_and_keys():
    assert doctor.of_listening("127.0.0.1", has_tls=False, has_keys=False) == []
    assert doctor.of_listening("0.0.0.0", has_tls=True, has_keys=True) == []
    levels = [finding.level for finding in doctor.of_listening("gateway.example", has_tls=False, has_keys=False)]
    assert levels == [Level.WARNING, Level.BROKEN]


def test_callers_need_descriptors():
    machine = MachineFacts(4096, 1 << 30, 1 << 34)
    assert doctor.of_connections(1000, machine) == []
    assert "descriptors" in doctor.of_connections(5000, machine)[0].found


def test_quotas_that_bound_nothing_are_told():
    kv = RedisFacts("kv", "redis://k", facts=ServerFacts((7, 2), "allkeys-lru", 1 << 30))
    assert doctor.of_quotas(1 << 29, kv, None) == []
    assert "may store 2,048 MiB" in doctor.of_quotas(1 << 31, kv, None)[0].found
    tenant = TenantReport("acme", 0, 0, 0, 0, device_bytes=1 << 40, host_bytes=5)
    worker = replace(WORKER, device_capacity_bytes=1 << 30, host_capacity_bytes=1 << 30)
    found = doctor.of_quotas(1, None, ServiceStats(workers=(worker,), tenants=(tenant,)))
    assert [(each.subject, each.level) for each in found] == [("tenant acme", Level.NOTE)]
    assert "device_bytes" in found[0].found
