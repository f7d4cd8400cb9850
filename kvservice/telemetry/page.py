"""A page for operators: what a process's stats say, now and over the last hour. Doesn't know who has them.

One HTML file with its script and style inside, and the figures as JSON. The policy it is sent with allows that script
and that style by their hashes, and nothing from elsewhere.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from importlib import resources

from kvservice.v1 import admin_pb2

logger = logging.getLogger(__name__)

Json = dict[str, object]
ReadStats = Callable[[], admin_pb2.GetStatsResponse | None]
"""May block; None when there is nothing to be had at the moment."""

INTERVAL_S = 5.0
KEEPS_S = 3600.0

HTML_PATH = "/"
JSON_PATH = "/page.json"


class AdminPage:
    """Looks at the stats every few seconds, on a thread of its own, and keeps what changes of them for an hour.

    Args:
        process: what it is of, `gateway` or `worker`.
        read: gives the stats.
        interval_s: seconds between two looks.
        clock: unix seconds.
    """

    def __init__(
        self, process: str, read: ReadStats, interval_s: float = INTERVAL_S, clock: Callable[[], float] = time.time
    ) -> None:
        self._process = process
        self._read = read
        self._interval_s = interval_s
        self._clock = clock
        self._html = resources.files("kvservice.telemetry").joinpath("page.html").read_bytes()
        self._policy = _policy(self._html.decode())
        self._lock = threading.Lock()
        self._now: Json | None = None
        self._history: deque[Json] = deque(maxlen=max(1, round(KEEPS_S / interval_s)))
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begins to look."""
        self._thread = threading.Thread(target=self._run, name="admin-page", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread; waits for a look under way."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def look(self) -> None:
        """Takes one sample."""
        stats = self._read()
        if stats is None:
            return
        at = round(self._clock() * 1000)
        with self._lock:
            self._now = _now(self._process, at, stats)
            self._history.append(_sample(at, stats))

    def html(self) -> tuple[bytes, list[tuple[str, str]]]:
        """The page and its headers."""
        return self._html, [("Content-Type", "text/html; charset=utf-8"), ("Content-Security-Policy", self._policy)]

    def json(self, since_ms: int) -> bytes:
        """What the page shows: the last sample in full, and of those after `since_ms` (unix time) what is drawn."""
        with self._lock:
            now = self._now or _now(self._process, round(self._clock() * 1000), admin_pb2.GetStatsResponse())
            history = [sample for sample in self._history if _time(sample) > since_ms]
        found = {**now, "interval_s": self._interval_s, "keeps_s": KEEPS_S, "history": history}
        return json.dumps(found, separators=(",", ":")).encode()

    def _run(self) -> None:
        while not self._stopped.wait(self._interval_s if self._now else 0.2):
            try:
                self.look()
            except Exception:
                # The page is the least of a process's duties.
                logger.exception("page_look_failed")


def _time(sample: Json) -> int:
    at = sample["t"]
    assert isinstance(at, int)
    return at


def _now(process: str, at: int, stats: admin_pb2.GetStatsResponse) -> Json:
    return {
        "t": at,
        "process": process,
        "version": stats.version,
        "draining": stats.draining,
        "running": stats.running_calls,
        "waiting": stats.waiting_calls,
        "workers": [_worker(worker) for worker in stats.workers],
        "tenants": [_tenant(tenant) for tenant in stats.tenants],
    }


def _sample(at: int, stats: admin_pb2.GetStatsResponse) -> Json:
    return {
        "t": at,
        "running": stats.running_calls,
        "waiting": stats.waiting_calls,
        "workers": {worker.worker_id: _drawn(worker) for worker in stats.workers},
    }


def _drawn(worker: admin_pb2.WorkerStats) -> Json:
    """What of a worker is drawn over time."""
    held = worker.bytes
    return {
        "weights": worker.weight_bytes,
        "window": held.device_window,
        "index": held.device_index,
        "slots": held.device_slots,
        "workspace": held.device_workspace,
        "host": held.host,
        "redis": held.redis,
        "lookups": worker.recall_lookups,
        "hits": worker.recall_hits,
    }


def _worker(worker: admin_pb2.WorkerStats) -> Json:
    return {
        **_drawn(worker),
        "id": worker.worker_id,
        "model": worker.model,
        "device": worker.device,
        "device_capacity": worker.device_capacity_bytes,
        "device_free": worker.device_free_bytes,
        "host_capacity": worker.host_capacity_bytes,
        "host_free": worker.host_free_bytes,
        "sessions": worker.resident_sessions,
        "parked": worker.parked_sessions,
        "stored_sessions": worker.ledger.held_sessions,
        "running": worker.running_calls,
        "prefill_tokens_per_s": worker.prefill_tokens_per_s,
        "decode_tokens_per_s": worker.decode_tokens_per_s,
        "swapped_out": worker.swapped_out,
        "forgotten": worker.forgotten,
        "idle_swapped_out": worker.idle_swapped_out,
        "idle_dropped": worker.idle_dropped,
        "fetched_sessions": worker.ledger.resumed.fetched_sessions,
        "recomputed_sessions": worker.ledger.resumed.recomputed_sessions,
        "redis_connected": worker.tier.connected,
        "pending_frames": worker.tier.pending_frames,
        "redis_failures": sum(worker.tier.failures.values()),
    }


def _tenant(tenant: admin_pb2.TenantStats) -> Json:
    limits: Json = {
        "requests_per_minute": tenant.requests_per_minute if tenant.HasField("requests_per_minute") else None,
        "tokens_per_minute": tenant.tokens_per_minute if tenant.HasField("tokens_per_minute") else None,
        "concurrent_calls": tenant.concurrent_calls if tenant.HasField("concurrent_calls") else None,
        "document_tokens": tenant.document_tokens if tenant.HasField("document_tokens") else None,
    }
    return {
        "tenant": tenant.tenant,
        "requests": tenant.requests,
        "refused": tenant.refused,
        "tokens": tenant.tokens,
        "running": tenant.running_calls,
        **limits,
    }


def _policy(html: str) -> str:
    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", html, flags=re.DOTALL)
        digests = (hashlib.sha256(each.encode()).digest() for each in found)
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
