"""The gate before numbers of 8 bits: with real weights, the bundled model's, easy documents are read as in float32."""

from typing import Any

import pytest

from smolvlm import Engine, Processor, SamplingParams
from smolvlm.hub import BUNDLED
from smolvlm.processor import ModelInput
from smolvlm.training.documents import DocumentGenerator, DocumentOptions

EASY = DocumentOptions(kinds={"word": 1.0, "line": 1.0, "receipt": 1.0}, text_px=(16.0, 28.0), degraded_share=0.0)
PROMPT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Transcribe all text."}]}]
PARAMS = SamplingParams(max_new_tokens=80)
DOCUMENTS, LEAST_EQUAL = 12, 11


@pytest.fixture(scope="module")
def inputs() -> list[ModelInput]:
    processor, generator = Processor.from_pretrained(BUNDLED), DocumentGenerator("held_out", 5, EASY)
    return [processor(PROMPT, [generator.document(index).image]) for index in range(DOCUMENTS)]


@pytest.fixture(scope="module")
def exact(inputs: list[ModelInput]) -> list[list[int]]:
    return [each.token_ids for each in Engine.from_pretrained(BUNDLED).generate(inputs, PARAMS)]


@pytest.mark.parametrize("option", [{"quantization": "fp8"}, {"kv_cache_dtype": "fp8"}])
def test_answers_stay_those_of_float32(
    option: dict[str, Any], inputs: list[ModelInput], exact: list[list[int]]
) -> None:
    found = Engine.from_pretrained(BUNDLED, **option).generate(inputs, PARAMS)
    assert sum(one.token_ids == other for one, other in zip(found, exact, strict=True)) >= LEAST_EQUAL
