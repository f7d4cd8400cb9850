"""`kvservice doctor`: what is amiss with a deployment, and what to do about it. Judged in `kvservice.drill.doctor`."""

from __future__ import annotations

import asyncio
import datetime as dt
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvservice.cli.options import JsonFile, api_key, client_tls
from kvservice.cli.output import show_table, write_json
from kvservice.cli.settings import (
    REDIS_URL_VARIABLE,
    STATE_URL_VARIABLE,
    Settings,
    read_settings,
    service_config,
    url_from,
)
from kvservice.errors import ConfigError, KVServiceError

if TYPE_CHECKING:
    from kvservice.client import ServiceStats
    from kvservice.config.service import ServiceConfig
    from kvservice.drill.doctor import Finding, MachineFacts, RedisFacts
    from kvservice.types import ModelInfo

FAILED = 1
NO_SECRET = "0" * 64
"""Stands for one that comes from elsewhere."""


def doctor(
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="Settings of `serve`, `gateway` or `worker`.")
    ] = None,
    state_url: Annotated[
        str | None, typer.Option("--state-url", metavar="URL", help=f"The state Redis, else {STATE_URL_VARIABLE}.")
    ] = None,
    redis_url: Annotated[
        str | None, typer.Option("--redis-url", metavar="URL", help=f"The kv Redis, else {REDIS_URL_VARIABLE}.")
    ] = None,
    address: Annotated[
        str | None, typer.Option("--address", metavar="HOST:PORT", help="A gateway that runs; needs role `operator`.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Check a deployment: servers, their settings and speed, this machine, and the service if it runs.

    Says what to do about each finding. Exits 1 if anything is broken. Nothing that lasts is written.
    """
    from kvservice.drill import doctor as judge
    from kvservice.drill import doctor_settings
    from kvservice.drill.examination import ask_machine

    settings = read_settings(config)
    gateway = settings.pop("gateway", None)
    checked = service_config(settings)
    state = url_from(state_url, STATE_URL_VARIABLE) or (checked.state_url and checked.state_url.get_secret_value())
    worker_url = checked.worker.redis_url
    kv = url_from(redis_url, REDIS_URL_VARIABLE) or (worker_url and worker_url.get_secret_value())
    if not (state or kv or address):
        raise ConfigError("nothing to look at: give --config, --state-url, --redis-url or --address")
    state_facts, kv_facts, service, models = asyncio.run(_ask(state or "", kv or "", address))
    findings: list[Finding] = []
    for facts in (state_facts, kv_facts):
        findings += judge.of_redis(facts) if facts is not None else []
    if state_facts is not None and kv_facts is not None:
        findings += judge.of_both(state_facts, kv_facts)
    if isinstance(service, str):
        advice = "start it, or give the address that `serve` prints"
        findings.append(judge.Finding("service", judge.Level.BROKEN, service, advice))
        service = None
    if kv_facts is not None:
        findings += judge.of_speed(kv_facts, _break_even(service, models))
    if service is not None:
        findings += judge.of_service(service)
    needed = checked.worker.kv_bytes + checked.worker.host_bytes if config is not None else 0
    machine = ask_machine(needed)
    findings += judge.of_machine(machine)
    if config is not None:
        findings += _of_settings(gateway if isinstance(gateway, dict) else None, checked, machine)
        findings += doctor_settings.of_quotas(checked.worker.tenant_stored_bytes, kv_facts, service)
    rows = [(finding.subject, finding.level.value, finding.found, finding.advice or "-") for finding in findings]
    show_table("Doctor", ("what", "how", "found", "what to do"), rows)
    if json_file is not None:
        results = [asdict(finding) | {"level": finding.level.value} for finding in findings]
        write_json(json_file, {"config": str(config) if config else None, "address": address}, {"findings": results})
    if judge.worst(findings) is judge.Level.BROKEN:
        raise typer.Exit(FAILED)


def _of_settings(gateway: Settings | None, checked: ServiceConfig, machine: MachineFacts) -> list[Finding]:
    """Of a gateway only if the file is one's. Its secret is of no interest here."""
    from kvservice.config.gateway import GatewayConfig
    from kvservice.drill import doctor_settings as judge

    now = dt.datetime.now(dt.UTC)
    certificates = [("workers' TLS", checked.worker.tls)]
    found: list[Finding] = []
    if gateway is not None:
        told = GatewayConfig.model_validate({**gateway, "secret": gateway.get("secret") or NO_SECRET})
        certificates += [("internal TLS", told.internal_tls)]
        if told.tls is not None:
            found.append(judge.of_certificate("public TLS", told.tls.cert, told.tls.key, now))
        found += judge.of_listening(told.host, has_tls=told.tls is not None, has_keys=checked.api_keys is not None)
        found += judge.of_connections(told.limits.connections, machine)
    return found + [
        judge.of_certificate(subject, tls.cert, tls.key, now) for subject, tls in certificates if tls is not None
    ]


async def _ask(
    state: str, kv: str, address: str | None
) -> tuple[RedisFacts | None, RedisFacts | None, ServiceStats | str | None, tuple[ModelInfo, ...]]:
    from kvservice.client import Client, RetryPolicy
    from kvservice.drill.examination import ask_redis

    state_facts = await ask_redis("state", state, measures_speed=False) if state else None
    kv_facts = await ask_redis("kv", kv, measures_speed=True) if kv else None
    if address is None:
        return state_facts, kv_facts, None, ()
    retry = RetryPolicy(max_attempts=2)
    async with Client(address, api_key(), tls=client_tls(), retry=retry, timeout_s=10.0) as client:
        try:
            return state_facts, kv_facts, await client.stats(), await client.list_models()
        except KVServiceError as error:
            return state_facts, kv_facts, error.message, ()


def _break_even(service: ServiceStats | None, models: tuple[ModelInfo, ...]) -> float | None:
    """The fastest prefill of any worker, as bytes of KV a second; None if none has been measured."""
    from kvservice.cli.size import break_even_gb_per_s

    shapes = {model.name: model.shape for model in models}
    known = [
        break_even_gb_per_s(shapes[worker.model], worker.prefill_tokens_per_s)
        for worker in (service.workers if service is not None else ())
        if worker.model in shapes and worker.prefill_tokens_per_s
    ]
    return max(known, default=None)
