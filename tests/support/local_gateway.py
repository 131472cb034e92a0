"""The gateway without Ray: its real app on a real socket, in a thread, before a real engine in this process."""

import asyncio
import base64
import io
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pipeline.endpoint.app import create_app
from pipeline.endpoint.chat import ChatService
from pipeline.endpoint.client import EngineClient, EngineRequest, EngineStatus, Event
from pipeline.endpoint.decoders import DecoderPool
from pipeline.endpoint.keys import ApiKeys
from pipeline.endpoint.options import EndpointOptions
from pipeline.endpoint.server import HttpServer, bind
from pipeline.engine_worker import EngineWorker
from pipeline.prepare import decoder_options
from smolvlm.processor import Processor

DECODER_MEMORY_BYTES = 1 << 30


class LocalEngines:
    """One worker of this process; `num_streams` are open now, `num_started` ever were."""

    def __init__(self, worker: EngineWorker) -> None:
        self.worker = worker
        self.num_streams = self.num_started = 0

    async def stream(self, request: EngineRequest) -> AsyncGenerator[list[Event]]:
        self.num_streams += 1
        self.num_started += 1
        try:
            async for events in self.worker.stream(request):
                yield events
        finally:
            self.num_streams -= 1

    async def statuses(self) -> list[EngineStatus]:
        return [self.worker.status("engine-1")]


@dataclass
class Gateway:
    """A running gateway."""

    host: str
    port: int
    decoders: DecoderPool

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


@contextmanager
def running_gateway(options: EndpointOptions, client: EngineClient, key_file: Path | None = None) -> Iterator[Gateway]:
    """Serve on a free port until the block ends."""
    processor = Processor.from_pretrained(options.model.id)
    decoding = decoder_options(options.image, processor.config.image, DECODER_MEMORY_BYTES)
    decoders = DecoderPool(decoding, options.decoders)
    service = ChatService(options, processor, decoders, client)
    app = create_app(service, ApiKeys.from_file(key_file) if key_file else None)
    bound = bind(options.host, 0)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def serve() -> HttpServer:
        return HttpServer(app, bound, options.limits, drain_s=5)

    async def close_decoders() -> None:
        decoders.close()

    server = asyncio.run_coroutine_threadsafe(serve(), loop).result(10)
    try:
        yield Gateway(options.host, bound.getsockname()[1], decoders)
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(30)
        asyncio.run_coroutine_threadsafe(close_decoders(), loop).result(10)
        asyncio.run_coroutine_threadsafe(loop.shutdown_asyncgens(), loop).result(10)
        asyncio.run_coroutine_threadsafe(loop.shutdown_default_executor(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def png(width: int = 20, height: int = 12, colour: str = "red") -> bytes:
    """A small image file."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PNG")
    return file.getvalue()


def data_url(data: bytes | None = None) -> str:
    """An image as requests carry it."""
    return "data:image/png;base64," + base64.b64encode(png() if data is None else data).decode()
