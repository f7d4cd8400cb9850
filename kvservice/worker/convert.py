"""Messages of the internal protocol to and from the engine's nouns. Knows no behaviour."""

from __future__ import annotations

from kvservice.config.recipes import get_recipe
from kvservice.errors import InternalError, InvalidRequest, KVServiceError, NotFound
from kvservice.internal import convert
from kvservice.internal.v1 import worker_pb2
from kvservice.types import (
    CallId,
    EngineCall,
    FailedEvent,
    FinishedEvent,
    ModelInfo,
    ProgressEvent,
    SessionId,
    TokenLogprob,
)
from kvservice.v1 import common_pb2
from kvservice.worker.outputs import CallOutput, TextEvent


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
    )


def failure(error: Exception) -> worker_pb2.Failure:
    """An error as the gateway gets it. What isn't ours says no more than that."""
    if not isinstance(error, KVServiceError):
        error = InternalError("the call failed inside; the worker's log says why")
    return worker_pb2.Failure(code=error.status, reason=error.reason, message=error.message, retryable=error.retryable)


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
    )
