"""Public messages to the client's results. Knows no channel."""

from __future__ import annotations

from kvservice.client.results import (
    AppendResult,
    Event,
    Finished,
    LedgerReport,
    ServiceStats,
    SessionInfo,
    SessionState,
    Started,
    StoredReport,
    TenantReport,
    TierReport,
    Timings,
    TokenLogprobs,
    Tokens,
    UsageReport,
    WorkerReport,
)
from kvservice.internal.convert import FINISH_REASONS, ON_MISS, PROMPT_FORMATS
from kvservice.types import KvTelemetry, SessionId, TokenLogprob, Usage, WorkerId
from kvservice.v1 import admin_pb2, common_pb2, sessions_pb2

_STATES = {
    sessions_pb2.SESSION_STATE_UNSPECIFIED: SessionState.IDLE,
    sessions_pb2.SESSION_STATE_IDLE: SessionState.IDLE,
    sessions_pb2.SESSION_STATE_APPENDING: SessionState.APPENDING,
    sessions_pb2.SESSION_STATE_GENERATING: SessionState.GENERATING,
}


def session(message: sessions_pb2.Session) -> SessionInfo:
    """See `SessionInfo`."""
    return SessionInfo(
        session_id=SessionId(message.session_id),
        model=message.model,
        recipe=message.recipe,
        prompt_format=PROMPT_FORMATS[message.prompt_format],
        on_miss=ON_MISS[message.on_miss],
        num_tokens=message.num_tokens,
        durable_tokens=message.durable_tokens,
        state=_STATES[message.state],
        prefill_done_tokens=message.prefill_done_tokens,
        prefill_total_tokens=message.prefill_total_tokens,
        created_at=message.created_at.ToMicroseconds() / 1e6,
        expires_at=message.expires_at.ToMicroseconds() / 1e6,
        worker_id=WorkerId(message.worker_id),
        last_error=message.last_error,
        document_id=message.document_id,
        document_tokens=message.document_tokens,
    )


def usage(message: common_pb2.Usage) -> Usage:
    """See `Usage`."""
    return Usage(
        cached_tokens=message.cached_tokens,
        prompt_tokens=message.prompt_tokens,
        completion_tokens=message.completion_tokens,
        recomputed_tokens=message.recomputed_tokens,
        reused_tokens=message.reused_tokens,
    )


def timings(message: common_pb2.Timings) -> Timings:
    """See `Timings`."""
    return Timings(
        queue_ms=message.queue_ms,
        prefill_ms=message.prefill_ms,
        ttft_ms=message.ttft_ms,
        decode_ms=message.decode_ms,
        total_ms=message.total_ms,
    )


def telemetry(message: common_pb2.KvTelemetry) -> KvTelemetry:
    """See `KvTelemetry`."""
    return KvTelemetry(
        window_bytes=message.bytes.device_window,
        index_bytes=message.bytes.device_index,
        slot_bytes=message.bytes.device_slots,
        host_bytes=message.bytes.host,
        redis_bytes=message.bytes.redis,
        dense_bytes=message.dense_bytes,
        recall_lookups=message.recall_lookups,
        recall_hits=message.recall_hits,
        recalled_bytes=message.recalled_bytes,
        streamed_bytes=message.streamed_bytes,
        gated_rows=message.gated_rows,
        skipped_rows=message.skipped_rows,
        follower_bytes=message.follower_bytes,
    )


def append_result(message: sessions_pb2.AppendFinished) -> AppendResult:
    """See `AppendResult`."""
    return AppendResult(
        num_tokens=message.num_tokens,
        durable_tokens=message.durable_tokens,
        usage=usage(message.usage),
        timings=timings(message.timings),
        kv=telemetry(message.kv),
    )


def event(message: common_pb2.GenerateEvent) -> Event | None:
    """One event of an answer; None for a kind that this client doesn't know."""
    kind = message.WhichOneof("event")
    if kind == "started":
        started = message.started
        return Started(
            message.sequence,
            SessionId(started.session_id),
            WorkerId(started.worker_id),
            started.recipe,
            started.seed,
        )
    if kind == "tokens":
        tokens = message.tokens
        return Tokens(
            message.sequence,
            tuple(tokens.token_ids),
            tokens.text,
            tokens.index,
            tuple(_token_logprobs(each) for each in tokens.logprobs),
        )
    if kind == "finished":
        finished = message.finished
        return Finished(
            sequence=message.sequence,
            finish_reason=FINISH_REASONS[finished.finish_reason],
            usage=usage(finished.usage),
            timings=timings(finished.timings),
            kv=telemetry(finished.kv),
            num_tokens=finished.num_tokens,
            durable_tokens=finished.durable_tokens,
            degraded=finished.degraded,
            finish_reasons=tuple(FINISH_REASONS[reason] for reason in finished.finish_reasons),
        )
    return None


