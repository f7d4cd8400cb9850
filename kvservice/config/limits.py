"""Every limit of the public API, and the status beyond it. Knows nothing of how limits are checked.

`docs/limits.md` holds the table that `limits_table()` gives; a test compares them.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


def _limit(default: float, answers: str, description: str, **bounds: float) -> Any:  # noqa: ANN401 - as pydantic's Field
    return Field(default, description=description, json_schema_extra={"answers": answers}, **bounds)  # type: ignore[call-overload]


class Limits(BaseModel):
    """What a caller may ask for. Bytes, tokens, seconds and counts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    message_bytes: int = _limit(
        4 * 1024 * 1024,
        "RESOURCE_EXHAUSTED",
        "One message to the service; longer documents go as several chunks of an Append.",
        ge=64 * 1024,
    )
    http_body_bytes: int = _limit(
        16 * 1024 * 1024, "RESOURCE_EXHAUSTED", "The body of one HTTP request; answered by 413.", ge=64 * 1024
    )
    document_bytes: int = _limit(
        16 * 1024 * 1024, "RESOURCE_EXHAUSTED", "Text of one Append, all its chunks together.", ge=1
    )
    document_tokens: int = _limit(1_000_000, "RESOURCE_EXHAUSTED", "Tokens of one Append.", ge=1)
    max_new_tokens: int = _limit(4096, "INVALID_ARGUMENT", "`sampling.max_new_tokens` of one answer.", ge=1)
    default_new_tokens: int = _limit(
        256, "-", "Tokens of one answer when `max_new_tokens` is not set; fewer where the model ends.", ge=1
    )
    stop_strings: int = _limit(8, "INVALID_ARGUMENT", "Strings in `sampling.stop`.", ge=0)
    stop_string_bytes: int = _limit(64, "INVALID_ARGUMENT", "UTF-8 bytes of one string in `sampling.stop`.", ge=1)
    max_temperature: float = _limit(10.0, "INVALID_ARGUMENT", "`sampling.temperature`.", gt=0)
    answers: int = _limit(8, "INVALID_ARGUMENT", "`sampling.n`: answers to one prompt.", ge=1)
    logprobs: int = _limit(20, "INVALID_ARGUMENT", "`sampling.logprobs`.", ge=0)
    logit_biases: int = _limit(1024, "INVALID_ARGUMENT", "Entries of `sampling.logit_bias`, each of -100 to 100.", ge=0)
    grammar_bytes: int = _limit(
        16 * 1024, "INVALID_ARGUMENT", "UTF-8 bytes of `sampling.grammar`; a worker may refuse a complex one too.", ge=1
    )
    request_id_bytes: int = _limit(128, "INVALID_ARGUMENT", "UTF-8 bytes of a `request_id`.", ge=1)
    request_memory_s: float = _limit(
        600.0, "-", "How long the outcome of a `request_id` is kept; later the call is carried out again.", gt=0
    )
    sessions_per_tenant: int = _limit(1000, "RESOURCE_EXHAUSTED", "Open sessions of one tenant.", ge=1)
    min_ttl_s: float = _limit(60.0, "INVALID_ARGUMENT", "Least `ttl` of a session.", gt=0)
    max_ttl_s: float = _limit(7 * 86_400.0, "INVALID_ARGUMENT", "Greatest `ttl` of a session.", gt=0)
    default_ttl_s: float = _limit(86_400.0, "-", "`ttl` of a session that was created without one.", gt=0)
    page_size: int = _limit(1000, "INVALID_ARGUMENT", "Sessions in one page of List.", ge=1)
    default_page_size: int = _limit(100, "-", "Sessions in one page of List when `page_size` is 0.", ge=1)
    waiting_calls: int = _limit(
        256, "RESOURCE_EXHAUSTED", "Calls that wait for room on a worker; a further one is refused at once.", ge=0
    )
    upload_idle_s: float = _limit(
        60.0,
        "DEADLINE_EXCEEDED",
        "Time between two messages of an Append that is being uploaded, and for the one message of another call.",
        gt=0,
    )
    header_s: float = _limit(
        15.0,
        "-",
        "Time for a connection's handshakes, and for the headers of an HTTP request; then it is closed (HTTP: 408).",
        gt=0,
    )
    connections: int = _limit(
        1000, "-", "Connections to each port of the public API; a further one is closed (HTTP: 503).", ge=1
    )
    connections_per_address: int = _limit(
        500, "-", "Connections of one address to the HTTP port; a further one is answered by 503.", ge=1
    )
    streams_per_connection: int = _limit(
        512, "-", "Calls at a time on one gRPC connection; further ones wait in the client.", ge=1
    )


# Limits that a model sets, not the operator.
_MODEL_ROWS = (
    (
        "tokens of a session, with those of the call and `max_new_tokens`",
        "the model's `max_positions`",
        "INVALID_ARGUMENT (`prompt_too_long`)",
        "See ListModels.",
    ),
    (
        "bytes of one sequence",
        "`--kv-bytes` and `--host-bytes` of a worker",
        "FAILED_PRECONDITION (`budget_too_small`)",
        "What one sequence takes under its recipe; `kvservice size` computes it.",
    ),
)


def _quantity(name: str, value: float) -> str:
    if name.endswith("_bytes") and value % (1024 * 1024) == 0:
        return f"{int(value) // (1024 * 1024)} MiB"
    text = f"{value:,.10g}" if value == int(value) else f"{value:g}"
    return f"{text} s" if name.endswith("_s") else text


def limits_table() -> str:
    """The limits with their defaults, as a Markdown table."""
    rows = ["| limit | default | beyond it | meaning |", "|---|---|---|---|"]
    for name, field in Limits.model_fields.items():
        extra = field.json_schema_extra
        answers = extra["answers"] if isinstance(extra, dict) else "-"
        rows.append(f"| `{name}` | {_quantity(name, field.default)} | {answers} | {field.description} |")
    rows += [f"| {name} | {default} | {answers} | {meaning} |" for name, default, answers, meaning in _MODEL_ROWS]
    return "\n".join(rows)
