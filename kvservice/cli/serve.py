"""`kvservice serve`, `gateway` and `worker`: their options. `compose` wires the parts, `running` runs them."""

from __future__ import annotations

import secrets
import sys
from pathlib import Path
from typing import Annotated

import typer

from kvservice.cli.options import (
    AdapterFile,
    HostBytes,
    HostLink,
    KvBytes,
    Map,
    Recipe,
    Sharing,
    SkipAbove,
    parse_bytes,
)
from kvservice.cli.settings import (
    REDIS_URL_VARIABLE,
    SECRET_VARIABLE,
    STATE_URL_VARIABLE,
    Settings,
    kept_secret,
    overlay,
    read_secret,
    read_settings,
    service_config,
    url_from,
)
from kvservice.config.service import ServiceConfig
from kvservice.errors import ConfigError
from kvservice.telemetry.logging import configure_logging

ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE", help="Settings, as JSON or TOML: tables `gateway` and `worker`. Flags win."
    ),
]
LogLevel = Annotated[str | None, typer.Option("--log-level", help="DEBUG, INFO, WARNING or ERROR.")]
StateUrl = Annotated[
    str | None,
    typer.Option(
        "--state-url",
        metavar="URL",
        help=f"The state Redis: sessions and leases. With a password in it, better set {STATE_URL_VARIABLE}.",
    ),
]
RedisUrl = Annotated[
    str | None,
    typer.Option(
        "--redis-url",
        metavar="URL",
        help=f"The kv Redis: evictable blobs. With a password in it, better set {REDIS_URL_VARIABLE}.",
    ),
]
ModelName = Annotated[
    str | None,
    typer.Option("--model", metavar="NAME|FOLDER", help="A fetched model's name, or a folder. Unset: smollm2-135m."),
]
ApiKeys = Annotated[
    Path | None,
    typer.Option("--api-keys", metavar="FILE", help="File of hashed API keys. Unset: loopback only, one tenant."),
]
Host = Annotated[str | None, typer.Option("--host", help="Address of the public API. Unset: 127.0.0.1.")]
Port = Annotated[int | None, typer.Option("--port", min=0, max=65535, help="Port of the public API; 0: a free one.")]
HttpPort = Annotated[
    int | None,
    typer.Option("--http-port", min=0, max=65535, help="Port of the OpenAI-compatible HTTP API; 0: a free one."),
]
HealthPort = Annotated[
    int | None,
    typer.Option("--health-port", min=0, max=65535, help="Second port with grpc.health.v1 only; 0: a free one."),
]
TlsCert = Annotated[
    Path | None,
    typer.Option("--tls-cert", metavar="FILE", help="Certificate of the public API, PEM. Read again when it changes."),
]
TlsKey = Annotated[Path | None, typer.Option("--tls-key", metavar="FILE", help="Its private key.")]
TlsClientCa = Annotated[
    Path | None,
    typer.Option("--tls-client-ca", metavar="FILE", help="Clients must show a certificate of this authority."),
]
InternalCert = Annotated[
    Path | None,
    typer.Option("--internal-cert", metavar="FILE", help="Certificate for gateways and workers among themselves."),
]
InternalKey = Annotated[Path | None, typer.Option("--internal-key", metavar="FILE", help="Its private key.")]
InternalCa = Annotated[
    Path | None,
    typer.Option("--internal-ca", metavar="FILE", help="Authority of all gateways' and workers' certificates."),
]
MetricsPort = Annotated[
    int | None,
    typer.Option("--metrics-port", min=0, max=65535, help="Port for Prometheus, on loopback; 0: a free one."),
]
Traces = Annotated[
    str | None, typer.Option("--traces", metavar="console|URL", help="Where traces go: an OTLP collector (gRPC).")
]
LogFormat = Annotated[str | None, typer.Option("--log-format", help="json, text, or auto: text on a terminal.")]
SecretFile = Annotated[
    Path | None,
    typer.Option(
        "--secret-file",
        metavar="FILE",
        help=f"The service's secret, 16 to 64 bytes, mode 0600. Or set {SECRET_VARIABLE}. Unset: made up.",
    ),
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads of an engine. Unset: the cores.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="bf16 or fp32, of weights and KV.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu or cuda.")]
MaxBatch = Annotated[int | None, typer.Option("--max-batch", min=1, help="Sequences in one step.")]
StepTokens = Annotated[
    int | None, typer.Option("--step-tokens", min=64, help="Tokens of a step: decoding, then prefill.")
]
Deterministic = Annotated[
    bool | None,
    typer.Option("--deterministic", help="No bit of an answer depends on what else runs; slower."),
]
Grace = Annotated[
    float | None, typer.Option("--grace-s", min=0, help="Seconds that running calls have to end in at SIGTERM.")
]


