"""The bundled checkpoint: small, in the published format, the same in transformers, and it reads."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import yaml
from easy_documents import PROMPT, bundled_inputs, easy_documents
from pydantic import TypeAdapter

from smolvlm import Engine, Processor, SamplingParams
from smolvlm.hub import BUNDLED, BUNDLED_DIRECTORY
from smolvlm.training.plan import TrainingPlan

MOST_BYTES = 40_000_000


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_pretrained(BUNDLED)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_pretrained(BUNDLED)


@pytest.fixture(scope="module")
def reference() -> Iterator[Any]:
    from transformers import Idefics3ForConditionalGeneration

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    loaded: Any = Idefics3ForConditionalGeneration.from_pretrained(
        BUNDLED_DIRECTORY, dtype=torch.float32, output_loading_info=True
    )
    model, report = loaded
    assert {kind: list(found) for kind, found in report.items() if found} == {}
    yield model.eval()
    torch.set_num_threads(threads)


def test_it_is_small_and_brings_its_recipe_and_card() -> None:
    files = {path.name: path for path in BUNDLED_DIRECTORY.iterdir()}
    assert {"config.json", "preprocessor_config.json", "tokenizer.json", "model.safetensors"} <= files.keys()
    assert sum(path.stat().st_size for path in files.values()) <= MOST_BYTES
    recipe = yaml.safe_load(files["train.yaml"].read_text())
    card = files["README.md"].read_text()
    for name in ("encoder", "draft", "train", "harder", "larger", "spaces", "clear"):
        assert TypeAdapter(TrainingPlan).validate_python(yaml.safe_load(files[f"{name}.yaml"].read_text()))
        assert f"smolvlm train smolvlm/assets/ocr/{name}.yaml\n" in card
    assert (
        recipe["start"]["shape"]["vision"]["hidden_size"]
        == Processor.from_pretrained(BUNDLED).config.vision.hidden_size
    )


def test_transformers_reads_the_same_text(processor: Processor, engine: Engine, reference: Any) -> None:
    inputs = bundled_inputs(easy_documents(6))
    ours = engine.generate(inputs, SamplingParams(max_new_tokens=160))
    for model_input, completion in zip(inputs, ours, strict=True):
        pixels = torch.from_numpy(model_input.tiles[0].pixels).permute(0, 3, 1, 2).float() / 255
        ids = torch.tensor([model_input.prompt_token_ids])
        with torch.inference_mode():
            theirs = reference.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=((pixels - 0.5) / 0.5)[None],
                max_new_tokens=160,
                do_sample=False,
            )
        assert processor.decode(completion.token_ids) == processor.decode(theirs[0, ids.shape[1] :].tolist())


def test_transformers_prepares_the_same_input(processor: Processor) -> None:
    from transformers import AutoProcessor

    theirs: Any = AutoProcessor.from_pretrained(BUNDLED_DIRECTORY, backend="pil")
    image = easy_documents(1)[0].image
    prompt = theirs.apply_chat_template(PROMPT, add_generation_prompt=True)
    prepared = theirs(text=prompt, images=[image], return_tensors="pt")
    ours = processor(PROMPT, [image])
    assert prepared["input_ids"][0].tolist() == ours.prompt_token_ids
