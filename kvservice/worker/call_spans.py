"""The spans of a worker's calls: one a call, with its prefill, its decoding and what the tiers gave.

Steps of the engine get no spans of their own: a step serves several calls, and there may be hundreds a second. Runs in
the event loop, behind the engine. Knows nothing of exporters.
"""

from __future__ import annotations

import time

from kvservice.errors import KVServiceError
from kvservice.telemetry.tracing import TRACING, Attribute, Attributes, OpenSpan
from kvservice.types import CallId, FailedEvent, FinishedEvent
from kvservice.worker.outputs import Admission, Output, Stepped

NS_PER_MS = 1_000_000


class CallSpans:
    """Spans of the calls of one stream, from their arrival to their last event."""

    def __init__(self) -> None:
        self._open: dict[CallId, OpenSpan] = {}

    def begin(self, call_id: CallId, parent: str, **attributes: Attribute) -> str:
        """A call has come. Gives its span, for those below it; empty, and nothing is kept, if it isn't traced."""
        span = TRACING.begin("worker.call", parent, **attributes)
        if span is None:
            return ""
        self._open[call_id] = span
        return span.traceparent

    def take(self, output: Output) -> None:
        """Ends the spans of calls that end with this output."""
        if not self._open:
            return
        match output:
            case Admission(call_id, refusal) if refusal is not None:
                self._end(call_id, {}, refusal.reason)
            case Stepped(events):
                for event in events:
                    if isinstance(event, FinishedEvent):
                        self._finish(event)
                    elif isinstance(event, FailedEvent):
                        reason = event.error.reason if isinstance(event.error, KVServiceError) else "internal"
                        self._end(event.call_id, {}, reason)
            case _:
                pass

    def _finish(self, event: FinishedEvent) -> None:
        span = self._open.get(event.call_id)
        if span is None:
            return
        end_ns = time.time_ns()
        decoding_ns = end_ns - round(event.decode_ms * NS_PER_MS)
        prefill_ns = decoding_ns - round(event.prefill_ms * NS_PER_MS)
        span.phase("engine.prefill", prefill_ns, decoding_ns)
        if event.decode_ms:
            span.phase("engine.decode", decoding_ns, end_ns)
        self._end(event.call_id, _attributes(event))

    def _end(self, call_id: CallId, attributes: Attributes, error: str = "") -> None:
        span = self._open.pop(call_id, None)
        if span is not None:
            span.end(attributes, error)


def _attributes(event: FinishedEvent) -> Attributes:
    usage, kv = event.usage, event.telemetry
    return {
        "finish_reason": event.finish_reason.value,
        "tokens.cached": usage.cached_tokens,
        "tokens.prompt": usage.prompt_tokens,
        "tokens.completion": usage.completion_tokens,
        "tokens.recomputed": usage.recomputed_tokens,
        "tokens.reused": usage.reused_tokens,
        "recall.lookups": kv.recall_lookups,
        "recall.hits": kv.recall_hits,
        "tier.recalled_bytes": kv.recalled_bytes,
        "tier.streamed_bytes": kv.streamed_bytes,
        "sharing.gated_rows": kv.gated_rows,
        "sharing.skipped_rows": kv.skipped_rows,
        "tier.host_bytes": kv.host_bytes,
        "tier.redis_bytes": kv.redis_bytes,
    }