def serve(
    config: ConfigFile = None,
    model: ModelName = None,
    recipe: Recipe = None,
    kv_bytes: KvBytes = None,
    host_bytes: HostBytes = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=0, help="Worker processes; 0: one worker in this process.")
    ] = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="Workers in Ray Serve replicas, on a cluster of our own or the table `ray`'s.")
    ] = False,
    ray_config: Annotated[
        bool, typer.Option("--ray-config", help="Print a Ray Serve configuration for a cluster, and end.")
    ] = False,
    host: Host = None,
    port: Port = None,
    health_port: HealthPort = None,
    http_port: HttpPort = None,
    api_keys: ApiKeys = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_client_ca: TlsClientCa = None,
    internal_cert: InternalCert = None,
    internal_key: InternalKey = None,
    internal_ca: InternalCa = None,
    secret_file: SecretFile = None,
    redis_url: RedisUrl = None,
    state_url: StateUrl = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            "--data-dir",
            metavar="DIR",
            help="Keep sessions here from start to start. Unset: they end with us, and none is durable.",
        ),
    ] = None,
    redis_bytes: Annotated[
        int | None,
        typer.Option("--redis-bytes", parser=parse_bytes, metavar="SIZE", help="Memory of the kv Redis that we start."),
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    threads: Threads = None,
    max_batch: MaxBatch = None,
    step_tokens: StepTokens = None,
    deterministic: Deterministic = None,
    host_link: HostLink = None,
    sharing_map: Map = None,
    adapter: AdapterFile = None,
    sharing: Sharing = None,
    skip_above: SkipAbove = None,
    grace_s: Grace = None,
    metrics_port: MetricsPort = None,
    traces: Traces = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
) -> None:
    """Run the service: a gateway and its workers. Prints `ready: HOST:PORT` once calls are answered.

    Without Redis URLs it starts two redis-servers of its own on loopback ports. SIGTERM or Ctrl-C drains: running
    calls may end, new ones are refused; a second one ends at once.
    """
    from kvservice.cli import running

    settings = overlay(
        read_settings(config),
        {
            "gateway": {
                "host": host,
                "port": port,
                "health_port": health_port,
                "http_port": http_port,
                "default_recipe": recipe,
                "grace_s": grace_s,
                "tls": _given(cert=tls_cert, key=tls_key, client_ca=tls_client_ca),
                "internal_tls": _given(cert=internal_cert, key=internal_key, ca=internal_ca),
            },
            "worker": {
                "model": model,
                "recipe": recipe,
                "kv_bytes": kv_bytes,
                "host_bytes": host_bytes,
                "max_batch": max_batch,
                "step_tokens": step_tokens,
                "deterministic": deterministic,
                "host_link_bytes_per_s": host_link,
                "sharing_map": sharing_map,
                "adapter": adapter,
                "sharing": sharing,
                "skip_above": skip_above,
                "threads": threads,
                "dtype": dtype,
                "device": device,
                "redis_url": url_from(redis_url, REDIS_URL_VARIABLE),
                "drain_grace_s": grace_s,
                "tls": _given(cert=internal_cert, key=internal_key, ca=internal_ca),
            },
            "workers": workers,
            "ray": {} if ray or ray_config else None,
            "state_url": url_from(state_url, STATE_URL_VARIABLE),
            "data_dir": data_dir,
            "redis_bytes": redis_bytes,
            "api_keys": api_keys,
            "telemetry": _given(metrics_port=metrics_port, traces=traces, log_format=log_format),
            "log_level": log_level,
        },
    )
    secret = read_secret(secret_file) or _secret_of(settings) or _made_up_secret(settings)
    checked = service_config(overlay(settings, {"gateway": {"secret": secret}}))
    if ray_config:
        from kvservice.cli.ray_workers import serve_config

        typer.echo(serve_config(checked), nl=False)
        raise typer.Exit
    _start_logging(checked)
    raise typer.Exit(running.run_service(checked, _announce))


