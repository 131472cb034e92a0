import gc

import numpy as np
import torch

from smolvlm.engine.images import EncodedImage, ImageStore
from smolvlm.image import Tiles


def _tiles(count: int = 2) -> Tiles:
    return Tiles(np.zeros((count, 4, 4, 3), dtype=np.uint8), 0, 0)


def _held(image: EncodedImage) -> set[str]:
    return {name for name in ("pixels", "features") if getattr(image, name) is not None}


def test_the_same_tiles_are_one_image_and_equal_ones_are_two() -> None:
    store, tiles = ImageStore(), _tiles()
    image = store.acquire(tiles)
    assert store.acquire(tiles) is image
    assert store.acquire(_tiles()) is not image


def test_pixels_go_once_encoded_and_features_with_the_last_user() -> None:
    store, tiles = ImageStore(), _tiles(3)
    image = store.acquire(tiles)
    store.acquire(tiles)
    image.store(0, torch.ones(2, 5, 8))
    assert (image.num_encoded, image.num_tiles) == (2, 3)
    image.store(2, torch.full((1, 5, 8), 2.0))
    assert image.is_encoded
    assert _held(image) == {"features"}
    assert image.embeddings.mean(-1).tolist() == [1.0] * 10 + [2.0] * 5
    store.release(image)
    assert _held(image) == {"features"}
    store.release(image)
    assert _held(image) == set()
    assert len(store) == 0


def test_tiles_go_into_encoder_batches_once_from_the_first_that_is_needed() -> None:
    image = ImageStore().acquire(_tiles(6))
    spans = [image.next_span(*each) for each in ((4, 9), (2, 1), (0, 9), (0, 9), (0, 9), (4, 1))]
    assert [(span.start, span.stop) if span else None for span in spans] == [(4, 6), (2, 3), (0, 2), (3, 4), None, None]


def test_a_part_may_be_all_that_is_needed() -> None:
    image = ImageStore().acquire(_tiles(3))
    image.store(1, torch.ones(2, 5, 8))
    assert [image.is_encoded_from(first) for first in (0, 1, 2)] == [False, True, True]
    assert _held(image) == {"pixels", "features"}


def test_a_part_is_there_after_the_last_batch_with_tiles_of_it() -> None:
    image = ImageStore().acquire(_tiles(4))
    image.store(3, torch.ones(1, 5, 8), batch=2)
    image.store(0, torch.ones(2, 5, 8), batch=5)
    assert [image.last_batch(first) for first in (0, 1, 2, 3)] == [5, 5, 2, 2]


def test_an_image_released_early_drops_its_pixels() -> None:
    store = ImageStore()
    image = store.acquire(_tiles())
    assert _held(image) == {"pixels"}
    store.release(image)
    assert _held(image) == set()


def test_new_tiles_at_the_address_of_gone_ones_are_another_image() -> None:
    store, tiles = ImageStore(), _tiles()
    image = store.acquire(tiles)
    address = id(tiles)
    del tiles
    gc.collect()
    others = [_tiles() for _ in range(1000)]
    for other in others:
        assert store.acquire(other) is not image, f"address reused: {id(other) == address}"
    store.release(image)
    assert len(store) == len(others)


def test_tiles_given_back_are_taken_again_but_for_those_that_were_encoded() -> None:
    image = EncodedImage(_tiles(5))
    span = image.next_span(0, room=4)
    assert span is not None
    image.store(0, torch.ones(1, 5, 8))
    image.give_back(span)
    again = image.next_span(0, room=9)
    assert again is not None
    assert (again.start, again.stop) == (1, 5)
    assert image.next_span(0, room=9) is None
