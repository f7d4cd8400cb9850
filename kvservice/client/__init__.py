"""The async client: sessions, questions, answers, over gRPC. Its results are plain dataclasses."""

from __future__ import annotations

from kvservice.client.client import Client
from kvservice.client.local import LocalService
from kvservice.client.results import (
    Alternative,
    Answer,
    AppendResult,
    Event,
    Finished,
    LedgerReport,
    ServiceStats,
    SessionInfo,
    SessionState,
    Started,
    StoredReport,
    TenantReport,
    TierReport,
    Timings,
    TokenCount,
    TokenLogprobs,
    Tokens,
    WorkerReport,
)
from kvservice.client.retry import RetryPolicy
from kvservice.client.sampling import Sampling

__all__ = [
    "Alternative",
    "Answer",
    "AppendResult",
    "Client",
    "Event",
    "Finished",
    "LedgerReport",
    "LocalService",
    "RetryPolicy",
    "Sampling",
    "ServiceStats",
    "SessionInfo",
    "SessionState",
    "Started",
    "StoredReport",
    "TenantReport",
    "TierReport",
    "Timings",
    "TokenCount",
    "TokenLogprobs",
    "Tokens",
    "WorkerReport",
]
