"""Public messages to and from the service's nouns, and all checks that need the message alone. Knows no session."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from kvservice.config.limits import Limits
from kvservice.errors import InvalidRequest
from kvservice.internal.convert import (
    ON_MISS,
    ON_MISS_CODES,
    PROMPT_FORMAT_CODES,
    PROMPT_FORMATS,
    grammar_from_proto,
)
from kvservice.store.base import SessionRecord
from kvservice.types import Grammar, OnMiss, PromptFormat, SamplingParams
from kvservice.v1 import common_pb2, sessions_pb2

_DEFAULTS = SamplingParams()
MAX_PRIORITY = 100
_MAX_BIAS = 100.0
_MAX_PENALTY = 2.0
_MAX_REPETITION_PENALTY = 10.0


def sampling(message: common_pb2.SamplingParams, limits: Limits, *, seed: int) -> SamplingParams:
    """The sampling parameters in force; `seed` where the caller gave none. Ranges are those of OpenAI, vLLM and TGI.

    Raises:
        InvalidRequest: a value that can't be had; `field` names it.
    """
    _check_stop(message.stop, limits)
    temperature = _number(message, "temperature", _DEFAULTS.temperature, 0.0, limits.max_temperature)
    return SamplingParams(
        temperature=temperature,
        top_k=message.top_k if message.HasField("top_k") else _DEFAULTS.top_k,
        top_p=_number(message, "top_p", _DEFAULTS.top_p, 0.0, 1.0, least_allowed=False),
        min_p=_number(message, "min_p", _DEFAULTS.min_p, 0.0, 1.0),
        typical_p=_number(message, "typical_p", _DEFAULTS.typical_p, 0.0, 1.0, least_allowed=False),
        repetition_penalty=_number(
            message,
            "repetition_penalty",
            _DEFAULTS.repetition_penalty,
            0.0,
            _MAX_REPETITION_PENALTY,
            least_allowed=False,
        ),
        frequency_penalty=_number(
            message, "frequency_penalty", _DEFAULTS.frequency_penalty, -_MAX_PENALTY, _MAX_PENALTY
        ),
        presence_penalty=_number(message, "presence_penalty", _DEFAULTS.presence_penalty, -_MAX_PENALTY, _MAX_PENALTY),
        logit_bias=_logit_bias(message, limits),
        seed=message.seed if message.HasField("seed") else seed,
        max_new_tokens=_count(message, "max_new_tokens", limits.default_new_tokens, 1, limits.max_new_tokens),
        stop=tuple(message.stop),
        ignore_eos=message.ignore_eos,
        grammar=_grammar(message, limits),
        n=_num_answers(message, temperature, limits),
        logprobs=_count(message, "logprobs", 0, 0, limits.logprobs) if message.HasField("logprobs") else None,
    )


def check_vocabulary(params: SamplingParams, vocab_size: int) -> None:
    """Refuses token ids that the model doesn't have."""
    token_ids([token_id for token_id, _ in params.logit_bias], vocab_size, "sampling.logit_bias")


def priority(value: int) -> int:
    """A call's priority; 0 where the caller gave none."""
    if not -MAX_PRIORITY <= value <= MAX_PRIORITY:
        raise InvalidRequest(f"priority={value}: it must be -{MAX_PRIORITY} to {MAX_PRIORITY}", field="priority")
    return value


def _invalid(name: str, value: object, rule: str) -> InvalidRequest:
    return InvalidRequest(f"sampling.{name}={value}: {rule}", field=f"sampling.{name}")


def _number(
    message: common_pb2.SamplingParams,
    name: str,
    default: float,
    least: float,
    most: float,
    *,
    least_allowed: bool = True,
) -> float:
    if not message.HasField(name):  # type: ignore[arg-type] # the name of a field
        return default
    value: float = getattr(message, name)
    # A NaN fails every comparison.
    if (least <= value if least_allowed else least < value) and value <= most:
        return value
    raise _invalid(name, value, f"it must be {'from' if least_allowed else 'more than'} {least:g} to {most:g}")


def _count(message: common_pb2.SamplingParams, name: str, default: int, least: int, most: int) -> int:
    if not message.HasField(name):  # type: ignore[arg-type] # the name of a field
        return default
    value: int = getattr(message, name)
    if not least <= value <= most:
        raise _invalid(name, value, f"it must be {least} to {most}")
    return value


def _num_answers(message: common_pb2.SamplingParams, temperature: float, limits: Limits) -> int:
    num_answers = _count(message, "n", _DEFAULTS.n, 1, limits.answers)
    if num_answers > 1 and temperature == 0.0:
        raise _invalid("n", num_answers, "at temperature 0 all answers are alike; set a temperature above 0, or n to 1")
    return num_answers


def _logit_bias(message: common_pb2.SamplingParams, limits: Limits) -> tuple[tuple[int, float], ...]:
    if len(message.logit_bias) > limits.logit_biases:
        raise InvalidRequest(
            f"sampling.logit_bias has {len(message.logit_bias)} entries: at most {limits.logit_biases} are allowed",
            field="sampling.logit_bias",
        )
    for token_id, bias in message.logit_bias.items():
        if not -_MAX_BIAS <= bias <= _MAX_BIAS:
            raise _invalid("logit_bias", f"{{{token_id}: {bias}}}", f"a bias must be -{_MAX_BIAS:g} to {_MAX_BIAS:g}")
    return tuple(sorted(message.logit_bias.items()))


