"""Every metric of the service: name, unit, help, labels. For Prometheus; knows nothing of gRPC, engines or stores.

What happens is counted when it happens (`GatewayMetrics`); what is a level, or is counted elsewhere already, is read
when somebody asks (`WorkerCollector`, `GatewayCollector`), so that no step of an engine pays for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvservice.types import Usage, WorkerStats

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
"""Bounds of the buckets of times."""


class Kind(Enum):
    """How a metric moves."""

    COUNTER = "counter"
    """Only up, from 0 at the start of the process. Its name in Prometheus ends in `_total`."""
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric. `unit` is the last word of its name, or empty for a plain count."""

    name: str
    kind: Kind
    unit: str
    help: str
    labels: tuple[str, ...] = ()


# Counted by gateways as it happens.
RPCS = MetricSpec("kvservice_rpcs", Kind.COUNTER, "", "Calls of the public API that have ended.", ("method", "code"))
RPC_SECONDS = MetricSpec(
    "kvservice_rpc_seconds", Kind.HISTOGRAM, "seconds", "From receipt of a call to its end.", ("method",)
)
TTFT_SECONDS = MetricSpec(
    "kvservice_ttft_seconds", Kind.HISTOGRAM, "seconds", "From receipt of a Generate to its first token."
)
QUEUE_SECONDS = MetricSpec(
    "kvservice_queue_seconds", Kind.HISTOGRAM, "seconds", "From receipt of a call to its admission by a worker."
)
TOKENS = MetricSpec(
    "kvservice_tokens",
    Kind.COUNTER,
    "tokens",
    "Tokens of calls that ended well, by what they were.",
    ("tenant", "kind"),
)
QUOTA_REFUSALS = MetricSpec(
    "kvservice_quota_refusals", Kind.COUNTER, "", "Calls refused for a tenant's quota.", ("tenant", "quota")
)
AUTH_FAILURES = MetricSpec("kvservice_auth_failures", Kind.COUNTER, "", "Calls without a key that holds.")

# Read from gateways.
RUNNING_CALLS = MetricSpec("kvservice_running_calls", Kind.GAUGE, "", "Calls that this gateway carries out.")
WAITING_CALLS = MetricSpec("kvservice_waiting_calls", Kind.GAUGE, "", "Of these, calls in line for room on a worker.")
CONNECTED_WORKERS = MetricSpec("kvservice_connected_workers", Kind.GAUGE, "", "Workers this gateway is connected to.")
DRAINING = MetricSpec("kvservice_draining", Kind.GAUGE, "", "1 while this gateway drains.")
FAILED_SWEEPS = MetricSpec("kvservice_failed_sweeps", Kind.COUNTER, "", "Sweeps for expired sessions that failed.")
FAILED_OVER_CALLS = MetricSpec(
    "kvservice_failed_over_calls",
    Kind.COUNTER,
    "",
    "Calls given to another worker, theirs being lost before its first token.",
)
REFRESHED_TOKENS = MetricSpec(
    "kvservice_refreshed_tokens",
    Kind.COUNTER,
    "",
    "Tokens computed again beside calls, their stored KV being of no use any more.",
)
FAILED_LOOKS = MetricSpec("kvservice_failed_looks", Kind.COUNTER, "", "Looks at the workers' leases that failed.")

