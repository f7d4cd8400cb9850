"""Where a process tells what it does: Prometheus' metrics and a page, by HTTP. Knows no metric."""

from __future__ import annotations

import ipaddress
import logging
import threading
from collections.abc import Iterable
from urllib.parse import parse_qs
from wsgiref.simple_server import WSGIServer
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from prometheus_client import CollectorRegistry, make_wsgi_app, start_http_server
from prometheus_client.registry import Collector

from kvservice.errors import ConfigError
from kvservice.telemetry.page import HTML_PATH, JSON_PATH, AdminPage

logger = logging.getLogger(__name__)

METRICS_PATH = "/metrics"
# No other page may embed, read or guess at what is sent.
_HEADERS = [
    ("Cache-Control", "no-store"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Referrer-Policy", "no-referrer"),
    ("X-Content-Type-Options", "nosniff"),
]


class MetricsEndpoint:
    """`http://HOST:PORT/metrics` of one process, for all of its parts, and a page at `/`."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        """`registry`: of what is counted already."""
        self._registry = registry or CollectorRegistry()
        self._server: WSGIServer | None = None
        self._thread: threading.Thread | None = None
        self._page: AdminPage | None = None

    def add(self, collector: Collector) -> None:
        """Shows one part more."""
        self._registry.register(collector)

    def show(self, page: AdminPage) -> None:
        """Has `page` at `/`, from the start of the endpoint to its end."""
        self._page = page

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
        if self._page is not None:
            self._page.start()
        self._server.set_app(_application(self._registry, self._page, is_local=_is_loopback(host)))
        address = f"{host}:{self._server.server_port}"
        logger.info("metrics_started", extra={"address": address})
        return address

    def close(self) -> None:
        """Ends the threads and frees the port. Does nothing if it wasn't started."""
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server = None
            if self._page is not None:
                self._page.close()


def _application(registry: CollectorRegistry, page: AdminPage | None, *, is_local: bool) -> WSGIApplication:
    # Its own annotation of what it gives is wider.
    metrics: WSGIApplication = make_wsgi_app(registry)

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        # A foreign name that was made to lead here would let its page read what is meant for this machine.
        if is_local and not _is_loopback(_host_name(environ.get("HTTP_HOST", ""))):
            return _plain(start_response, "421 Misdirected Request", b"call it by a name of this machine's loopback\n")
        path = environ["PATH_INFO"]
        if path == METRICS_PATH or page is None:
            return metrics(environ, start_response)
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return _plain(start_response, "405 Method Not Allowed", b"only GET\n")
        if path == HTML_PATH:
            content, headers = page.html()
        elif path == JSON_PATH:
            content, headers = page.json(_since(environ)), [("Content-Type", "application/json")]
        else:
            return _plain(start_response, "404 Not Found", b"there are /, /page.json and /metrics\n")
        start_response("200 OK", [*headers, *_HEADERS])
        return [content]

    return answer


def _plain(start_response: StartResponse, status: str, text: bytes) -> Iterable[bytes]:
    start_response(status, [("Content-Type", "text/plain; charset=utf-8"), *_HEADERS])
    return [text]


def _since(environ: WSGIEnvironment) -> int:
    values = parse_qs(environ.get("QUERY_STRING", "")).get("since", [])
    return int(values[0]) if values and values[0].isdecimal() and len(values[0]) < 16 else 0


def _host_name(header: str) -> str:
    """Without the port."""
    return header[1:].partition("]")[0] if header.startswith("[") else header.partition(":")[0]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
