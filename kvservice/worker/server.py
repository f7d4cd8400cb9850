"""A worker from start to stop: port, engine, lease, health, drain.

Knows nothing of models: the caller gives an engine factory and a tokenizer.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

from kvservice.config.worker import WorkerConfig
from kvservice.errors import ConfigError, Unavailable
from kvservice.internal.tls import PemFiles, server_credentials
from kvservice.internal.v1 import worker_pb2
from kvservice.internal.v1.worker_pb2_grpc import add_WorkerServiceServicer_to_server
from kvservice.types import Grammar, ModelInfo, WorkerId, WorkerStats
from kvservice.v1 import admin_pb2
from kvservice.worker.grammars import GrammarDesk
from kvservice.worker.loop import EngineLike, EngineLoop
from kvservice.worker.registration import LeaseStore, Registration
from kvservice.worker.servicer import Identity, Servicer, TokenizerLike
from kvservice.worker.stored import StoredKv

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 64 * 2**20
"""Of the internal channel. A gateway sets the same."""

SERVICE_NAME = worker_pb2.DESCRIPTOR.services_by_name["WorkerService"].full_name
"""The name under which grpc.health.v1 knows the service."""

TOKENIZER_THREADS = 2

STREAMS_END_S = 2.0
"""How long a gateway has to read its last messages when the worker stops."""

_SERVER_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Else a second worker on the same port would start, and share its connections.
    ("grpc.so_reuseport", 0),
    # Gateways look often whether we live; one that doesn't answer us is lost, and its calls are cancelled.
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)


class WorkerServer:
    """One engine behind the internal gRPC service.

    Runs in the event loop that calls `start`: alone, or beside a gateway. All methods are for that loop.
    """

    def __init__(
        self,
        config: WorkerConfig,
        engine_factory: Callable[[], EngineLike],
        tokenizer: TokenizerLike,
        store: LeaseStore,
        compile_grammar: Callable[[Grammar], object] | None = None,
        stored: StoredKv | None = None,
    ) -> None:
        """`engine_factory` is called once, in the engine's own thread. The caller closes `store`.

        `stored` is started and stopped with the worker; without it nothing of a session's KV is published.

        `compile_grammar` is called in a thread beside, so that the engine finds what it has made, or that it refused it
        with InvalidRequest.
        """
        self._config = config
        self._worker_id = WorkerId(config.worker_id)
        self._tokenizer = tokenizer
        self._registration = Registration(store, self._worker_id, config.lease_ttl_s)
        self._stored = stored
        self._engine = EngineLoop(
            engine_factory,
            tokenizer,
            self._on_unhealthy,
            on_ended=stored.ended if stored is not None else None,
        )
        self._tokenizer_threads = ThreadPoolExecutor(TOKENIZER_THREADS, thread_name_prefix="tokenizer")
        # One thread: what a hostile grammar takes is taken from other grammars alone.
        self._grammar_thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._servicer = Servicer(
            engine=self._engine,
            tokenizer=tokenizer,
            tokenizer_threads=self._tokenizer_threads,
            identity=self._identity,
            begin_drain=self.begin_drain,
            grammar_desk=GrammarDesk(compile_grammar, self._grammar_thread),
            stream_queue_messages=config.stream_queue_messages,
            stored=stored,
        )
        self._health = health.aio.HealthServicer()
        self._grpc: grpc.aio.Server | None = None
        self._event_loop: asyncio.AbstractEventLoop | None = None
        self._model: ModelInfo | None = None
        self._drain: asyncio.Task[None] | None = None
        self._stop: asyncio.Task[None] | None = None
        self._stopped = asyncio.Event()
        self.address = ""
        """`host:port`, once started."""

    async def start(self) -> None:
        """Binds, makes the engine, registers, serves. On an error everything is taken back.

        Raises:
            ConfigError: the host isn't loopback and there is no TLS, its files can't be used, or the port is taken.
        """
        tls = self._config.tls
        if tls is None:
            _check_loopback(self._config.host)
        credentials = server_credentials(PemFiles(tls.cert, tls.key, tls.ca)) if tls is not None else None
        self._event_loop = asyncio.get_running_loop()
        self._grpc = grpc.aio.server(options=_SERVER_OPTIONS)
        add_WorkerServiceServicer_to_server(self._servicer, self._grpc)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        try:
            self.address = _bind(self._grpc, self._config.host, self._config.port, credentials)
            model = await asyncio.wrap_future(self._engine.start())
            self._model = replace(model, default_recipe=self._config.recipe)
            await self._registration.start(self.address)
            if self._stored is not None:
                self._stored.start()
            await self._grpc.start()
            await self._health.set(SERVICE_NAME, health_pb2.HealthCheckResponse.SERVING)
        except BaseException:
            await self.stop()
            raise
        logger.info(
            "worker_started",
            extra={"worker_id": self._worker_id, "address": self.address, "model": self._model.name},
        )

    def stats(self) -> Future[WorkerStats]:
        """The engine's counters; may be called from any thread. Holds Unavailable once the worker has stopped."""
        return self._engine.stats()

    async def report(self) -> admin_pb2.WorkerStats:
        """The same and what is stored, as gateways are told. Raises Unavailable once the worker has stopped."""
        return await self._servicer.report()

    async def drain(self, grace_s: float | None = None) -> None:
        """Lets running calls end within the grace (None: the configured one), cancels the rest, stops."""
        if self._stop is None:
            await self.begin_drain(grace_s)
        await self.wait_stopped()

    async def begin_drain(self, grace_s: float | None = None) -> int:
        """Takes no new calls from now on and drains in the background. Gives the number of running calls.

        A second call changes nothing: the first one's grace holds.

        Raises:
            Unavailable: the worker has stopped.
        """
        await self._health.enter_graceful_shutdown()
        running = await asyncio.wrap_future(self._engine.drain())
        if self._drain is None:
            grace_s = self._config.drain_grace_s if grace_s is None else grace_s
            logger.info("drain_started", extra={"running_calls": running, "grace_s": grace_s})
            self._drain = asyncio.create_task(self._finish_drain(grace_s), name="worker drain")
        return running

    async def check(self, timeout_s: float) -> None:
        """Returns if the engine's loop advances.

        Raises:
            Unavailable: it doesn't within `timeout_s`, has ended, or its engine was given up.
        """
        try:
            async with asyncio.timeout(timeout_s):
                is_healthy = await asyncio.wrap_future(self._engine.beat())
        except TimeoutError:
            raise Unavailable(f"the engine's loop hasn't advanced for {timeout_s:g} s", reason="stuck") from None
        if not is_healthy:
            raise Unavailable("the worker's engine was given up; its log says why", reason="unhealthy")

    async def stop(self) -> None:
        """Ends running calls with Unavailable, closes the engine, leaves the store. May be called again."""
        if self._stop is None:
            self._stop = asyncio.create_task(self._stop_all(), name="worker stop")
        await asyncio.shield(self._stop)

    async def wait_stopped(self) -> None:
        """Returns once the worker has stopped, by whomever."""
        await self._stopped.wait()

    async def _finish_drain(self, grace_s: float) -> None:
        try:
            async with asyncio.timeout(grace_s):
                await asyncio.wrap_future(self._engine.idle())
                if self._stored is not None:
                    logger.info("sessions_handed_over", extra={"sessions": await self._stored.publisher.hand_over()})
        except TimeoutError:
            logger.warning("drain_grace_over", extra={"grace_s": grace_s})
            self._engine.fail_running(
                Unavailable("the worker drained and the call took longer than its grace: call again", reason="draining")
            )
        await self.stop()

    async def _stop_all(self) -> None:
        try:
            await self._health.enter_graceful_shutdown()
            await self._registration.stop()
            await asyncio.wrap_future(self._engine.stop())
            if self._stored is not None:
                await self._stored.stop()
            self._servicer.end_streams()
            if self._grpc is not None:
                await self._grpc.stop(STREAMS_END_S)
            self._tokenizer_threads.shutdown(wait=False)
            self._grammar_thread.shutdown(wait=False, cancel_futures=True)
        finally:
            self._stopped.set()
        logger.info("worker_stopped", extra={"worker_id": self._worker_id})

    def _identity(self) -> Identity:
        assert self._model is not None, "no RPC comes before the start"
        return Identity(self._worker_id, self.address, self._registration.epoch, self._config.device, self._model)

    def _on_unhealthy(self) -> None:
        """Called in the engine thread."""
        assert self._event_loop is not None
        asyncio.run_coroutine_threadsafe(self._health.enter_graceful_shutdown(), self._event_loop)


def _check_loopback(host: str) -> None:
    if host == "localhost":
        return
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback:
        raise ConfigError(
            f"worker host {host!r}: without TLS workers listen on loopback only; set worker.tls, or use 127.0.0.1, "
            "::1 or localhost",
            field="host",
        )


def _bind(server: grpc.aio.Server, host: str, port: int, credentials: grpc.ServerCredentials | None) -> str:
    name = f"[{host}]" if ":" in host else host
    wanted = f"{name}:{port}"
    try:
        bound = server.add_insecure_port(wanted) if credentials is None else server.add_secure_port(wanted, credentials)
    except RuntimeError as error:
        raise ConfigError(
            f"can't listen on {name}:{port}: the port is taken or not allowed; choose another, or 0 for any free one",
            field="port",
        ) from error
    return f"{name}:{bound}"
