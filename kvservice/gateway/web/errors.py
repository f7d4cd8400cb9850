"""Errors as HTTP answers in OpenAI's form. Knows nothing of what was asked.

`x-should-retry` is what OpenAI's own clients go by, so that a limit isn't asked again and a busy session is.
"""

from __future__ import annotations

import math

from kvservice.errors import KVServiceError

STATUSES = {
    "INVALID_ARGUMENT": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "ABORTED": 409,
    "FAILED_PRECONDITION": 400,
    "RESOURCE_EXHAUSTED": 429,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
    "UNIMPLEMENTED": 501,
    "INTERNAL": 500,
}
BODY_TOO_LARGE = "body_too_large"
UPLOAD_TOO_SLOW = "upload_too_slow"
WRONG_CONTENT_TYPE = "wrong_content_type"
NO_SUCH_METHOD = "method_not_allowed"
_BY_REASON = {BODY_TOO_LARGE: 413, UPLOAD_TOO_SLOW: 408, WRONG_CONTENT_TYPE: 415, NO_SUCH_METHOD: 405}

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}
# What programs look for, where OpenAI has a word of its own for it.
_CODES = {
    "prompt_too_long": "context_length_exceeded",
    "unknown_model": "model_not_found",
    "unauthenticated": "invalid_api_key",
}
_PARAMS = {"max_new_tokens": "max_tokens", "grammar": "response_format", "prompt_token_ids": "prompt"}


def http_status(error: KVServiceError) -> int:
    """The status of the answer."""
    return _BY_REASON.get(error.reason, STATUSES[error.status])


def error_headers(error: KVServiceError) -> dict[str, str]:
    """What tells a client whether to try again, and when."""
    headers = {"x-should-retry": "true" if error.retryable else "false"}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
        headers["Retry-After-Ms"] = str(math.ceil(error.retry_after_s * 1000))
    if error.status == "UNAUTHENTICATED":
        headers["WWW-Authenticate"] = "Bearer"
    return headers


def error_body(error: KVServiceError) -> dict[str, object]:
    """The body of the answer, or the last event of a stream that broke."""
    status = http_status(error)
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    param = error.field.removeprefix("sampling.") if error.field is not None else None
    return {
        "error": {
            "message": error.message,
            "type": kind,
            "param": _PARAMS.get(param, param) if param is not None else None,
            "code": _CODES.get(error.reason, error.reason),
            "metadata": error.metadata,
        }
    }
