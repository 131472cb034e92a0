"""Blocks in 8-bit integers: logits and answers of real weights, the bundled model's, stay near those of float32."""

from pathlib import Path

import pytest
import torch
from easy_documents import bundled_inputs, easy_documents
from torch import Tensor, nn

from smolvlm import Engine, SamplingParams
from smolvlm.attention import packed_prefill
from smolvlm.cpu import layers
from smolvlm.cpu.layers import Int8TextLayer, Int8VisionLayer, check_int8, quantize_layers
from smolvlm.cpu.linear import has_int8
from smolvlm.hub import BUNDLED, BUNDLED_DIRECTORY
from smolvlm.model import SmolVLM
from smolvlm.processor import ModelInput

needs_int8 = pytest.mark.skipif(not has_int8(), reason="no C++ compiler, or no AVX2")
PARAMS = SamplingParams(max_new_tokens=80)
CPU = torch.device("cpu")
MOST_ERROR = 0.03  # of the norm of the logits of an answer; it is 0.01 as a rule, in bfloat16 0.006
LEAST_AGREEMENT = 0.95  # of the answers' tokens, up to the first that differs


@pytest.fixture(autouse=True)
def one_thread(threads_given_back: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def inputs() -> list[ModelInput]:
    return bundled_inputs(easy_documents(16))


@pytest.fixture(scope="module")
def answers(inputs: list[ModelInput]) -> list[list[int]]:
    """In float32."""
    return [each.token_ids for each in Engine.from_pretrained(BUNDLED).generate(inputs, PARAMS)]


def logits(model: SmolVLM, model_input: ModelInput, answer: list[int]) -> Tensor:
    """Of the answer's tokens, computed from the whole text at once."""
    prompt = model_input.prompt_token_ids
    ids = torch.tensor(list(prompt) + answer)
    places = (ids == model.config.image_token_id).nonzero().squeeze(1)
    features = model.encode_tiles(torch.from_numpy(model_input.tiles[0].pixels)).flatten(0, 1)
    hidden = model.embed(ids, (places, features))
    computed: Tensor = model(hidden, packed_prefill((len(ids),), CPU), torch.arange(len(prompt) - 1, len(ids) - 1))
    return computed.float()


@needs_int8
def test_all_blocks_are_replaced_and_nothing_else() -> None:
    model = SmolVLM.from_pretrained(BUNDLED_DIRECTORY)
    quantize_layers(model)
    assert {type(each) for each in model.vision.layers} == {Int8VisionLayer}
    assert {type(each) for each in model.text.layers} == {Int8TextLayer}
    linears = {name for name, each in model.named_modules() if isinstance(each, nn.Linear)}
    assert linears == {"vision.embedding.projection", "connector.projection", "head"}


@needs_int8
def test_logits_stay_near_those_of_float32_on_real_weights(inputs: list[ModelInput], answers: list[list[int]]) -> None:
    exact, integers = SmolVLM.from_pretrained(BUNDLED_DIRECTORY), SmolVLM.from_pretrained(BUNDLED_DIRECTORY)
    quantize_layers(integers)
    for model_input, answer in zip(inputs, answers, strict=True):
        with torch.inference_mode():
            expected, found = (logits(each, model_input, answer) for each in (exact, integers))
        assert (found - expected).norm() < MOST_ERROR * expected.norm()


@needs_int8
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answers_on_real_weights_stay_those_of_float32(
    dtype: str, inputs: list[ModelInput], answers: list[list[int]]
) -> None:
    found = Engine.from_pretrained(BUNDLED, dtype=dtype, quantization="int8").generate(inputs, PARAMS)
    same = sum(_common(answer, each.token_ids) for answer, each in zip(answers, found, strict=True))
    assert same >= LEAST_AGREEMENT * sum(map(len, answers))


@needs_int8
def test_answers_do_not_depend_on_the_batch(inputs: list[ModelInput]) -> None:
    engine = Engine.from_pretrained(BUNDLED, quantization="int8", prefix_caching=False)
    params = SamplingParams(max_new_tokens=40)
    together = [each.token_ids for each in engine.generate(inputs[:5], params)]
    assert [engine.generate([each], params)[0].token_ids for each in inputs[:5]] == together


def test_what_cannot_be_quantized_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for device, dtype, named in (("cuda:1", torch.float32, "cuda:1 in float32"), ("cpu", torch.float16, "in float16")):
        with pytest.raises(ValueError, match=f"runs on a CPU in float32 or bfloat16, not on .*{named}"):
            check_int8(torch.device(device), dtype)
    monkeypatch.setattr(layers, "has_int8", lambda: False)
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler"):
        check_int8(CPU, torch.bfloat16)


def test_sizes_that_do_not_fit_are_refused(tiny_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="text heads of 64"):
        quantize_layers(SmolVLM.from_pretrained(tiny_checkpoint))


def _common(first: list[int], second: list[int]) -> int:
    differing = (index for index, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(differing, min(len(first), len(second)))
