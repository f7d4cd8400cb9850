"""Statuses back to the errors they were made from. The inverse of the gateway's interceptor."""

from __future__ import annotations

import grpc
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status  # type: ignore[import-untyped]

from kvservice.errors import KVServiceError, Unavailable, error_class


def error_from_rpc(error: grpc.aio.AioRpcError, address: str) -> KVServiceError:
    """The error that the service raised; one of the transport is Unavailable."""
    code = error.code().name
    try:
        status = rpc_status.from_call(error)
    except ValueError:
        # grpc itself ended the call, after the service had: what came with it is of another status.
        status = None
    if status is None:
        # Nothing of ours: grpc itself, on one side or the other.
        if code in ("UNAVAILABLE", "CANCELLED"):
            return Unavailable(
                f"{address} can't be reached or broke the connection ({error.details()}); is the service running there?"
            )
        return error_class(code, "", retryable=False)(error.details() or code)
    info, retry, request = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.RetryInfo(),
        error_details_pb2.BadRequest(),
    )
    retry_after_s: float | None = None
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(request)
        if detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToMilliseconds() / 1000
    metadata = dict(info.metadata)
    retryable = metadata.pop("retryable", "false") == "true"
    violations = request.field_violations
    return error_class(code, info.reason, retryable=retryable)(
        status.message,
        reason=info.reason or None,
        field=violations[0].field if violations else None,
        retry_after_s=retry_after_s,
        metadata=metadata,
    )
