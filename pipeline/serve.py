"""The endpoint on Ray Serve: replicas that hold an engine, and gateways that speak HTTP before them.

A gateway serves its own socket instead of Ray's proxy: the proxy answers some routes to everyone, buffers bodies
without a bound, reports failures with addresses in them, and costs a hop between processes. Serve still places,
watches, scales, drains and restarts both deployments.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from pipeline.endpoint.client import EngineRequest, EngineStatus, EngineUnavailable, Event
from pipeline.endpoint.options import EndpointOptions, check_exposure
from pipeline.engine_worker import EngineWorker, Row
from pipeline.errors import RowError
from pipeline.generate import Answer
from pipeline.job import EngineOptions, Model

APP_NAME = "smolvlm"
ENGINE, GATEWAY = "Engine", "Gateway"
LOST = (RayActorError, DeploymentUnavailableError, BackPressureError, EngineUnavailable)
"""What a call to an engine raises if the engine is gone, or there is none."""

DRAIN_S = 30
HEALTH_PERIOD_S = 2
HEALTH_TIMEOUT_S = 20
MAX_CALLS = 8192  # far more than an engine batches: its own scheduler decides who goes first, not a queue before it
_DECODER_MEMORY_BYTES = 2 << 30
_QUIET = {"enable_access_log": False, "log_level": "WARNING"}


class Engine:
    """A replica: one engine, for the endpoint's requests and for the rows of jobs that share it."""

    def __init__(self, model: Model, options: EngineOptions) -> None:
        self._worker = EngineWorker(model, options)
        self._actor_id = str(ray.get_runtime_context().get_actor_id())

    async def stream(self, request: EngineRequest) -> AsyncGenerator[list[Event]]:
        """Answer an online request; Serve closes it when the gateway does."""
        async with aclosing(self._worker.stream(request)) as events:
            async for several in events:
                yield several

    async def complete(self, request: EngineRequest) -> list[Event]:
        """Answer one that nobody reads before it is whole: one message instead of one for every few tokens."""
        return await self._worker.complete(request)

    async def answer(self, rows: Sequence[Row]) -> list[Answer | RowError]:
        """Answer rows of a batch job."""
        return await self._worker.answer(rows)

    async def status(self) -> EngineStatus:
        """Say who this is and what it is doing."""
        return self._worker.status(self._actor_id)

    async def check_health(self) -> None:
        """Serve replaces a replica whose check fails. Raises EngineUnavailable once the engine's thread is dead."""
        if not self._worker.is_alive:
            raise EngineUnavailable("the engine's thread is dead")

    def __del__(self) -> None:
        if hasattr(self, "_worker"):
            self._worker.close()


class Gateway:
    """A replica: the HTTP server, its decoders and its tokenizer."""

    def __init__(self, options: EndpointOptions, engines: "DeploymentHandle[Any]") -> None:
        from pipeline.endpoint.app import create_app
        from pipeline.endpoint.chat import ChatService
        from pipeline.endpoint.decoders import DecoderPool
        from pipeline.endpoint.keys import ApiKeys
        from pipeline.endpoint.server import HttpServer, bind
        from pipeline.prepare import decoder_options
        from smolvlm.processor import Processor

        keys = ApiKeys.from_file(options.api_key_file) if options.api_key_file else None
        processor = Processor.from_pretrained(options.model.id, options.model.revision)
        decoding = decoder_options(options.image, processor.config.image, _DECODER_MEMORY_BYTES)
        self._decoders = DecoderPool(decoding, options.decoders)
        self._decoders.warm()
        service = ChatService(options, processor, self._decoders, ServeEngines(engines))
        bound = bind(options.host, options.port, shared=True)
        self._server = HttpServer(create_app(service, keys), bound, options.limits, DRAIN_S)

    async def check_health(self) -> None:
        """Serve replaces a replica whose check fails."""
        if not self._server.is_serving:
            raise RuntimeError("the HTTP server has ended")

    async def __del__(self) -> None:
        if hasattr(self, "_server"):
            await self._server.stop()
            self._decoders.close()


class ServeEngines:
    """The engines as the gateway sees them (`pipeline.endpoint.client.EngineClient`), through a Serve handle."""

    def __init__(self, handle: "DeploymentHandle[Any]") -> None:
        self._handle = handle
        self._streams = handle.options(stream=True)

    async def stream(self, request: EngineRequest) -> AsyncGenerator[list[Event]]:
        """Send the request to the replica with the shortest queue."""
        is_streamed = request.is_streamed
        call = self._streams.stream if is_streamed else self._handle.complete
        response: Any = call.remote(request)
        del request  # its tiles are on their way
        try:
            if not is_streamed:
                yield await response
                return
            async for events in response:
                yield events
        except LOST as error:
            raise EngineUnavailable(type(error).__name__) from error
        finally:
            response.cancel()

    async def statuses(self) -> list[EngineStatus]:
        """Ask all replicas."""
        try:
            found: list[EngineStatus] = await self._handle.broadcast("status").results_async()
        except (*LOST, RayError) as error:
            raise EngineUnavailable(type(error).__name__) from error
        return found


def build_application(options: EndpointOptions) -> serve.Application:
    """Return the application for `serve.run` or a Serve config. Raises ConfigError if it would be open to strangers."""
    check_exposure(options)
    engine, cpus = options.engine, _engine_cpus(options.engine)
    watched: dict[str, Any] = {
        "health_check_period_s": HEALTH_PERIOD_S,
        "health_check_timeout_s": HEALTH_TIMEOUT_S,
        "graceful_shutdown_timeout_s": DRAIN_S,
        "logging_config": _QUIET,
    }
    engines = serve.deployment(
        name=ENGINE,
        ray_actor_options={"num_cpus": cpus, "num_gpus": engine.gpus},
        max_ongoing_requests=MAX_CALLS,
        **_size(engine),
        **watched,
    )(Engine)
    gateways = serve.deployment(
        name=GATEWAY,
        num_replicas=options.gateways,
        ray_actor_options={"num_cpus": options.gateway_cpus},
        **watched,
    )(Gateway)
    return gateways.bind(options, engines.bind(options.model, engine))


def start(options: EndpointOptions) -> None:
    """Deploy the endpoint on the Ray that this process is connected to, and wait until it answers.

    Ray's own proxies stay off. Raises RuntimeError if a replica cannot start.
    """
    serve.start(proxy_location="Disabled", logging_config=_QUIET)
    serve.run(build_application(options), name=APP_NAME, route_prefix=None)


def stop() -> None:
    """Take the endpoint away: gateways take no more requests, what is under way is answered within DRAIN_S."""
    serve.delete(APP_NAME)


def engines_handle() -> "DeploymentHandle[Any]":
    """Return a handle on the engines of the endpoint that runs on this cluster."""
    return serve.get_deployment_handle(ENGINE, APP_NAME)


def _size(engine: EngineOptions) -> dict[str, Any]:
    smallest, largest = engine.replicas
    if smallest == largest:
        return {"num_replicas": smallest}
    busy = engine.max_num_sequences or (256 if engine.gpus else 16)
    limits = {"min_replicas": smallest, "max_replicas": largest, "target_ongoing_requests": busy / 2}
    return {"autoscaling_config": limits}


def _engine_cpus(engine: EngineOptions) -> float:
    """CPUs to reserve for a replica: its threads are a setting of their own, and a job beside it needs room."""
    return engine.cpus or (1.0 if engine.gpus else 0.25)
