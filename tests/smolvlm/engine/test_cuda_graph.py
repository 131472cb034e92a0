"""Captured decoding on a GPU: TRITON_INTERPRET=0 python -m pytest tests/smolvlm/engine/test_cuda_graph.py"""

import os
from dataclasses import replace

import pytest
import torch
from easy_documents import bundled_inputs, easy_documents
from fixture_types import MakeEngine, MakeInput, MakeTiles

from smolvlm import Engine, SamplingParams
from smolvlm.engine.cuda_graph import GraphCapture
from smolvlm.engine.vision_stream import vision_stream
from smolvlm.hub import BUNDLED
from smolvlm.precision import has_fp8
from smolvlm.processor import ModelInput

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or os.environ["TRITON_INTERPRET"] == "1",
    reason="needs a CUDA device, and TRITON_INTERPRET=0",
)

GREEDY = SamplingParams(max_new_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def inputs(make_input: MakeInput, make_tiles: MakeTiles) -> list[ModelInput]:
    texts = ("Good morning.", "Hi", "Once upon a time there was a small model that read pages.")
    images = [make_input(make_tiles(1, 2, seed=seed), text="Read.") for seed in range(6)]
    return [*images, *(make_input(text=text) for text in texts)]


@pytest.mark.parametrize(("temperature", "kv_cache_dtype"), [(0.0, "auto"), (0.9, "auto"), (0.0, "fp8")])
def test_replays_choose_the_tokens_of_plain_operators(
    make_engine: MakeEngine, inputs: list[ModelInput], temperature: float, kv_cache_dtype: str
) -> None:
    """Sequences join and leave, and with them buckets change; float32, so that near-ties are rare."""
    params = [
        replace(GREEDY, max_new_tokens=4 + 3 * index, temperature=temperature, seed=index)
        for index in range(len(inputs))
    ]
    if kv_cache_dtype == "fp8" and not has_fp8(torch.device("cuda")):
        pytest.skip("needs a GPU of compute capability 8.9")
    options = {"device": "cuda", "kv_cache_dtype": kv_cache_dtype, "max_num_sequences": 5}
    graph, eager = (make_engine(decode=decode, **options) for decode in ("graph", "eager"))
    ours, plain = (engine.generate(inputs * 2, params * 2) for engine in (graph, eager))
    assert [done.token_ids for done in ours] == [done.token_ids for done in plain]
    assert [done.mean_logprob for done in ours] == pytest.approx([done.mean_logprob for done in plain], abs=1e-3)


def test_answers_are_those_of_a_cpu(make_engine: MakeEngine, inputs: list[ModelInput]) -> None:
    """Small encoder batches, one straight after the other: copies of tiles run beside the encoder."""
    gpu, cpu = make_engine(device="cuda", tile_batch=2), make_engine()
    ours, theirs = (engine.generate(inputs, GREEDY) for engine in (gpu, cpu))
    assert [done.token_ids for done in ours] == [done.token_ids for done in theirs]


@pytest.mark.parametrize("decode", ["graph", "eager"])
def test_vision_beside_decode_changes_no_answer(
    make_engine: MakeEngine, make_input: MakeInput, make_tiles: MakeTiles, decode: str
) -> None:
    """Few sequences at a time and small encoder batches: most tiles are encoded while others decode, many ahead."""
    seeds = [*range(24), *range(6)]
    mixed = [make_input(make_tiles(seed % 3, 2, seed=seed), text=f"Read {seed}.") for seed in seeds]
    gpu, cpu = make_engine(device="cuda", decode=decode, max_num_sequences=3, tile_batch=4), make_engine()
    sequences = [gpu.add(each, GREEDY, priority=index % 5 == 4) for index, each in enumerate(mixed)]
    while gpu.has_unfinished:
        gpu.step()
    assert [each.token_ids for each in sequences] == [done.token_ids for done in cpu.generate(mixed, GREEDY)]


def test_another_stream_waits_on_the_device_and_the_host_does_not() -> None:
    vision = vision_stream(torch.device("cuda"))
    assert vision is not None
    with vision.batch() as number:
        torch.cuda._sleep(10**9)  # cycles: half a second or so
        features = torch.full((1000,), 7.0, device="cuda")
    assert (number, vision.num_under_way, vision.num_over) == (1, 1, 0)
    vision.receive(number, [features])
    total = features.sum()
    del features
    with vision.batch():
        torch.zeros(1000, device="cuda")  # would be given the same memory, had it not been lent
    assert total.item() == 7000
    torch.cuda.synchronize()
    assert vision.num_over == 2


@pytest.mark.skipif(not torch.cuda.is_available() or not has_fp8(torch.device("cuda")), reason="needs 8-bit floats")
def test_an_encoder_in_8_bit_floats_reads_as_on_a_cpu() -> None:
    """The bundled model, whose sizes the products take. The CPU's products sum in another order."""
    inputs = bundled_inputs(easy_documents(8))
    engines = (Engine.from_pretrained(BUNDLED, place, "bfloat16", quantization="fp8") for place in ("cuda", "cpu"))
    ours, theirs = (engine.generate(inputs, SamplingParams(max_new_tokens=80)) for engine in engines)
    same = [one.token_ids == other.token_ids for one, other in zip(ours, theirs, strict=True)]
    assert sum(same) >= 7


def test_a_replay_reads_the_buffers_anew_and_warm_ups_precede_it() -> None:
    device = torch.device("cuda")
    counter = torch.zeros(1, device=device)

    def step() -> None:
        counter.add_(1)

    with torch.inference_mode():
        replay = GraphCapture(device)(step)
        before = counter.item()
        counter.fill_(10)
        replay()
        replay()
        assert (before, counter.item()) == (2, 12)
