"""Every error that a caller may see. Knows nothing of gRPC but the names of its status codes.

KVServiceError
├── InvalidRequest          INVALID_ARGUMENT     the request itself is wrong
│   └── PromptTooLong       INVALID_ARGUMENT     more tokens than the model has positions
├── NotFound                NOT_FOUND            session, model, recipe or worker
├── Unauthenticated         UNAUTHENTICATED      no key, or an unknown one
├── PermissionDenied        PERMISSION_DENIED    the key's role doesn't allow it
├── Conflict                ABORTED              lost update, or another call is changing the session
├── FailedPrecondition      FAILED_PRECONDITION  the state it needs is gone
│   └── BudgetTooSmall      FAILED_PRECONDITION  one sequence can never fit
├── Overloaded              RESOURCE_EXHAUSTED   no room now; try again
├── LimitExceeded           RESOURCE_EXHAUSTED   a limit of the service or of the tenant
├── QuotaExceeded           RESOURCE_EXHAUSTED   a tenant's quota; it is free again later
├── Unavailable             UNAVAILABLE          draining, or no worker
├── DeadlineExceeded        DEADLINE_EXCEEDED
├── NotImplementedYet       UNIMPLEMENTED        named in the API, not in this release
├── ConfigError             (start)              a setting is wrong; exit code 2
├── ModelError              (start)              a model folder can't be loaded
├── CorruptFrame            (inside)             bytes of a tier that fail their checks: a miss, never an answer
└── InternalError           INTERNAL             a fault of ours
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class KVServiceError(Exception):
    """Base of all errors of the service.

    Attributes:
        status: name of the gRPC status code.
        reason: short machine-readable cause, stable between releases.
        retryable: whether the same call may succeed later.
        field: request field at fault, if one is.
        retry_after_s: when to try again, if known.
        metadata: facts a program may act on, such as the true number of tokens.
    """

    status: ClassVar[str] = "INTERNAL"
    retryable: ClassVar[bool] = False
    default_reason: ClassVar[str] = "internal"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        field: str | None = None,
        retry_after_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.field = field
        self.retry_after_s = retry_after_s
        self.metadata = dict(metadata or {})


class InvalidRequest(KVServiceError):
    """The request can't be served as it is; `field` names the part at fault."""

    status = "INVALID_ARGUMENT"
    default_reason = "invalid_request"


class PromptTooLong(InvalidRequest):
    """More tokens than the model has positions."""

    default_reason = "prompt_too_long"


class NotFound(KVServiceError):
    """No such session (of this tenant), model, recipe or worker."""

    status = "NOT_FOUND"
    default_reason = "not_found"


class Unauthenticated(KVServiceError):
    """No API key, or one that isn't in the key file."""

    status = "UNAUTHENTICATED"
    default_reason = "unauthenticated"


class PermissionDenied(KVServiceError):
    """The key's role doesn't allow the call."""

    status = "PERMISSION_DENIED"
    default_reason = "permission_denied"


class Conflict(KVServiceError):
    """Another call changes the session, or it isn't in the state the caller expected."""

    status = "ABORTED"
    retryable = True
    default_reason = "conflict"


class FailedPrecondition(KVServiceError):
    """What the call needs has been dropped, or was never there."""

    status = "FAILED_PRECONDITION"
    default_reason = "failed_precondition"


class BudgetTooSmall(FailedPrecondition):
    """The sequence doesn't fit in the byte budget even when it is alone."""

    default_reason = "budget_too_small"


class Overloaded(KVServiceError):
    """There is no room at the moment."""

    status = "RESOURCE_EXHAUSTED"
    retryable = True
    default_reason = "overloaded"


TENANT_ANSWERS = "tenant_answers"
"""Reason of an Overloaded: the tenant has all that it may have of a worker at a time; other tenants' calls may pass."""


class LimitExceeded(KVServiceError):
    """A limit of the service, of the tenant or of a message."""

    status = "RESOURCE_EXHAUSTED"
    default_reason = "limit_exceeded"


QUOTA_KEY = "quota"
"""In `metadata` of an error: the tenant's quota that was met. On the wire it becomes a QuotaFailure as well."""


class QuotaExceeded(KVServiceError):
    """A tenant has used what it may use in a minute, or at a time; `metadata` names the quota."""

    status = "RESOURCE_EXHAUSTED"
    retryable = True
    default_reason = "quota_exceeded"


class Unavailable(KVServiceError):
    """The service is draining, or no worker can be reached."""

    status = "UNAVAILABLE"
    retryable = True
    default_reason = "unavailable"


class DeadlineExceeded(KVServiceError):
    """The caller's deadline passed."""

    status = "DEADLINE_EXCEEDED"
    default_reason = "deadline_exceeded"


def hopeless(needed_s: float, left_s: float) -> DeadlineExceeded:
    """The deadline hasn't passed, and can't be met any more: better to say so now."""
    return DeadlineExceeded(
        f"the deadline is in {max(0.0, left_s):.3g} s, and reading alone is predicted to take {needed_s:.3g} s: "
        "nothing was computed; give it more time, or send fewer tokens",
        reason="deadline_unreachable",
        metadata={"predicted_s": f"{needed_s:.3f}", "left_s": f"{max(0.0, left_s):.3f}"},
    )


class NotImplementedYet(KVServiceError):
    """Part of the API that this release doesn't implement."""

    status = "UNIMPLEMENTED"
    default_reason = "unimplemented"


class ConfigError(KVServiceError):
    """A setting or a file of settings is wrong; the command ends with exit code 2."""

    status = "INVALID_ARGUMENT"
    default_reason = "config"


class ModelError(KVServiceError):
    """A model folder is missing, damaged or of a kind the runner doesn't do."""

    status = "FAILED_PRECONDITION"
    default_reason = "model"


class CorruptFrame(KVServiceError):
    """Bytes read from a tier fail a check; to the reader they are a miss."""

    default_reason = "corrupt_frame"


class InternalError(KVServiceError):
    """A fault of the service itself."""


# What crosses a wire; of each status the general class comes first.
_ON_THE_WIRE: tuple[type[KVServiceError], ...] = (
    InvalidRequest,
    PromptTooLong,
    NotFound,
    Unauthenticated,
    PermissionDenied,
    Conflict,
    FailedPrecondition,
    BudgetTooSmall,
    Overloaded,
    LimitExceeded,
    QuotaExceeded,
    Unavailable,
    DeadlineExceeded,
    NotImplementedYet,
    InternalError,
)


def error_class(status: str, reason: str, *, retryable: bool) -> type[KVServiceError]:
    """The class as which an error that came over a wire is raised again. An unknown status is a fault of ours."""
    same_status = [cls for cls in _ON_THE_WIRE if cls.status == status]
    for cls in same_status:
        if cls.default_reason == reason:
            return cls
    for cls in same_status:
        if cls.retryable == retryable:
            return cls
    return same_status[0] if same_status else InternalError
