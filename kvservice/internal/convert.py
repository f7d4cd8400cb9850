"""Internal messages to and from the service's own nouns. Knows both sides' words and no behaviour."""

from __future__ import annotations

from collections.abc import Collection

from kvservice.errors import InvalidRequest
from kvservice.internal.v1 import worker_pb2
from kvservice.types import (
    ChatMessage,
    ChatRole,
    FinishReason,
    Grammar,
    GrammarKind,
    Headroom,
    KvTelemetry,
    Load,
    ModelInfo,
    ModelShape,
    OnMiss,
    PromptFormat,
    Reached,
    SamplingParams,
    TextRole,
    Usage,
    WorkerStats,
)
from kvservice.v1 import admin_pb2, common_pb2, inference_pb2

PROMPT_FORMATS = {
    common_pb2.PROMPT_FORMAT_UNSPECIFIED: PromptFormat.RAW,
    common_pb2.PROMPT_FORMAT_RAW: PromptFormat.RAW,
    common_pb2.PROMPT_FORMAT_CHAT: PromptFormat.CHAT,
}
ON_MISS = {
    common_pb2.ON_MISS_UNSPECIFIED: OnMiss.RECOMPUTE,
    common_pb2.ON_MISS_RECOMPUTE: OnMiss.RECOMPUTE,
    common_pb2.ON_MISS_FAIL: OnMiss.FAIL,
    common_pb2.ON_MISS_PARTIAL: OnMiss.PARTIAL,
}
TEXT_ROLES = {
    worker_pb2.TEXT_ROLE_DOCUMENT: TextRole.DOCUMENT,
    worker_pb2.TEXT_ROLE_QUESTION: TextRole.QUESTION,
}
CHAT_ROLES = {
    common_pb2.CHAT_ROLE_SYSTEM: ChatRole.SYSTEM,
    common_pb2.CHAT_ROLE_USER: ChatRole.USER,
    common_pb2.CHAT_ROLE_ASSISTANT: ChatRole.ASSISTANT,
}
FINISH_REASONS = {
    common_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    common_pb2.FINISH_REASON_EOS: FinishReason.EOS,
    common_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    common_pb2.FINISH_REASON_CANCELLED: FinishReason.CANCELLED,
}
# An enum's zero comes first in the tables above, so these keep the named value, not UNSPECIFIED.
PROMPT_FORMAT_CODES = {value: code for code, value in PROMPT_FORMATS.items()}
ON_MISS_CODES = {value: code for code, value in ON_MISS.items()}
TEXT_ROLE_CODES = {value: code for code, value in TEXT_ROLES.items()}
CHAT_ROLE_CODES = {value: code for code, value in CHAT_ROLES.items()}
FINISH_REASON_CODES = {value: code for code, value in FINISH_REASONS.items()}


def sampling_to_proto(params: SamplingParams) -> common_pb2.SamplingParams:
    """Sampling parameters with every field set, but for those whose absence says something."""
    return common_pb2.SamplingParams(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        typical_p=params.typical_p,
        repetition_penalty=params.repetition_penalty,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        seed=params.seed,
        max_new_tokens=params.max_new_tokens,
        stop=params.stop,
        ignore_eos=params.ignore_eos,
        logit_bias=dict(params.logit_bias),
        grammar=None if params.grammar is None else grammar_to_proto(params.grammar),
        n=params.n,
        logprobs=params.logprobs,
    )


def sampling_from_proto(message: common_pb2.SamplingParams) -> SamplingParams:
    """Sampling parameters that a gateway has checked and completed."""
    return SamplingParams(
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        min_p=message.min_p,
        typical_p=message.typical_p,
        repetition_penalty=message.repetition_penalty,
        frequency_penalty=message.frequency_penalty,
        presence_penalty=message.presence_penalty,
        logit_bias=tuple(sorted(message.logit_bias.items())),
        seed=message.seed,
        max_new_tokens=message.max_new_tokens,
        stop=tuple(message.stop),
        ignore_eos=message.ignore_eos,
        grammar=grammar_from_proto(message.grammar),
        n=message.n,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
    )


