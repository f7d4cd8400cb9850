"""Services from start to end: order, signals, exit codes. What a worker consists of is `compose`'s matter.

serve:  redis-servers ─► gateway ─► workers ─► "ready" ─► signal ─► drain ─► workers, gateway, redis-servers end
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import SecretStr

from kvservice.cli import compose, telemetry
from kvservice.cli.output import hint
from kvservice.cli.processes import WorkerProcesses
from kvservice.cli.settings import STATE_URL_VARIABLE
from kvservice.cli.signals import StopSignals
from kvservice.config.api_keys import ApiKeyFile
from kvservice.config.service import ServiceConfig
from kvservice.errors import ConfigError
from kvservice.gateway.server import Gateway
from kvservice.store import open_state_store
from kvservice.store.base import StateStore
from kvservice.store.embedded import EmbeddedRedis, RedisRole
from kvservice.store.rates import open_rate_store
from kvservice.store.usage import open_usage_log

if TYPE_CHECKING:
    from kvservice.worker.server import WorkerServer

logger = logging.getLogger(__name__)

FINE = 0
FAILED = 1

Announce = Callable[[str], None]


class Workers(Protocol):
    """The workers of one service, wherever they run."""

    num_workers: int

    async def start(self) -> None:
        """Starts them; they need not be ready when it returns."""

    async def ended(self, num_workers: int) -> int:
        """Waits until that many have ended by themselves. The first exit code that isn't 0, else 0."""

    async def stop(self) -> None:
        """Ends those that run; what runs on them gets its grace."""


def run_service(config: ServiceConfig, announce: Announce) -> int:
    """Runs gateway and workers until a signal; the exit code. Blocks. Call it from the main thread."""
    if config.workers == 0 and config.ray is None:
        compose.load_libraries()
    with _own_redis(config) as complete:
        return asyncio.run(_until_second_signal(lambda stop: _serve(complete, announce, stop)))


def run_gateway(config: ServiceConfig, announce: Announce) -> int:
    """Runs a gateway until a signal; the exit code. Blocks."""
    return asyncio.run(_until_second_signal(lambda stop: _gateway(config, announce, stop)))


def run_worker(config: ServiceConfig, announce: Announce, *, stop_with_stdin: bool) -> int:
    """Runs a worker until a signal, or until it was drained; the exit code. Blocks."""
    compose.load_libraries()

    async def worker(stop: StopSignals) -> int:
        if stop_with_stdin:
            stop.follow_stdin()
        return await _worker(config, announce, stop)

    return asyncio.run(_until_second_signal(worker))


async def _until_second_signal(service: Callable[[StopSignals], Coroutine[Any, Any, int]]) -> int:
    task: asyncio.Task[int] | None = None

    def end_at_once() -> None:
        if task is not None:
            task.cancel()

    stop = StopSignals(on_second=end_at_once)
    stop.install()
    task = asyncio.create_task(service(stop), name="service")
    try:
        return await task
    except asyncio.CancelledError:
        logger.warning("ended_without_drain")
        return FAILED


async def _serve(config: ServiceConfig, announce: Announce, stop: StopSignals) -> int:
    async with contextlib.AsyncExitStack() as stack:
        telemetry.start_tracing(config, "kvservice", stack)
        gateway, store, address = await _start_gateway(config, stack)
        workers = _workers(config, store)
        stack.push_async_callback(workers.stop)
        if isinstance(workers, EmbeddedWorker):
            embedded = workers
            telemetry.start_metrics(
                config, stack, gateway=gateway, worker_id=config.worker.worker_id, worker=lambda: embedded.server
            )
        else:
            telemetry.start_metrics(config, stack, gateway=gateway)
        event, code = await _first(stop=stop.wait(), ended=workers.ended(1), ready=_connected(workers, gateway))
        if event == "ended":
            logger.error("worker_ended_at_start", extra={"exit_code": code})
            # A worker that couldn't use its settings or model has said so, and the service can't either.
            return code if code > 0 else FAILED
        if event == "ready":
            announce(address)
            _explain(config, address)
            if gateway.http_address is not None:
                scheme = "http" if config.gateway is None or config.gateway.tls is None else "https"
                hint(f"OpenAI's API: {scheme}://{gateway.http_address}/v1")
            event, code = await _first(stop=stop.wait(), ended=workers.ended(workers.num_workers))
            if event == "ended":
                logger.error("no_worker_left", extra={"exit_code": code})
                return FAILED
            hint("draining: running calls may end, new ones are refused; a second signal ends at once")
            await gateway.drain()
            # Before its workers, which it would report as lost.
            await gateway.stop()
    return FINE


async def _gateway(config: ServiceConfig, announce: Announce, stop: StopSignals) -> int:
    async with contextlib.AsyncExitStack() as stack:
        telemetry.start_tracing(config, "kvservice-gateway", stack)
        gateway, _, address = await _start_gateway(config, stack)
        telemetry.start_metrics(config, stack, gateway=gateway)
        # Programs that start gateways ask health, which is SERVING once a worker is connected.
        announce(address)
        await stop.wait()
        await gateway.leave()
    return FINE


