"""Messages of the internal protocol to and from the engine's nouns. Knows no behaviour."""

from __future__ import annotations

from kvservice.config.recipes import get_recipe
from kvservice.errors import QUOTA_KEY, InternalError, InvalidRequest, KVServiceError, NotFound
from kvservice.internal import convert
from kvservice.internal.fair import DEFAULT_WEIGHT
from kvservice.internal.v1 import worker_pb2
from kvservice.store.verify import TenantFindings
from kvservice.tier.restore import nothing
from kvservice.types import (
    CallId,
    EngineCall,
    FailedEvent,
    FinishedEvent,
    ModelInfo,
    ProgressEvent,
    SessionId,
    TenantTerms,
    TokenLogprob,
)
from kvservice.v1 import admin_pb2, common_pb2
from kvservice.worker.outputs import CallOutput, TextEvent
from kvservice.worker.stored import StoredKv


def engine_call(submit: worker_pb2.Submit, call_id: CallId, info: ModelInfo, now: float) -> EngineCall:
    """What the engine is to do.

    Args:
        submit: as it came.
        call_id: the worker's own name of the call.
        info: the engine's model.
        now: seconds, of the engine's clock.

    Raises:
        NotFound: the recipe is unknown, or isn't served with this model.
        InvalidRequest: there is no work.
    """
    recipe = get_recipe(submit.recipe)
    if recipe.name not in info.recipes:
        raise NotFound(
            f"recipe {recipe.name!r} is not served here: choose one of {', '.join(info.recipes)}",
            reason="unknown_recipe",
        )
    document: tuple[int, ...] = ()
    prompt: tuple[int, ...] = ()
    sampling = None
    match submit.WhichOneof("work"):
        case "append":
            document = tuple(submit.append.token_ids)
        case "generate":
            document = tuple(submit.generate.document_token_ids)
            prompt = tuple(submit.generate.prompt_token_ids)
            sampling = convert.sampling_from_proto(submit.generate.sampling)
        case _:
            raise InvalidRequest("the submitted call holds no work: set append or generate", field="work")
    return EngineCall(
        call_id=call_id,
        session_id=SessionId(submit.session_id),
        recipe=recipe,
        base_tokens=tuple(submit.base_token_ids),
        document_tokens=document,
        prompt_tokens=prompt,
        sampling=sampling,
        retain=submit.retain,
        keep_partial=submit.generate.keep_partial,
        on_miss=convert.ON_MISS[submit.on_miss],
        tenant_tag=submit.tenant_tag,
        priority=submit.priority,
        deadline=now + submit.deadline_s if submit.deadline_s > 0 else None,
        # Nothing is on its way yet; what is computed again is computed as it was.
        restored=nothing(convert.reached_from_proto(submit.reached)) if submit.HasField("reached") else None,
        terms=TenantTerms(
            weight=submit.weight or DEFAULT_WEIGHT,
            device_bytes=submit.tenant_device_bytes if submit.HasField("tenant_device_bytes") else None,
            host_bytes=submit.tenant_host_bytes if submit.HasField("tenant_host_bytes") else None,
        ),
    )


def ledger_stats(stored: StoredKv) -> admin_pb2.LedgerStats:
    """What a worker has published, and what its scrubber found."""
    stats, scrub = stored.publisher.stats(), stored.last_scrub
    fingerprint, of_sharing = stored.publisher.frame_sets.fingerprints
    message = admin_pb2.LedgerStats(
        held_sessions=stats.held_sessions,
        published_manifests=stats.published,
        fenced_sessions=stats.fenced,
        failures=stats.failures,
        kv_fingerprint=fingerprint.hex(),
        sharing_fingerprint=of_sharing.hex(),
    )
    if stored.resumer is not None:
        resumed = stored.resumer.stats()
        message.resumed.CopyFrom(
            admin_pb2.ResumeStats(
                fetched_sessions=resumed.fetched_sessions,
                recomputed_sessions=resumed.recomputed_sessions,
                restored_tokens=resumed.restored_tokens,
                misses=resumed.misses,
            )
        )
    if scrub is not None:
        message.last_scrub.CopyFrom(
            admin_pb2.ScrubReport(
                leases=scrub.leases,
                ledger_bytes=scrub.ledger_bytes,
                mended_bytes=scrub.mended_bytes,
                named_frames=scrub.named_frames,
                missing_frames=scrub.missing_frames,
                wrong_size_frames=scrub.wrong_size_frames,
                met_frames=scrub.met_frames,
                met_bytes=scrub.met_bytes,
                orphan_frames=scrub.orphan_frames,
                orphan_bytes=scrub.orphan_bytes,
                removed_frames=scrub.removed_frames,
                drift_bytes=scrub.drift_bytes,
            )
        )
    return message