def grammar_to_proto(grammar: Grammar) -> common_pb2.Grammar:
    """See `Grammar`."""
    if grammar.kind is GrammarKind.REGEX:
        return common_pb2.Grammar(regex=grammar.text)
    return common_pb2.Grammar(json_schema=grammar.text)


def grammar_from_proto(message: common_pb2.Grammar) -> Grammar | None:
    """See `Grammar`; None when no kind is set."""
    match message.WhichOneof("kind"):
        case "regex":
            return Grammar(GrammarKind.REGEX, message.regex)
        case "json_schema":
            return Grammar(GrammarKind.JSON_SCHEMA, message.json_schema)
    return None


def headroom_to_proto(headroom: Headroom) -> worker_pb2.Headroom:
    """See `Headroom`."""
    return worker_pb2.Headroom(
        device_capacity_bytes=headroom.device_capacity_bytes,
        device_free_bytes=headroom.device_free_bytes,
        device_freeable_bytes=headroom.device_freeable_bytes,
        host_capacity_bytes=headroom.host_capacity_bytes,
        host_free_bytes=headroom.host_free_bytes,
        host_freeable_bytes=headroom.host_freeable_bytes,
        running_calls=headroom.running_calls,
        resident_sessions=headroom.resident_sessions,
        draining=headroom.draining,
        waiting_tokens=headroom.load.waiting_tokens,
        prefill_tokens_per_s=headroom.load.prefill_tokens_per_s,
        fetch_bytes_per_s=headroom.load.fetch_bytes_per_s,
        decode_tokens_per_s=headroom.load.decode_tokens_per_s,
    )


def headroom_from_proto(message: worker_pb2.Headroom, prefixes: tuple[int, ...] = ()) -> Headroom:
    """See `Headroom`. `prefixes` come in a message of their own, and seldom."""
    return Headroom(
        device_capacity_bytes=message.device_capacity_bytes,
        device_free_bytes=message.device_free_bytes,
        device_freeable_bytes=message.device_freeable_bytes,
        host_capacity_bytes=message.host_capacity_bytes,
        host_free_bytes=message.host_free_bytes,
        host_freeable_bytes=message.host_freeable_bytes,
        running_calls=message.running_calls,
        resident_sessions=message.resident_sessions,
        draining=message.draining,
        load=Load(
            message.waiting_tokens,
            message.prefill_tokens_per_s,
            message.fetch_bytes_per_s,
            prefixes,
            message.decode_tokens_per_s,
        ),
    )


def model_to_proto(info: ModelInfo) -> inference_pb2.Model:
    """What a worker announces, in the public form."""
    shape = info.shape
    return inference_pb2.Model(
        name=info.name,
        max_positions=shape.max_positions,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        vocab_size=shape.vocab_size,
        dtype_bytes=shape.dtype_bytes,
        kv_bytes_per_token=shape.kv_bytes_per_token,
        recipes=info.recipes,
        default_recipe=info.default_recipe,
        origin=info.origin,
        num_followers=shape.num_followers,
    )


def model_from_proto(message: inference_pb2.Model) -> ModelInfo:
    """The inverse of `model_to_proto`."""
    shape = ModelShape(
        num_layers=message.num_layers,
        num_heads=message.num_heads,
        num_kv_heads=message.num_kv_heads,
        head_dim=message.head_dim,
        hidden_size=message.hidden_size,
        intermediate_size=message.intermediate_size,
        vocab_size=message.vocab_size,
        max_positions=message.max_positions,
        dtype_bytes=message.dtype_bytes,
        num_followers=message.num_followers,
    )
    return ModelInfo(message.name, shape, tuple(message.recipes), message.default_recipe, message.origin)