def _grammar(message: common_pb2.SamplingParams, limits: Limits) -> Grammar | None:
    """The grammar as it was sent. The worker compiles it, and refuses what is wrong in it."""
    if not message.HasField("grammar"):
        return None
    grammar = grammar_from_proto(message.grammar)
    if grammar is None or not grammar.text:
        raise InvalidRequest("sampling.grammar is empty: set json_schema or regex", field="sampling.grammar")
    length = len(grammar.text.encode())
    if length > limits.grammar_bytes:
        raise InvalidRequest(
            f"sampling.grammar has {length} bytes: at most {limits.grammar_bytes} are allowed", field="sampling.grammar"
        )
    if message.ignore_eos:
        raise _invalid("ignore_eos", True, "under a grammar an answer ends where nothing may follow; leave out one")
    return grammar


def _check_stop(stop: Collection[str], limits: Limits) -> None:
    if len(stop) > limits.stop_strings:
        raise InvalidRequest(
            f"sampling.stop has {len(stop)} strings: at most {limits.stop_strings} are allowed", field="sampling.stop"
        )
    for text in stop:
        length = len(text.encode())
        if not 1 <= length <= limits.stop_string_bytes:
            raise InvalidRequest(
                f"sampling.stop has a string of {length} bytes: it must be 1 to {limits.stop_string_bytes} bytes",
                field="sampling.stop",
            )


def derived_seed(request_id: str) -> int:
    """The seed of a call whose caller gave none: the same for a repeat, which so gives the same tokens."""
    return int.from_bytes(hashlib.blake2b(request_id.encode(), digest_size=8).digest(), "little")


def request_id(value: str, limits: Limits) -> str:
    """A checked request id; empty is allowed and means that the caller won't repeat the call."""
    length = len(value.encode())
    if length > limits.request_id_bytes:
        raise InvalidRequest(
            f"request_id has {length} bytes: at most {limits.request_id_bytes} are allowed", field="request_id"
        )
    if not value.isprintable():
        raise InvalidRequest(
            "request_id holds control characters: use printable ones, such as a UUID", field="request_id"
        )
    return value


def ttl_s(message: sessions_pb2.CreateRequest, limits: Limits) -> float:
    """The session's time to live in seconds."""
    if not message.HasField("ttl"):
        return limits.default_ttl_s
    seconds = message.ttl.seconds + message.ttl.nanos / 1e9
    if not limits.min_ttl_s <= seconds <= limits.max_ttl_s:
        raise InvalidRequest(
            f"ttl={seconds:g} s: it must be {limits.min_ttl_s:g} to {limits.max_ttl_s:g} s", field="ttl"
        )
    return seconds


def grace_s(message: Duration) -> float:
    """The grace of a drain in seconds."""
    seconds = message.seconds + message.nanos / 1e9
    if seconds < 0:
        raise InvalidRequest(f"grace={seconds:g} s: it can't be negative", field="grace")
    return seconds


def prompt_format(code: int) -> PromptFormat:
    """The prompt format; RAW when unspecified."""
    found = {int(each): value for each, value in PROMPT_FORMATS.items()}.get(code)
    if found is None:
        raise InvalidRequest(f"prompt_format={code}: use RAW or CHAT", field="prompt_format")
    return found


def on_miss(code: int) -> OnMiss:
    """What to do on a miss; RECOMPUTE when unspecified."""
    found = {int(each): value for each, value in ON_MISS.items()}.get(code)
    if found is None:
        raise InvalidRequest(f"on_miss={code}: use RECOMPUTE, FAIL or PARTIAL", field="on_miss")
    return found


def token_ids(ids: Collection[int], vocab_size: int, field: str) -> tuple[int, ...]:
    """Token ids of the model's vocabulary."""
    for token_id in ids:
        if token_id >= vocab_size:
            raise InvalidRequest(
                f"{field} holds {token_id}: the model's token ids are 0 to {vocab_size - 1}", field=field
            )
    return tuple(ids)


def document_text(data: bytes) -> str:
    """The text of a document.

    Raises:
        InvalidRequest: not UTF-8; the message says at which byte.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"the document is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start} ({error.reason}); "
            "send text encoded as UTF-8",
            field="data",
            reason="not_utf8",
            metadata={"byte_offset": str(error.start)},
        ) from None


def timestamp(unix_s: float) -> Timestamp:
    """Unix seconds as a message."""
    message = Timestamp()
    message.FromMilliseconds(round(unix_s * 1000))
    return message


def session_to_proto(record: SessionRecord) -> sessions_pb2.Session:
    """An idle session; the state and progress of a running call are the caller's to fill."""
    return sessions_pb2.Session(
        session_id=record.session_id,
        model=record.model,
        recipe=record.recipe,
        prompt_format=PROMPT_FORMAT_CODES[record.prompt_format],
        on_miss=ON_MISS_CODES[record.on_miss],
        num_tokens=len(record.token_ids),
        durable_tokens=record.durable_tokens,
        state=sessions_pb2.SESSION_STATE_IDLE,
        created_at=timestamp(record.created_at),
        expires_at=timestamp(record.expires_at),
        worker_id=record.worker_id,
        last_error=record.last_error,
        document_id=record.document_id,
        document_tokens=record.document_tokens,
    )
