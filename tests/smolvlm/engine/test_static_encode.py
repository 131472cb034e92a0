"""The encoder over static buffers, on a CPU: a capture that gives the step back as it is."""

import pytest
import torch
from fixture_types import MakeEngine, MakeInput, MakeTiles

from smolvlm import SamplingParams
from smolvlm.engine.static_decode import Step
from smolvlm.engine.static_encode import StaticEncoder, bucket_tiles

GREEDY = SamplingParams(max_new_tokens=8, ignore_eos=True)


def _warm_up(step: Step) -> Step:
    """As a capture does: run the step, on nothing yet, before the first replay."""
    step()
    return step


def _mean(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.float().mean((1, 2))


def test_buckets_are_powers_of_two_then_multiples_of_8() -> None:
    sizes = [bucket_tiles(tiles) for tiles in range(1, 65)]
    assert sorted(set(sizes)) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]
    assert all(0 <= size - tiles < 8 for tiles, size in enumerate(sizes, 1))


@pytest.mark.parametrize("counts", [(3, 1, 4, 2), (9, 5, 16)])
def test_features_are_those_of_the_tiles_alone(counts: tuple[int, ...]) -> None:
    recorded: list[Step] = []

    def record(step: Step) -> Step:
        recorded.append(step)
        return _warm_up(step)

    encoder = StaticEncoder(_mean, record)
    generator = torch.Generator().manual_seed(0)
    for count in counts * 2:
        pixels = torch.randint(0, 256, (count, 8, 8, 3), generator=generator, dtype=torch.uint8)
        torch.testing.assert_close(encoder(pixels), _mean(pixels), rtol=0, atol=0)
    assert len(recorded) == len({bucket_tiles(count) for count in counts})


def test_answers_are_those_of_the_plain_encoder(
    make_engine: MakeEngine, make_input: MakeInput, make_tiles: MakeTiles
) -> None:
    """Batches of several images, and images cut over several batches, with what earlier ones left in the buffers."""
    shapes = [(1, 2), (2, 3), (3, 1), (2, 2)]
    inputs = [make_input(make_tiles(*shape, seed=seed), text="Read.") for seed, shape in enumerate(shapes)]
    plain, static = make_engine(tile_batch=3), make_engine(tile_batch=3)
    static.runner._encode = StaticEncoder(static.runner.model.encode_tiles, _warm_up)
    ours, expected = (engine.generate(inputs, GREEDY) for engine in (static, plain))
    assert [done.token_ids for done in ours] == [done.token_ids for done in expected]
