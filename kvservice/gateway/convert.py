"""Public messages to and from the service's nouns, and all checks that need the message alone. Knows no session."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from kvservice.config.limits import Limits
from kvservice.errors import InvalidRequest, NotImplementedYet
from kvservice.internal.convert import ON_MISS, ON_MISS_CODES, PROMPT_FORMAT_CODES, PROMPT_FORMATS
from kvservice.store.base import SessionRecord
from kvservice.types import OnMiss, PromptFormat, SamplingParams
from kvservice.v1 import common_pb2, sessions_pb2

_DEFAULTS = SamplingParams()
_NEUTRAL = {"typical_p": 1.0, "repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}


def sampling(message: common_pb2.SamplingParams, limits: Limits, *, seed: int) -> SamplingParams:
    """The sampling parameters in force; `seed` where the caller gave none.

    Raises:
        InvalidRequest: a value no release could accept; `field` names it.
        NotImplementedYet: a value that this release doesn't implement.
    """
    _refuse_unimplemented(message)
    _check_stop(message.stop, limits)
    max_new_tokens = limits.default_new_tokens
    if message.HasField("max_new_tokens"):
        max_new_tokens = message.max_new_tokens
        if not 1 <= max_new_tokens <= limits.max_new_tokens:
            raise _invalid("max_new_tokens", max_new_tokens, f"it must be 1 to {limits.max_new_tokens}")
    return SamplingParams(
        temperature=_number(message, "temperature", _DEFAULTS.temperature, 0.0, limits.max_temperature),
        top_k=message.top_k if message.HasField("top_k") else _DEFAULTS.top_k,
        top_p=_number(message, "top_p", _DEFAULTS.top_p, 0.0, 1.0, least_allowed=False),
        min_p=_number(message, "min_p", _DEFAULTS.min_p, 0.0, 1.0),
        seed=message.seed if message.HasField("seed") else seed,
        max_new_tokens=max_new_tokens,
        stop=tuple(message.stop),
        ignore_eos=message.ignore_eos,
    )


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


def _refuse_unimplemented(message: common_pb2.SamplingParams) -> None:
    for name, neutral in _NEUTRAL.items():
        value: float = getattr(message, name)
        if not message.HasField(name) or value == neutral:  # type: ignore[arg-type] # the name of a field
            continue
        if not math.isfinite(value) or (neutral == 1.0 and value <= 0.0):
            raise _invalid(name, value, "it must be a finite number" + (" above 0" if neutral == 1.0 else ""))
        raise _not_yet(name, f"this release takes {neutral:g} only")
    if message.HasField("n"):
        if message.n == 0:
            raise _invalid("n", 0, "it must be 1")
        if message.n > 1:
            raise _not_yet("n", "this release gives one answer; make the call again with another seed")
    if message.logprobs:
        raise _not_yet("logprobs", "leave it unset")
    if message.logit_bias:
        raise _not_yet("logit_bias", "leave it empty")
    if message.HasField("grammar"):
        raise _not_yet("grammar", "leave it unset")


def _not_yet(name: str, rule: str) -> NotImplementedYet:
    return NotImplementedYet(f"sampling.{name} is not implemented yet: {rule}", field=f"sampling.{name}")


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
    )
