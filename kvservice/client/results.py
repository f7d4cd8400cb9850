"""What the client gives: plain dataclasses. Knows no protobuf."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from kvservice.types import FinishReason, KvTelemetry, OnMiss, PromptFormat, SessionId, TokenLogprob, Usage, WorkerId


class SessionState(Enum):
    """What is happening to a session."""

    IDLE = "idle"
    APPENDING = "appending"
    GENERATING = "generating"


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """A session as Get shows it. Times are unix seconds."""

    session_id: SessionId
    model: str
    recipe: str
    prompt_format: PromptFormat
    on_miss: OnMiss
    num_tokens: int
    durable_tokens: int
    state: SessionState
    prefill_done_tokens: int
    prefill_total_tokens: int
    created_at: float
    expires_at: float
    worker_id: WorkerId
    last_error: str
    document_id: str = ""
    document_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Milliseconds of one call, measured in the service; see common.proto."""

    queue_ms: float
    prefill_ms: float
    ttft_ms: float
    decode_ms: float
    total_ms: float


@dataclass(frozen=True, slots=True)
class AppendResult:
    """A document was read. `num_tokens` and `durable_tokens` are the session's now."""

    num_tokens: int
    durable_tokens: int
    usage: Usage
    timings: Timings
    kv: KvTelemetry


@dataclass(frozen=True, slots=True)
class Started:
    """The first event of an answer."""

    sequence: int
    session_id: SessionId
    worker_id: WorkerId
    recipe: str
    seed: int


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """A token of an answer, and the likeliest ones in its place, the likeliest first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Tokens:
    """The next tokens of an answer; `text` may be empty while a character is incomplete."""

    sequence: int
    token_ids: tuple[int, ...]
    text: str
    index: int = 0
    """Which of the `n` answers they belong to."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """If asked for: one for each token."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of an answer. `degraded` says what was left out, if anything was.

    `finish_reason` is that of the first answer, `finish_reasons` has one for each of the `n`.
    """

    sequence: int
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    kv: KvTelemetry
    num_tokens: int
    durable_tokens: int
    degraded: str
    finish_reasons: tuple[FinishReason, ...] = ()


Event = Started | Tokens | Finished


@dataclass(frozen=True, slots=True)
class Alternative:
    """One of the other answers to a prompt."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer: the first of the `n`, the one that joins the session."""

    text: str
    token_ids: tuple[int, ...]
    started: Started
    finished: Finished
    logprobs: tuple[TokenLogprobs, ...] = ()
    """If asked for: one for each token."""
    alternatives: tuple[Alternative, ...] = ()
    """The other `n` - 1 answers."""


@dataclass(frozen=True, slots=True)
class TokenCount:
    """Tokens of a text, beside the positions that the model has."""

    num_tokens: int
    max_positions: int


@dataclass(frozen=True, slots=True)
class TierReport:
    """The kv Redis as a worker sees it. `failures`: writes that failed, by reason."""

    connected: bool
    written_frames: int
    written_bytes: int
    pending_frames: int
    failures: dict[str, int]


@dataclass(frozen=True, slots=True)
class StoredReport:
    """What is stored of a tenant. Nothing is left of it when there are no sessions.

    `checked_frames` were found, `missing_frames` not; `corrupt_frames` fail their checks.
    """

    session_ids: tuple[SessionId, ...]
    checked_frames: int
    missing_frames: int
    corrupt_frames: int
    stored_bytes: int
    reserved_bytes: int
    quota_bytes: int
    own_frames: int = 0
    """That lie under the ids of its sessions, named by a manifest or not."""


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """A worker's counters, and its bytes by owner."""

    worker_id: WorkerId
    address: str
    epoch: int
    model: str
    device: str
    device_capacity_bytes: int
    device_free_bytes: int
    host_capacity_bytes: int
    host_free_bytes: int
    weight_bytes: int
    window_bytes: int
    index_bytes: int
    slot_bytes: int
    workspace_bytes: int
    host_bytes: int
    redis_bytes: int
    resident_sessions: int
    running_calls: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    recall_lookups: int
    recall_hits: int
    recomputed_tokens: int
    steps: int
    tier: TierReport
    swapped_out: int = 0
    forgotten: int = 0
    idle_swapped_out: int = 0
    idle_dropped: int = 0
    parked_sessions: int = 0
    """Of the resident ones, those that have gone to host memory whole."""
    ledger: LedgerReport = field(default_factory=lambda: LedgerReport())


@dataclass(frozen=True, slots=True)
class LedgerReport:
    """What a worker publishes of its sessions' stored KV, and brings back. `misses`: frames, by reason."""

    published_manifests: int = 0
    fenced_sessions: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    fetched_sessions: int = 0
    restored_tokens: int = 0
    misses: dict[str, int] = field(default_factory=dict)
    kv_fingerprint: str = ""
    sharing_fingerprint: str = ""
    """Of sessions whose layers share distant keys."""


@dataclass(frozen=True, slots=True)
class TenantReport:
    """A tenant as one gateway sees it since it started, and its limits over all gateways (None: no limit)."""

    tenant: str
    requests: int
    refused: int
    tokens: int
    running_calls: int
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    concurrent_calls: int | None = None
    document_tokens: int | None = None
    sessions: int | None = None
    device_bytes: int | None = None
    """On each worker."""
    host_bytes: int | None = None
    """On each worker."""
    weight: float = 1.0
    """Share of the workers' time, against that of others."""
    stored_bytes: int | None = None
    """In the kv Redis, reserved ones among them; None unless the tenant was asked for by name."""
    redis_bytes: int | None = None
    """The most that these may be; None unless the tenant was asked for by name."""


@dataclass(frozen=True, slots=True)
class UsageReport:
    """One record of what was used.

    Attributes:
        kind: `call`: one that ended well; `cut_short`: one that didn't; `session_end`: a session's KV since its last
            call; `stored`: a period of a tenant's bytes in the kv Redis.
        record_id: unlike that of any other record of the tenant and kind: the `request_id`, where there is one.
        ended_at: unix seconds.
        device_byte_s: bytes times seconds.
        host_byte_s: the same in host memory.
        redis_byte_s: the same in the kv Redis.
    """

    kind: str
    tenant: str
    record_id: str
    session_id: str
    model: str
    ended_at: float
    usage: Usage
    device_byte_s: float
    host_byte_s: float
    redis_byte_s: float


@dataclass(frozen=True, slots=True)
class ServiceStats:
    """The service's counters. `sessions` are those whose KV a worker holds."""

    workers: tuple[WorkerReport, ...] = field(default_factory=tuple)
    tenants: tuple[TenantReport, ...] = field(default_factory=tuple)
    sessions: int = 0
    waiting_calls: int = 0
    running_calls: int = 0
    draining: bool = False
    version: str = ""