async def _worker(config: ServiceConfig, announce: Announce, stop: StopSignals) -> int:
    async with contextlib.AsyncExitStack() as stack:
        telemetry.start_tracing(config, "kvservice-worker", stack)
        store = await _open_store(config, stack)
        worker = await compose.worker(config.worker, store, stack)
        telemetry.start_metrics(config, stack, worker_id=config.worker.worker_id, worker=lambda: worker)
        event, _ = await _first(stop=stop.wait(), ready=worker.start())
        if event == "ready":
            announce(worker.address)
            event, _ = await _first(stop=stop.wait(), drained=worker.wait_stopped())
            if event == "stop":
                await worker.drain()
    return FINE


async def _start_gateway(config: ServiceConfig, stack: contextlib.AsyncExitStack) -> tuple[Gateway, StateStore, str]:
    """A gateway that listens, its store and its address. Both are closed with `stack`."""
    if config.gateway is None:
        raise ConfigError("gateway: no settings; at least its secret must be set")
    keys = ApiKeyFile(config.api_keys) if config.api_keys is not None else None
    store = await _open_store(config, stack)
    state_url = config.state_url.get_secret_value() if config.state_url is not None else None
    rates, usage = await open_rate_store(state_url, store.clock), await open_usage_log(state_url, store.clock)
    stack.push_async_callback(rates.aclose)
    stack.push_async_callback(usage.aclose)
    gateway = Gateway(config.gateway, store, keys, rates=rates, usage=usage)
    stack.push_async_callback(gateway.stop)
    return gateway, store, await gateway.start()


async def _open_store(config: ServiceConfig, stack: contextlib.AsyncExitStack) -> StateStore:
    if config.state_url is None:
        raise ConfigError(f"no state Redis: give --state-url, or set {STATE_URL_VARIABLE}")
    store = await open_state_store(config.state_url.get_secret_value(), config.worker.tenant_stored_bytes)
    stack.push_async_callback(store.aclose)
    return store


def _workers(config: ServiceConfig, store: StateStore) -> Workers:
    if config.ray is not None:
        num_workers = sum(deployment.first_replicas for deployment in config.ray_deployments())
        longest = max(deployment.stop_timeout_s for deployment in config.ray_deployments())
        return WorkerProcesses([compose.ray_settings(config)], longest, command="ray", num_workers=num_workers)
    if config.workers == 0:
        return EmbeddedWorker(config, store)
    return WorkerProcesses(compose.worker_settings(config), config.worker.drain_grace_s)


class EmbeddedWorker:
    """One worker in this process and event loop, reached over loopback like any other."""

    num_workers = 1

    def __init__(self, config: ServiceConfig, store: StateStore) -> None:
        self._config = config
        self._store = store
        self._stack = contextlib.AsyncExitStack()
        self.server: WorkerServer | None = None
        """Once it has started."""

    async def start(self) -> None:
        """Loads the model, and serves. Ready when it returns."""
        worker = await compose.worker(self._config.worker, self._store, self._stack)
        await worker.start()
        self.server = worker

    async def ended(self, num_workers: int) -> int:
        """Never returns: when it goes, the process goes."""
        del num_workers
        await asyncio.Event().wait()
        return FINE

    async def stop(self) -> None:
        """Stops it. The gateway has drained before, so nothing runs on it."""
        await self._stack.aclose()


async def _connected(workers: Workers, gateway: Gateway) -> None:
    """Starts the workers; returns when the gateway is connected to all of them."""
    await workers.start()
    fleet = gateway.fleet
    await fleet.refresh()
    while len(fleet.views()) < workers.num_workers:
        await fleet.changed_since(fleet.version)


async def _first(**waits: Awaitable[int | None]) -> tuple[str, int]:
    """Which of `waits` ended first, and with what (None counts as 0). The others are cancelled, and have ended."""
    tasks = {name: asyncio.ensure_future(wait) for name, wait in waits.items()}
    try:
        await asyncio.wait(tasks.values(), return_when=asyncio.FIRST_COMPLETED)
        name = next(name for name, task in tasks.items() if task.done())
        return name, tasks[name].result() or 0
    finally:
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)


@contextlib.contextmanager
def _own_redis(config: ServiceConfig) -> Iterator[ServiceConfig]:
    """The settings with URLs of Redis servers for both roles; those that none was named for are started here."""
    with contextlib.ExitStack() as stack:
        if config.state_url is None:
            folder = config.data_dir / "state" if config.data_dir is not None else None
            if folder is None:
                hint("sessions end with this process, and none is durable; --data-dir DIR keeps them")
            state = stack.enter_context(EmbeddedRedis(RedisRole.STATE, data_dir=folder))
            config = config.model_copy(update={"state_url": SecretStr(state.url)})
        if config.worker.redis_url is None:
            kv = stack.enter_context(EmbeddedRedis(RedisRole.KV, maxmemory_bytes=config.redis_bytes))
            worker = config.worker.model_copy(update={"redis_url": SecretStr(kv.url)})
            config = config.model_copy(update={"worker": worker})
        yield config


def _explain(config: ServiceConfig, address: str) -> None:
    """What a person may do next."""
    where = "" if address.endswith(":50051") else f" --address {address}"
    hint(f"model {config.worker.model}; Ctrl-C drains and ends")
    hint(f"try: kvservice chat --document FILE{where}")
    if config.api_keys is None and (config.gateway is None or config.gateway.jwt is None):
        hint("no API keys: loopback only, everybody here is the operator of the tenant `local`")
