"""Checkpoints from scratch: the published format, loaded strictly by transformers."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from smolvlm.config import ModelConfig
from smolvlm.scratch import SIZES, create_checkpoint, random_weights, weight_shapes

DATA = Path(__file__).parents[3] / "shared" / "data" / "smolvlm"
PUBLISHED = {"256m": "256m", "500m": "500m", "2.2b": "2.2b-v2"}


def digests(directory: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.iterdir()}


def load_reference(directory: Path) -> Any:
    from transformers import Idefics3ForConditionalGeneration

    loaded: Any = Idefics3ForConditionalGeneration.from_pretrained(directory, output_loading_info=True)
    model, report = loaded
    assert {kind: list(found) for kind, found in report.items() if found} == {}
    return model.eval()


def test_transformers_loads_every_weight_and_misses_none(tiny_checkpoint: Path) -> None:
    model = load_reference(tiny_checkpoint)
    with safe_open(tiny_checkpoint / "model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    loaded = model.state_dict()
    assert set(loaded) == set(stored)
    assert all(torch.equal(loaded[name], stored[name]) for name in stored)


@pytest.fixture(scope="module", params=PUBLISHED)
def preset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The name of a published size, and a checkpoint of it without layers."""
    tokenizer = DATA / "tokenizer.json"
    directory = create_checkpoint(
        tmp_path_factory.mktemp(request.param),
        request.param,
        num_text_layers=0,
        num_vision_layers=0,
        tokenizer_file=tokenizer if tokenizer.exists() else None,
        dtype="bfloat16",
    )
    return request.param, directory


def full_config(size: str, directory: Path) -> dict[str, Any]:
    """config.json as it would be with all layers."""
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = SIZES[size].text.num_hidden_layers
    config["vision_config"]["num_hidden_layers"] = SIZES[size].vision.num_hidden_layers
    return config


def test_presets_have_the_weights_of_the_published_architecture(preset: tuple[str, Path]) -> None:
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    size, directory = preset
    with torch.device("meta"):
        model = Idefics3ForConditionalGeneration(Idefics3Config.from_dict(full_config(size, directory)))
    expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    assert dict(weight_shapes(SIZES[size])) == expected


def test_presets_write_the_published_files(preset: tuple[str, Path]) -> None:
    if not DATA.exists():
        pytest.skip("the published configs and tokenizer are not beside this checkout")
    size, directory = preset
    for file in (DATA / PUBLISHED[size]).glob("*.json"):
        written = json.loads((directory / file.name).read_text())
        if file.name == "config.json":
            written = full_config(size, directory)
        assert written == json.loads(file.read_text()), file.name
    assert (directory / "tokenizer.json").read_bytes() == (DATA / "tokenizer.json").read_bytes()


def test_the_seed_decides_and_nothing_else(tmp_path: Path) -> None:
    first, again, other = (
        create_checkpoint(tmp_path / name, seed=seed) for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert digests(first) == digests(again)
    differing = {name for name, digest in digests(first).items() if digests(other)[name] != digest}
    assert differing == {"model.safetensors"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_on_disk(dtype: str, tmp_path: Path) -> None:
    directory = create_checkpoint(tmp_path, dtype=dtype)
    with safe_open(directory / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {getattr(torch, dtype)}  # noqa: SIM118
    assert json.loads((directory / "config.json").read_text())["dtype"] == dtype


def test_layers_can_be_fewer(tmp_path: Path) -> None:
    config = ModelConfig.from_pretrained(create_checkpoint(tmp_path, num_text_layers=1, num_vision_layers=1))
    assert (config.text.num_layers, config.vision.num_layers) == (1, 1)
    load_reference(tmp_path)


def test_a_real_tokenizer_sets_the_vocabulary(tmp_path: Path) -> None:
    if not DATA.exists():
        pytest.skip("the published configs and tokenizer are not beside this checkout")
    config = ModelConfig.from_pretrained(create_checkpoint(tmp_path, tokenizer_file=DATA / "tokenizer.json"))
    assert (config.text.vocab_size, config.image_token_id, config.eos_token_ids) == (49280, 49190, (49279,))


def test_an_unknown_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"size '1b' is not one of tiny, 256m, 500m, 2\.2b"):
        create_checkpoint(tmp_path, "1b")


def test_weights_can_be_asked_for_in_part() -> None:
    part = random_weights(SIZES["tiny"], 0, prefixes=("model.connector.",))
    assert set(part) == {"model.connector.modality_projection.proj.weight"}


def test_greedy_answers_have_clear_winners_and_depend_on_the_context(tiny_checkpoint: Path) -> None:
    """Near-ties would make every comparison of two implementations a matter of luck."""
    model = load_reference(tiny_checkpoint)
    torch.manual_seed(0)
    prompts = torch.randint(20, 500, (16, 12))
    with torch.inference_mode():
        logits = model(input_ids=prompts).logits[:, -1]
        answer = model.generate(prompts[:1], max_new_tokens=64, do_sample=False, eos_token_id=None)[0, 12:].tolist()
    best, second = logits.topk(2).values.unbind(-1)
    assert (best - second).median() > 0.05
    assert 0.5 < logits.std() < 2
    assert len(set(logits.argmax(-1).tolist())) > 12
    assert len(set(answer)) > 32


def test_the_image_changes_the_answer(tiny_checkpoint: Path) -> None:
    from PIL import Image

    from smolvlm.processor import Processor

    model, processor = load_reference(tiny_checkpoint), Processor.from_pretrained(tiny_checkpoint)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    logits = []
    for colour in ("red", "navy"):
        prepared = processor(messages, [Image.new("RGB", (30, 30), colour)], image_splitting=False)
        pixels = torch.from_numpy(prepared.tiles[0].pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.inference_mode():
            ids = torch.tensor([prepared.prompt_token_ids])
            logits.append(model(input_ids=ids, pixel_values=pixels[None]).logits[0, -1])
    assert (logits[0] - logits[1]).abs().max() > 0.1