def gateway(
    config: ConfigFile = None,
    state_url: StateUrl = None,
    host: Host = None,
    port: Port = None,
    health_port: HealthPort = None,
    http_port: HttpPort = None,
    api_keys: ApiKeys = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_client_ca: TlsClientCa = None,
    internal_cert: InternalCert = None,
    internal_key: InternalKey = None,
    internal_ca: InternalCa = None,
    secret_file: SecretFile = None,
    recipe: Recipe = None,
    grace_s: Grace = None,
    metrics_port: MetricsPort = None,
    traces: Traces = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
) -> None:
    """Run a gateway alone, without torch. It finds workers by their leases in the state Redis."""
    from kvservice.cli import running

    settings = overlay(
        read_settings(config),
        {
            "gateway": {
                "secret": read_secret(secret_file),
                "host": host,
                "port": port,
                "health_port": health_port,
                "http_port": http_port,
                "default_recipe": recipe,
                "grace_s": grace_s,
                "tls": _given(cert=tls_cert, key=tls_key, client_ca=tls_client_ca),
                "internal_tls": _given(cert=internal_cert, key=internal_key, ca=internal_ca),
            },
            "state_url": url_from(state_url, STATE_URL_VARIABLE),
            "api_keys": api_keys,
            "telemetry": _given(metrics_port=metrics_port, traces=traces, log_format=log_format),
            "log_level": log_level,
        },
    )
    if _secret_of(settings) is None:
        raise ConfigError(
            f"a gateway needs the service's secret, the same in each: give --secret-file, or set {SECRET_VARIABLE}"
        )
    checked = service_config(settings)
    _start_logging(checked)
    raise typer.Exit(running.run_gateway(checked, _announce))