def _token_logprobs(message: common_pb2.TokenLogprobs) -> TokenLogprobs:
    return TokenLogprobs(_token_logprob(message.chosen), tuple(_token_logprob(each) for each in message.top))


def _token_logprob(message: common_pb2.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(message.token_id, message.logprob)


def service_stats(message: admin_pb2.GetStatsResponse) -> ServiceStats:
    """See `ServiceStats`."""
    return ServiceStats(
        workers=tuple(_worker_report(worker) for worker in message.workers),
        tenants=tuple(_tenant_report(tenant) for tenant in message.tenants),
        sessions=message.sessions,
        waiting_calls=message.waiting_calls,
        running_calls=message.running_calls,
        draining=message.draining,
        version=message.version,
    )


def usage_report(message: admin_pb2.UsageRecord) -> UsageReport:
    """See `UsageReport`."""
    return UsageReport(
        kind=admin_pb2.UsageKind.Name(message.kind).removeprefix("USAGE_KIND_").lower(),
        tenant=message.tenant,
        record_id=message.record_id,
        session_id=message.session_id,
        model=message.model,
        ended_at=message.ended_at,
        usage=usage(message.usage),
        device_byte_s=message.device_byte_s,
        host_byte_s=message.host_byte_s,
        redis_byte_s=message.redis_byte_s,
    )


def _tenant_report(message: admin_pb2.TenantStats) -> TenantReport:
    limits = {field.name: value for field, value in message.ListFields() if field.name in _TENANT_LIMITS}
    return TenantReport(
        tenant=message.tenant,
        requests=message.requests,
        refused=message.refused,
        tokens=message.tokens,
        running_calls=message.running_calls,
        weight=message.weight,
        **limits,
    )


_TENANT_LIMITS = (
    "requests_per_minute",
    "tokens_per_minute",
    "concurrent_calls",
    "document_tokens",
    "sessions",
    "device_bytes",
    "host_bytes",
    "stored_bytes",
    "redis_bytes",
)
"""Unset: there is none, or it wasn't asked for."""


def _worker_report(message: admin_pb2.WorkerStats) -> WorkerReport:
    return WorkerReport(
        worker_id=WorkerId(message.worker_id),
        address=message.address,
        epoch=message.epoch,
        model=message.model,
        device=message.device,
        device_capacity_bytes=message.device_capacity_bytes,
        device_free_bytes=message.device_free_bytes,
        host_capacity_bytes=message.host_capacity_bytes,
        host_free_bytes=message.host_free_bytes,
        weight_bytes=message.weight_bytes,
        window_bytes=message.bytes.device_window,
        index_bytes=message.bytes.device_index,
        slot_bytes=message.bytes.device_slots,
        workspace_bytes=message.bytes.device_workspace,
        host_bytes=message.bytes.host,
        redis_bytes=message.bytes.redis,
        resident_sessions=message.resident_sessions,
        running_calls=message.running_calls,
        prefill_tokens_per_s=message.prefill_tokens_per_s,
        decode_tokens_per_s=message.decode_tokens_per_s,
        recall_lookups=message.recall_lookups,
        recall_hits=message.recall_hits,
        recomputed_tokens=message.recomputed_tokens,
        steps=message.steps,
        tier=TierReport(
            connected=message.tier.connected,
            written_frames=message.tier.written_frames,
            written_bytes=message.tier.written_bytes,
            pending_frames=message.tier.pending_frames,
            failures=dict(message.tier.failures),
        ),
        swapped_out=message.swapped_out,
        forgotten=message.forgotten,
        idle_swapped_out=message.idle_swapped_out,
        idle_dropped=message.idle_dropped,
        parked_sessions=message.parked_sessions,
        ledger=_ledger_report(message.ledger),
    )


def _ledger_report(message: admin_pb2.LedgerStats) -> LedgerReport:
    return LedgerReport(
        published_manifests=message.published_manifests,
        fenced_sessions=message.fenced_sessions,
        failures=dict(message.failures),
        fetched_sessions=message.resumed.fetched_sessions,
        restored_tokens=message.resumed.restored_tokens,
        misses=dict(message.resumed.misses),
        kv_fingerprint=message.kv_fingerprint,
        sharing_fingerprint=message.sharing_fingerprint,
    )


def stored_report(message: admin_pb2.VerifyResponse) -> StoredReport:
    """See `StoredReport`."""
    return StoredReport(
        session_ids=tuple(SessionId(found.session_id) for found in message.sessions),
        checked_frames=message.checked_frames,
        missing_frames=message.missing_frames,
        corrupt_frames=message.corrupt_frames,
        stored_bytes=message.stored_bytes,
        reserved_bytes=message.reserved_bytes,
        quota_bytes=message.quota_bytes,
        own_frames=sum(found.own_frames for found in message.sessions),
    )
