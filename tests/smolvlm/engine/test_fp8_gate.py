"""The gate before numbers of 8 bits: with real weights, the bundled model's, easy documents are read as in float32."""

from typing import Any

import pytest
from easy_documents import bundled_inputs, easy_documents

from smolvlm import Engine, Processor, SamplingParams
from smolvlm.hub import BUNDLED
from smolvlm.processor import ModelInput
from smolvlm.training.documents import Document
from smolvlm.training.metrics import measure

PARAMS = SamplingParams(max_new_tokens=200)
LEAST_EQUAL = 0.85  # of the texts; one character of a long one that was in doubt already makes it another
MOST_ADDED = 0.005  # to the share of wrong characters


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_pretrained(BUNDLED)


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return easy_documents(60)


@pytest.fixture(scope="module")
def inputs(documents: list[Document]) -> list[ModelInput]:
    return bundled_inputs(documents)


@pytest.fixture(scope="module")
def exact(processor: Processor, inputs: list[ModelInput]) -> list[str]:
    return read(processor, inputs)


def read(processor: Processor, inputs: list[ModelInput], **options: Any) -> list[str]:
    completions = Engine.from_pretrained(BUNDLED, **options).generate(inputs, PARAMS)
    return [processor.decode(completion.token_ids).strip() for completion in completions]


def error_rate(documents: list[Document], texts: list[str]) -> float:
    return measure([(document.text, text) for document, text in zip(documents, texts, strict=True)]).cer.value


@pytest.mark.parametrize("option", [{"quantization": "fp8"}, {"kv_cache_dtype": "fp8"}])
def test_answers_stay_those_of_float32(
    option: dict[str, Any],
    processor: Processor,
    documents: list[Document],
    inputs: list[ModelInput],
    exact: list[str],
) -> None:
    found = read(processor, inputs, **option)
    assert sum(map(str.__eq__, found, exact)) >= LEAST_EQUAL * len(exact)
    assert error_rate(documents, found) <= error_rate(documents, exact) + MOST_ADDED