# Read from workers.
DEVICE_BYTES = MetricSpec(
    "kvservice_worker_device_bytes", Kind.GAUGE, "bytes", "Device memory by owner.", ("worker", "owner")
)
DEVICE_FREE_BYTES = MetricSpec(
    "kvservice_worker_device_free_bytes", Kind.GAUGE, "bytes", "Device memory that no call has reserved.", ("worker",)
)
DEVICE_CAPACITY_BYTES = MetricSpec(
    "kvservice_worker_device_capacity_bytes", Kind.GAUGE, "bytes", "Device memory for KV (--kv-bytes).", ("worker",)
)
HOST_BYTES = MetricSpec("kvservice_worker_host_bytes", Kind.GAUGE, "bytes", "Distant KV in host memory.", ("worker",))
HOST_FREE_BYTES = MetricSpec(
    "kvservice_worker_host_free_bytes", Kind.GAUGE, "bytes", "Host memory that no call has reserved.", ("worker",)
)
HOST_CAPACITY_BYTES = MetricSpec(
    "kvservice_worker_host_capacity_bytes", Kind.GAUGE, "bytes", "Host memory for KV (--host-bytes).", ("worker",)
)
WORKER_SESSIONS = MetricSpec(
    "kvservice_worker_sessions", Kind.GAUGE, "", "Sessions whose KV the worker holds.", ("worker",)
)
WORKER_CALLS = MetricSpec("kvservice_worker_running_calls", Kind.GAUGE, "", "Calls it has admitted.", ("worker",))
PREFILL_SPEED = MetricSpec(
    "kvservice_worker_prefill_tokens_per_second", Kind.GAUGE, "", "Speed of late steps with prefill.", ("worker",)
)
DECODE_SPEED = MetricSpec(
    "kvservice_worker_decode_tokens_per_second", Kind.GAUGE, "", "Speed of late steps of decoding alone.", ("worker",)
)
STEPS = MetricSpec("kvservice_worker_steps", Kind.COUNTER, "", "Steps of the engine.", ("worker",))
RECALL_LOOKUPS = MetricSpec(
    "kvservice_worker_recall_lookups", Kind.COUNTER, "", "Tokens that recall chose, over layers and heads.", ("worker",)
)
RECALL_HITS = MetricSpec(
    "kvservice_worker_recall_hits", Kind.COUNTER, "", "Of these, already on the device.", ("worker",)
)
RECOMPUTED_TOKENS = MetricSpec(
    "kvservice_worker_recomputed_tokens", Kind.COUNTER, "tokens", "Tokens whose KV was computed again.", ("worker",)
)
MADE_ROOM = MetricSpec(
    "kvservice_worker_made_room",
    Kind.COUNTER,
    "",
    "Sequences that made room for others: swapped_out, forgotten, idle_swapped_out, idle_dropped.",
    ("worker", "how"),
)
TIER_CONNECTED = MetricSpec(
    "kvservice_tier_connected", Kind.GAUGE, "", "1 while the kv Redis does what it is asked for.", ("worker",)
)
TIER_WRITTEN_FRAMES = MetricSpec(
    "kvservice_tier_written_frames", Kind.COUNTER, "", "Frames of KV written to Redis.", ("worker",)
)
TIER_WRITTEN_BYTES = MetricSpec(
    "kvservice_tier_written_bytes", Kind.COUNTER, "bytes", "Bytes of KV written to Redis.", ("worker",)
)
TIER_STORED_BYTES = MetricSpec(
    "kvservice_tier_stored_bytes", Kind.GAUGE, "bytes", "Written, not deleted, not past its time.", ("worker",)
)
TIER_PENDING_FRAMES = MetricSpec(
    "kvservice_tier_pending_frames", Kind.GAUGE, "", "Frames that wait to be written.", ("worker",)
)
TIER_FAILURES = MetricSpec(
    "kvservice_tier_failures", Kind.COUNTER, "", "Frames that were not written, by reason.", ("worker", "reason")
)

ALL_METRICS: tuple[MetricSpec, ...] = tuple(
    value for value in list(globals().values()) if isinstance(value, MetricSpec)
)
"""In the order of the documentation; a test keeps both together."""


def metrics_table() -> str:
    """All metrics, as a Markdown table."""
    rows = ["| metric | kind | labels | meaning |", "|---|---|---|---|"]
    for spec in ALL_METRICS:
        name = f"{spec.name}_total" if spec.kind is Kind.COUNTER else spec.name
        labels = ", ".join(f"`{label}`" for label in spec.labels) or "-"
        rows.append(f"| `{name}` | {spec.kind.value} | {labels} | {spec.help} |")
    return "\n".join(rows)


class GatewayMetrics:
    """What a gateway counts. Cheap enough to be kept whether anybody asks or not."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._rpcs = self._counter(RPCS)
        self._rpc_seconds = self._histogram(RPC_SECONDS)
        self._ttft_seconds = self._histogram(TTFT_SECONDS)
        self._queue_seconds = self._histogram(QUEUE_SECONDS)
        self._tokens = self._counter(TOKENS)
        self._quota_refusals = self._counter(QUOTA_REFUSALS)
        self._auth_failures = self._counter(AUTH_FAILURES)

    def note_rpc(self, method: str, code: str, seconds: float) -> None:
        """A call of the API has ended. `code` is a status code's name."""
        self._rpcs.labels(method, code).inc()
        self._rpc_seconds.labels(method).observe(seconds)

    def note_auth_failure(self) -> None:
        """A call came without a key that holds."""
        self._auth_failures.inc()

    def note_quota_refusal(self, tenant: str, quota: str) -> None:
        """A call was refused for a quota."""
        self._quota_refusals.labels(tenant, quota).inc()

    def note_call(self, tenant: str, usage: Usage, queue_ms: float, ttft_ms: float) -> None:
        """An Append or a Generate has ended well. `ttft_ms` 0: it gave no token."""
        for kind, count in (
            ("cached", usage.cached_tokens),
            ("prompt", usage.prompt_tokens),
            ("completion", usage.completion_tokens),
            ("recomputed", usage.recomputed_tokens),
            ("reused", usage.reused_tokens),
        ):
            self._tokens.labels(tenant, kind).inc(count)
        self._queue_seconds.observe(queue_ms / 1000)
        if ttft_ms:
            self._ttft_seconds.observe(ttft_ms / 1000)

    def _counter(self, spec: MetricSpec) -> Counter:
        return Counter(spec.name, spec.help, spec.labels, registry=self.registry)

    def _histogram(self, spec: MetricSpec) -> Histogram:
        return Histogram(spec.name, spec.help, spec.labels, buckets=SECONDS, registry=self.registry)