def findings(found: TenantFindings) -> admin_pb2.VerifyResponse:
    """What there is of a tenant, as operators get it."""
    sessions = found.sessions
    return admin_pb2.VerifyResponse(
        checked_frames=sum(each.named_frames - each.missing_frames for each in sessions),
        missing_frames=sum(each.missing_frames for each in sessions),
        corrupt_frames=sum(max(each.corrupt_frames, each.wrong_size_frames) for each in sessions),
        sessions=[
            admin_pb2.SessionFindings(
                session_id=each.session_id,
                has_record=each.has_record,
                has_lease=each.has_lease,
                manifest_version=each.version,
                num_tokens=each.num_tokens,
                charged_bytes=each.charged_bytes,
                named_frames=each.named_frames,
                missing_frames=each.missing_frames,
                wrong_size_frames=each.wrong_size_frames,
                corrupt_frames=each.corrupt_frames,
                own_frames=each.own_frames,
            )
            for each in sessions
        ],
        stored_bytes=found.tenant_bytes.stored_bytes,
        reserved_bytes=found.tenant_bytes.reserved_bytes,
        quota_bytes=found.tenant_bytes.quota_bytes,
    )


def failure(error: Exception) -> worker_pb2.Failure:
    """An error as the gateway gets it. What isn't ours says no more than that."""
    if not isinstance(error, KVServiceError):
        error = InternalError("the call failed inside; the worker's log says why")
    return worker_pb2.Failure(
        code=error.status,
        reason=error.reason,
        message=error.message,
        retryable=error.retryable,
        quota=error.metadata.get(QUOTA_KEY, ""),
    )


def call_event(event: CallOutput, call_id: str) -> worker_pb2.CallEvent:
    """One event of a call. `call_id` is the gateway's own name of the call."""
    match event:
        case ProgressEvent(_, done_tokens, total_tokens):
            progress = worker_pb2.Progress(done_tokens=done_tokens, total_tokens=total_tokens)
            return worker_pb2.CallEvent(call_id=call_id, progress=progress)
        case TextEvent():
            return worker_pb2.CallEvent(call_id=call_id, tokens=_token_chunk(event))
        case FinishedEvent():
            return worker_pb2.CallEvent(call_id=call_id, done=_done(event))
        case FailedEvent(_, error):
            return worker_pb2.CallEvent(call_id=call_id, failure=failure(error))


def _token_chunk(event: TextEvent) -> common_pb2.TokenChunk:
    return common_pb2.TokenChunk(
        token_ids=event.token_ids,
        text=event.text,
        index=event.index,
        logprobs=[
            common_pb2.TokenLogprobs(chosen=_token_logprob(chosen), top=[_token_logprob(each) for each in top])
            for chosen, *top in event.logprobs
        ],
    )


def _token_logprob(found: TokenLogprob) -> common_pb2.TokenLogprob:
    return common_pb2.TokenLogprob(token_id=found.token_id, logprob=found.logprob)


def _done(event: FinishedEvent) -> worker_pb2.Done:
    return worker_pb2.Done(
        finish_reasons=[convert.FINISH_REASON_CODES[reason] for reason in event.finish_reasons],
        usage=convert.usage_to_proto(event.usage),
        kv=convert.telemetry_to_proto(event.telemetry),
        appended_token_ids=event.appended_tokens,
        prefill_ms=event.prefill_ms,
        decode_ms=event.decode_ms,
        device_byte_s=event.device_byte_s,
        host_byte_s=event.host_byte_s,
        reached=convert.reached_to_proto(event.reached),
    )
