"""An endpoint whose operator chose fast images: the engine gets their tiles, the client hears the size of its own."""

import base64
import io
from collections.abc import AsyncGenerator

import httpx2
import numpy as np
from local_gateway import LocalEngines, running_gateway
from PIL import Image

from pipeline.endpoint.client import EngineRequest, Event
from pipeline.endpoint.options import EndpointOptions
from pipeline.engine_worker import EngineWorker
from pipeline.job import ImageOptions, Model
from smolvlm.config import ImageConfig
from smolvlm.image import ImagePolicy, decode_image, split_decoded


class RecordingEngines(LocalEngines):
    """Engines that keep what they were asked."""

    def __init__(self, worker: EngineWorker) -> None:
        super().__init__(worker)
        self.asked: list[EngineRequest] = []

    async def stream(self, request: EngineRequest) -> AsyncGenerator[list[Event]]:
        self.asked.append(request)
        async for events in super().stream(request):
            yield events


def photograph() -> bytes:
    target = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (203, 301, 3), np.uint8)).save(target, "JPEG")
    return target.getvalue()


def test_the_operator_s_choice_reaches_the_engine(model: Model, worker: EngineWorker) -> None:
    engines, data = RecordingEngines(worker), photograph()
    url = "data:image/jpeg;base64," + base64.b64encode(data).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
    options = EndpointOptions(model, image=ImageOptions(upscale=False, fast=True))
    body = {"model": options.model_name, "max_tokens": 1, "messages": [{"role": "user", "content": content}]}
    with running_gateway(options, engines) as gateway:
        answer = httpx2.post(f"{gateway.url}/v1/chat/completions", json=body, timeout=60).json()
    (shown,) = answer["smolvlm"]["tiles"]
    assert (shown["width"], shown["height"]) == (301, 203)

    config, policy = ImageConfig.from_pretrained(model.id), ImagePolicy(upscale=False, fast=True)
    decoded = decode_image(data, needed=policy.needed(config))
    expected = split_decoded(decoded, config, policy)
    (tiles,) = engines.asked[0].model_input.tiles
    assert decoded.image.width < 301
    assert (shown["rows"], shown["cols"]) == (tiles.rows, tiles.cols) == (expected.rows, expected.cols)
    np.testing.assert_array_equal(tiles.pixels, expected.pixels)