def worker(
    config: ConfigFile = None,
    state_url: StateUrl = None,
    redis_url: RedisUrl = None,
    worker_id: Annotated[
        str | None, typer.Option("--worker-id", help="Name in the fleet; unique. Unset: a random one.")
    ] = None,
    model: ModelName = None,
    recipe: Recipe = None,
    kv_bytes: KvBytes = None,
    host_bytes: HostBytes = None,
    port: Annotated[
        int | None,
        typer.Option("--port", min=0, max=65535, help="Loopback port of the internal service; 0: a free one."),
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    threads: Threads = None,
    max_batch: MaxBatch = None,
    step_tokens: StepTokens = None,
    deterministic: Deterministic = None,
    host_link: HostLink = None,
    sharing_map: Map = None,
    adapter: AdapterFile = None,
    sharing: Sharing = None,
    skip_above: SkipAbove = None,
    grace_s: Grace = None,
    internal_cert: InternalCert = None,
    internal_key: InternalKey = None,
    internal_ca: InternalCa = None,
    stop_with_stdin: Annotated[
        bool, typer.Option("--stop-with-stdin", help="Drain when standard input ends, as at a signal.")
    ] = False,
    metrics_port: MetricsPort = None,
    traces: Traces = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
) -> None:
    """Run a worker alone: one engine behind the internal gRPC service, announced by a lease in the state Redis."""
    from kvservice.cli import running

    settings = overlay(
        read_settings(config),
        {
            "worker": {
                "worker_id": worker_id,
                "model": model,
                "recipe": recipe,
                "kv_bytes": kv_bytes,
                "host_bytes": host_bytes,
                "port": port,
                "max_batch": max_batch,
                "step_tokens": step_tokens,
                "deterministic": deterministic,
                "host_link_bytes_per_s": host_link,
                "sharing_map": sharing_map,
                "adapter": adapter,
                "sharing": sharing,
                "skip_above": skip_above,
                "threads": threads,
                "dtype": dtype,
                "device": device,
                "redis_url": url_from(redis_url, REDIS_URL_VARIABLE),
                "drain_grace_s": grace_s,
                "tls": _given(cert=internal_cert, key=internal_key, ca=internal_ca),
            },
            "state_url": url_from(state_url, STATE_URL_VARIABLE),
            "telemetry": _given(metrics_port=metrics_port, traces=traces, log_format=log_format),
            "log_level": log_level,
        },
    )
    # One file may hold the settings of all; the gateway's need a secret that no worker has.
    settings.pop("gateway", None)
    checked = service_config(settings)
    _start_logging(checked)
    raise typer.Exit(running.run_worker(checked, _announce, stop_with_stdin=stop_with_stdin))


def ray(
    config: ConfigFile = None,
    state_url: StateUrl = None,
    redis_url: RedisUrl = None,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Workers, each in a replica.")] = None,
    model: ModelName = None,
    recipe: Recipe = None,
    kv_bytes: KvBytes = None,
    host_bytes: HostBytes = None,
    dtype: Dtype = None,
    device: Device = None,
    threads: Threads = None,
    grace_s: Grace = None,
    stop_with_stdin: Annotated[
        bool, typer.Option("--stop-with-stdin", help="Drain when standard input ends, as at a signal.")
    ] = False,
    log_level: LogLevel = None,
) -> None:
    """Run workers alone, inside Ray Serve replicas. A cluster is started for them, or joined: see the table `ray`."""
    from kvservice.cli.ray_workers import run_ray

    settings = overlay(
        read_settings(config),
        {
            "ray": {},
            "workers": workers,
            "worker": {
                "model": model,
                "recipe": recipe,
                "kv_bytes": kv_bytes,
                "host_bytes": host_bytes,
                "threads": threads,
                "dtype": dtype,
                "device": device,
                "redis_url": url_from(redis_url, REDIS_URL_VARIABLE),
                "drain_grace_s": grace_s,
            },
            "state_url": url_from(state_url, STATE_URL_VARIABLE),
            "log_level": log_level,
        },
    )
    # One file may hold the settings of all; the gateway's need a secret that no worker has.
    settings.pop("gateway", None)
    checked = service_config(settings)
    _start_logging(checked)
    raise typer.Exit(run_ray(checked, _announce, stop_with_stdin=stop_with_stdin))


def _given(**flags: object) -> Settings | None:
    """A table of the flags that were given, or none."""
    found = {name: value for name, value in flags.items() if value is not None}
    return found or None


def _secret_of(settings: Settings) -> object:
    table = settings.get("gateway")
    return table.get("secret") if isinstance(table, dict) else None


def _made_up_secret(settings: Settings) -> str:
    """One that is kept where sessions are kept, and one of this start where nothing is."""
    data_dir = settings.get("data_dir")
    return kept_secret(Path(str(data_dir))) if data_dir is not None else secrets.token_hex(32)


def _start_logging(config: ServiceConfig) -> None:
    form = config.telemetry.log_format
    configure_logging(config.log_level, json=not sys.stderr.isatty() if form == "auto" else form == "json")


def _announce(address: str) -> None:
    """Programs wait for this line; it is all that goes to standard output."""
    typer.echo(f"ready: {address}")
    sys.stdout.flush()
