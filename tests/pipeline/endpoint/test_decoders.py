"""Decoders on an event loop: what one request does to its decoder, the next one does not see."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest
from decoder_pictures import CONFIG, POLICY, picture

from pipeline.decode_process import DecoderOptions
from pipeline.endpoint.decoders import DecoderPool
from pipeline.endpoint.images import ImageRefused, SplitImage
from smolvlm.image import ImageLimits, decode_image, split_image


@asynccontextmanager
async def pool_of(size: int) -> AsyncIterator[DecoderPool]:
    pool = DecoderPool(DecoderOptions(CONFIG, POLICY, ImageLimits(), timeout_s=20.0, memory_bytes=4 << 30), size)
    try:
        yield pool
    finally:
        pool.close()


def assert_is(found: SplitImage, data: bytes) -> None:
    expected = split_image(decode_image(data).image, CONFIG, POLICY)
    assert np.array_equal(found.tiles.pixels, expected.pixels)
    assert (found.tiles.rows, found.tiles.cols) == (expected.rows, expected.cols)


def test_everyone_gets_their_own_tiles() -> None:
    images = [picture(seed, side=20 + 5 * seed) for seed in range(20)]

    async def all_at_once() -> list[SplitImage]:
        async with pool_of(2) as pool:
            return await asyncio.gather(*(pool.split(image, POLICY) for image in images))

    for found, image in zip(asyncio.run(all_at_once()), images, strict=True):
        assert_is(found, image)


def test_who_leaves_takes_nothing_along() -> None:
    """Wherever the request was: its image half sent, being decoded, or answered."""
    large, small = picture(1, side=1500), picture(2)

    async def after_leaving(seconds: float) -> SplitImage:
        async with pool_of(1) as pool:
            await pool.split(small, POLICY)
            (pid,) = pool.pids
            leaving = asyncio.ensure_future(pool.split(large, POLICY))
            await asyncio.sleep(seconds)
            leaving.cancel()
            found = await pool.split(small, POLICY)
            assert leaving.cancelled() or leaving.done()
            assert pool.pids == [pid]
            return found

    for seconds in (0.0, 0.001, 0.02, 0.2):
        assert_is(asyncio.run(after_leaving(seconds)), small)


@pytest.mark.parametrize("kind", ["segfault", "exit", "abort"])
def test_what_kills_a_decoder_is_refused_and_the_next_one_lives(kind: str) -> None:
    async def after_death() -> SplitImage:
        async with pool_of(1) as pool:
            with pytest.raises(ImageRefused) as refused:
                await pool.split(picture(1, poison=kind), POLICY)
            assert refused.value.code == "quarantined"
            return await pool.split(picture(2), POLICY)

    assert_is(asyncio.run(after_death()), picture(2))


def test_a_decoder_that_died_idle_is_nobodys_fault() -> None:
    async def after_death() -> SplitImage:
        async with pool_of(1) as pool:
            pool.warm()
            await pool.split(picture(1), POLICY)
            os.kill(pool.pids[0], signal.SIGKILL)
            await asyncio.sleep(0.2)
            return await pool.split(picture(2), POLICY)

    assert_is(asyncio.run(after_death()), picture(2))
