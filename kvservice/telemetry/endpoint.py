"""Where Prometheus reads a process's metrics: HTTP, on a thread of its own. Knows no metric."""

from __future__ import annotations

import logging
import threading
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.registry import Collector

from kvservice.errors import ConfigError

logger = logging.getLogger(__name__)


class MetricsEndpoint:
    """`http://HOST:PORT/metrics` of one process, for all of its parts."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        """`registry`: of what is counted already."""
        self._registry = registry or CollectorRegistry()
        self._server: WSGIServer | None = None
        self._thread: threading.Thread | None = None

    def add(self, collector: Collector) -> None:
        """Shows one part more."""
        self._registry.register(collector)

    def start(self, host: str, port: int) -> str:
        """Listens; gives the address. Port 0 takes a free one.

        Raises:
            ConfigError: the port is taken.
        """
        try:
            self._server, self._thread = start_http_server(port, host, self._registry)
        except OSError as error:
            raise ConfigError(
                f"metrics_port={port}: can't listen on {host}:{port}: {error.strerror}; choose another, or 0",
                field="metrics_port",
            ) from None
        address = f"{host}:{self._server.server_port}"
        logger.info("metrics_started", extra={"address": address})
        return address

    def close(self) -> None:
        """Ends the thread and frees the port. Does nothing if it wasn't started."""
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server = None