def telemetry_to_proto(telemetry: KvTelemetry) -> common_pb2.KvTelemetry:
    """See `KvTelemetry`."""
    return common_pb2.KvTelemetry(
        bytes=common_pb2.KvBytes(
            device_window=telemetry.window_bytes,
            device_index=telemetry.index_bytes,
            device_slots=telemetry.slot_bytes,
            host=telemetry.host_bytes,
            redis=telemetry.redis_bytes,
        ),
        dense_bytes=telemetry.dense_bytes,
        recall_lookups=telemetry.recall_lookups,
        recall_hits=telemetry.recall_hits,
        recalled_bytes=telemetry.recalled_bytes,
        streamed_bytes=telemetry.streamed_bytes,
        gated_rows=telemetry.gated_rows,
        skipped_rows=telemetry.skipped_rows,
        follower_bytes=telemetry.follower_bytes,
    )


def chat_messages_to_proto(messages: Collection[ChatMessage]) -> list[common_pb2.ChatMessage]:
    """See `chat_messages_from_proto`."""
    return [common_pb2.ChatMessage(role=CHAT_ROLE_CODES[each.role], content=each.content) for each in messages]


def chat_messages_from_proto(messages: Collection[common_pb2.ChatMessage]) -> tuple[ChatMessage, ...]:
    """Turns of a conversation.

    Raises:
        InvalidRequest: one has no role.
    """
    for message in messages:
        if message.role not in CHAT_ROLES:
            raise InvalidRequest(f"role={message.role}: must be SYSTEM, USER or ASSISTANT", field="messages")
    return tuple(ChatMessage(CHAT_ROLES[message.role], message.content) for message in messages)


def usage_to_proto(usage: Usage) -> common_pb2.Usage:
    """See `Usage`."""
    return common_pb2.Usage(
        cached_tokens=usage.cached_tokens,
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        recomputed_tokens=usage.recomputed_tokens,
        reused_tokens=usage.reused_tokens,
    )


def stats_to_proto(stats: WorkerStats) -> admin_pb2.WorkerStats:
    """A worker's counters; the identity fields are the caller's to fill."""
    headroom = stats.headroom
    return admin_pb2.WorkerStats(
        device_capacity_bytes=headroom.device_capacity_bytes,
        device_free_bytes=headroom.device_free_bytes,
        host_capacity_bytes=headroom.host_capacity_bytes,
        host_free_bytes=headroom.host_free_bytes,
        weight_bytes=stats.weight_bytes,
        bytes=common_pb2.KvBytes(
            device_window=stats.window_bytes,
            device_index=stats.index_bytes,
            device_slots=stats.slot_bytes,
            device_workspace=stats.workspace_bytes,
            host=stats.host_bytes,
            redis=stats.tier.stored_bytes,
        ),
        resident_sessions=headroom.resident_sessions,
        running_calls=headroom.running_calls,
        prefill_tokens_per_s=stats.prefill_tokens_per_s,
        decode_tokens_per_s=stats.decode_tokens_per_s,
        recall_lookups=stats.recall_lookups,
        recall_hits=stats.recall_hits,
        recomputed_tokens=stats.recomputed_tokens,
        swapped_out=stats.swapped_out,
        forgotten=stats.forgotten,
        idle_swapped_out=stats.idle_swapped_out,
        idle_dropped=stats.idle_dropped,
        parked_sessions=stats.parked_sessions,
        steps=stats.steps,
        tier=admin_pb2.TierStats(
            connected=stats.tier.connected,
            written_frames=stats.tier.written_frames,
            written_bytes=stats.tier.written_bytes,
            pending_frames=stats.tier.pending_frames,
            failures=stats.tier.failures,
        ),
    )


def reached_to_proto(reached: Reached) -> worker_pb2.Reached:
    """How a session's tokens were computed."""
    bounds = (bound for span in reached.selected for bound in span)
    return worker_pb2.Reached(num_computed=reached.num_computed, selected=bounds)


def reached_from_proto(message: worker_pb2.Reached) -> Reached:
    """The inverse of `reached_to_proto`; of an unset one, that nothing is known."""
    bounds = message.selected
    return Reached(message.num_computed, tuple(zip(bounds[::2], bounds[1::2], strict=True)))
