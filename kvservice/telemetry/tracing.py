"""Traces across processes, by OpenTelemetry (W3C trace context). Knows nothing of what is traced.

Off until `start_tracing` is called: then `span` and `traceparent` return at once, and OpenTelemetry isn't even loaded.
Spans hold ids, names, counts and times, never text of users or keys.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Tracer

Attribute = str | int | float | bool
Attributes = Mapping[str, Attribute]

CONSOLE = "console"
TRACEPARENT = "traceparent"
"""The one header that is read and sent."""


class Tracing:
    """The tracer of one process, or none."""

    def __init__(self) -> None:
        self._tracer: Tracer | None = None
        self._provider: TracerProvider | None = None

    @property
    def is_on(self) -> bool:
        """Whether spans are made."""
        return self._tracer is not None

    def start(self, service: str, target: str, ratio: float, exporter: SpanExporter | None = None) -> None:
        """Begins to trace.

        Args:
            service: name of this process in traces.
            target: `console` for standard error, else the URL of an OTLP collector (gRPC).
            ratio: of the traces that are kept, chosen by their ids, so that processes of one ratio keep the same ones;
                a caller may have its trace left out, not have more of them kept.
            exporter: instead of that of `target`.
        """
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

        kept = TraceIdRatioBased(ratio)
        provider = TracerProvider(
            sampler=ParentBased(kept, remote_parent_sampled=kept),
            resource=Resource.create({"service.name": service}),
            shutdown_on_exit=False,
        )
        provider.add_span_processor(BatchSpanProcessor(exporter or _exporter(target)))
        self._provider = provider
        self._tracer = provider.get_tracer("kvservice")

    def stop(self) -> None:
        """Sends what is left. May block for some seconds."""
        if self._provider is not None:
            self._provider.shutdown()
        self._tracer = self._provider = None

    @contextmanager
    def span(self, name: str, parent: str = "", **attributes: Attribute) -> Iterator[Callable[[Attributes], None]]:
        """The time of the block; gives a function that adds attributes.

        It is a child of `parent` (a `traceparent` from elsewhere), else of the span around it. An error that leaves the
        block marks it, by its class alone.
        """
        if self._tracer is None:
            yield _ignore
            return
        from opentelemetry.trace import Status, StatusCode

        with self._tracer.start_as_current_span(
            name, _context(parent), attributes=attributes, record_exception=False, set_status_on_exception=False
        ) as span:
            try:
                yield span.set_attributes
            except Exception as error:
                span.set_status(Status(StatusCode.ERROR, type(error).__name__))
                raise

    def traceparent(self) -> str:
        """The current span, for another process; empty when there is none."""
        return "" if self._tracer is None else current_traceparent()

    @contextmanager
    def within(self, parent: str) -> Iterator[None]:
        """Spans that are begun in the block, and in tasks that it begins, are below `parent`, if that isn't empty."""
        context = _context(parent) if self._tracer is not None else None
        if context is None:
            yield
            return
        from opentelemetry.context import attach, detach

        token = attach(context)
        try:
            yield
        finally:
            detach(token)

    def begin(self, name: str, parent: str, **attributes: Attribute) -> OpenSpan | None:
        """A span that ends elsewhere; None when nothing is traced or `parent` is empty."""
        if self._tracer is None or not parent:
            return None
        return OpenSpan(self._tracer, name, parent, attributes)


class OpenSpan:
    """A span that is ended by hand, in whichever thread."""

    def __init__(self, tracer: Tracer, name: str, parent: str, attributes: Attributes) -> None:
        self._tracer = tracer
        self._span = tracer.start_span(name, _context(parent), attributes=dict(attributes))

    @property
    def traceparent(self) -> str:
        """Of this span, for those below it."""
        from opentelemetry.trace import set_span_in_context

        return _traceparent(set_span_in_context(self._span))

    def phase(self, name: str, start_ns: int, end_ns: int) -> None:
        """A part of it that is over; unix nanoseconds."""
        from opentelemetry.trace import set_span_in_context

        self._tracer.start_span(name, set_span_in_context(self._span), start_time=start_ns).end(end_ns)

    def end(self, attributes: Attributes, error: str = "") -> None:
        """Ends it; `error` is the reason of its failure."""
        from opentelemetry.trace import Status, StatusCode

        self._span.set_attributes(attributes)
        if error:
            self._span.set_status(Status(StatusCode.ERROR, error))
        self._span.end()


TRACING = Tracing()
"""Of this process; off until it is started. A registry of one, as loggers are."""


def current_traceparent() -> str:
    """The span that this program is in, whoever began it; empty without one, or where OpenTelemetry isn't in use."""
    return _traceparent(None) if "opentelemetry.trace" in sys.modules else ""


def _traceparent(context: Context | None) -> str:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier, context)
    return carrier.get(TRACEPARENT, "")


def _ignore(attributes: Attributes) -> None:
    del attributes


def _context(parent: str) -> Context | None:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({TRACEPARENT: parent}) if parent else None


def _exporter(target: str) -> SpanExporter:
    if target == CONSOLE:
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return ConsoleSpanExporter(out=sys.stderr, formatter=lambda span: span.to_json(indent=None) + "\n")
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter(endpoint=target, insecure=target.startswith("http://"))