@dataclass(frozen=True, slots=True)
class GatewayLevels:
    """A gateway at one moment."""

    running_calls: int
    waiting_calls: int
    connected_workers: int
    draining: bool
    failed_sweeps: int
    failed_looks: int
    failed_over_calls: int = 0
    refreshed_tokens: int = 0


class GatewayCollector(Collector):
    """Reads a gateway's levels when it is asked. `read` may block."""

    def __init__(self, read: Callable[[], GatewayLevels]) -> None:
        self._read = read

    def describe(self) -> Iterable[Metric]:
        """Nothing, so that registration doesn't read."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """The metrics as they are now."""
        levels = self._read()
        yield _family(RUNNING_CALLS, {(): levels.running_calls})
        yield _family(WAITING_CALLS, {(): levels.waiting_calls})
        yield _family(CONNECTED_WORKERS, {(): levels.connected_workers})
        yield _family(DRAINING, {(): levels.draining})
        yield _family(FAILED_SWEEPS, {(): levels.failed_sweeps})
        yield _family(FAILED_LOOKS, {(): levels.failed_looks})
        yield _family(FAILED_OVER_CALLS, {(): levels.failed_over_calls})
        yield _family(REFRESHED_TOKENS, {(): levels.refreshed_tokens})


class WorkerCollector(Collector):
    """Reads a worker's counters when it is asked. `read` may block, and gives None once the worker has stopped."""

    def __init__(self, worker_id: str, read: Callable[[], WorkerStats | None]) -> None:
        self._worker_id = worker_id
        self._read = read

    def describe(self) -> Iterable[Metric]:
        """Nothing, so that registration doesn't read."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """The metrics as they are now."""
        stats = self._read()
        if stats is None:
            return
        for spec, values in _worker_values(stats).items():
            yield _family(spec, {(self._worker_id, *labels): value for labels, value in values.items()})


Values = Mapping[tuple[str, ...], float]
"""By the values of the labels."""


def _worker_values(stats: WorkerStats) -> dict[MetricSpec, Values]:
    """By the labels after `worker`."""
    headroom, tier = stats.headroom, stats.tier
    plain: dict[MetricSpec, float] = {
        DEVICE_FREE_BYTES: headroom.device_free_bytes,
        DEVICE_CAPACITY_BYTES: headroom.device_capacity_bytes,
        HOST_BYTES: stats.host_bytes,
        HOST_FREE_BYTES: headroom.host_free_bytes,
        HOST_CAPACITY_BYTES: headroom.host_capacity_bytes,
        WORKER_SESSIONS: headroom.resident_sessions,
        WORKER_CALLS: headroom.running_calls,
        PREFILL_SPEED: stats.prefill_tokens_per_s,
        DECODE_SPEED: stats.decode_tokens_per_s,
        STEPS: stats.steps,
        RECALL_LOOKUPS: stats.recall_lookups,
        RECALL_HITS: stats.recall_hits,
        RECOMPUTED_TOKENS: stats.recomputed_tokens,
        TIER_CONNECTED: tier.connected,
        TIER_WRITTEN_FRAMES: tier.written_frames,
        TIER_WRITTEN_BYTES: tier.written_bytes,
        TIER_STORED_BYTES: tier.stored_bytes,
        TIER_PENDING_FRAMES: tier.pending_frames,
    }
    owners: Values = {
        ("weights",): stats.weight_bytes,
        ("window",): stats.window_bytes,
        ("index",): stats.index_bytes,
        ("slots",): stats.slot_bytes,
        ("workspace",): stats.workspace_bytes,
    }
    ways: Values = {
        ("swapped_out",): stats.swapped_out,
        ("forgotten",): stats.forgotten,
        ("idle_swapped_out",): stats.idle_swapped_out,
        ("idle_dropped",): stats.idle_dropped,
    }
    failures: Values = {(reason,): count for reason, count in tier.failures.items()}
    by_label: dict[MetricSpec, Values] = {DEVICE_BYTES: owners, MADE_ROOM: ways, TIER_FAILURES: failures}
    return {**by_label, **{spec: {(): value} for spec, value in plain.items()}}


def _family(spec: MetricSpec, values: Values) -> Metric:
    make = CounterMetricFamily if spec.kind is Kind.COUNTER else GaugeMetricFamily
    family = make(spec.name, spec.help, labels=spec.labels)
    for labels, value in values.items():
        family.add_metric(labels, float(value))
    return family
