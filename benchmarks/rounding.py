"""What numbers of 8 bits cost in text: one model, its answers and its logits with and without them.

    python benchmarks/rounding.py --documents 60 [--text README.md --text-model DIR]

Held-out documents, read greedily by the bundled model in float32 and by each way of rounding. Logits are those of
float32's own answers, computed from the whole text at once. `--text` adds a language model's perplexity over a file,
for the cache alone. It runs on a CPU, which rounds as a GPU does and sums in float32. The last line of stdout is one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measuring.hardware import provenance
from torch import Tensor

from smolvlm import Engine, Processor, SamplingParams
from smolvlm.attention import PackedPrefill
from smolvlm.cpu.linear import has_int8
from smolvlm.model import SmolVLM
from smolvlm.processor import ModelInput
from smolvlm.training.documents import DocumentGenerator, DocumentOptions
from smolvlm.training.metrics import measure

PROMPT = "Transcribe all text."
CHUNK = 1024  # tokens of text that see each other
EXACT = "float32"
WAYS: dict[str, dict[str, Any]] = {
    EXACT: {},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantization": "int8"},
    "fp8 encoder": {"quantization": "fp8"},
    "fp8 cache": {"kv_cache_dtype": "fp8"},
    "both": {"quantization": "fp8", "kv_cache_dtype": "fp8"},
}


def logits(engine: Engine, token_ids: list[int], pixels: Tensor | None = None) -> Tensor:
    """Logits [T, V] at every token of a text, with an image in it or none, as the engine's model and cache have it."""
    model, cache, ids = engine.runner.model, engine.runner.cache, torch.tensor(token_ids)
    assert isinstance(model, SmolVLM)
    images = None
    if pixels is not None:
        images = (ids == model.config.image_token_id).nonzero().squeeze(1), model.encode_tiles(pixels).flatten(0, 1)
    positions = torch.arange(len(ids))
    computed: Tensor = model(model.embed(ids, images), PackedPrefill((len(ids),), positions, positions, cache))
    return computed.float()


def errors(exact: Engine, rounded: Engine, inputs: list[ModelInput], answers: list[list[int]]) -> dict[str, Any]:
    """Of the logits of the answers: their error by their norm for each document, and whether the likeliest stay."""
    shares, same, total = [], 0, 0
    for model_input, answer in zip(inputs, answers, strict=True):
        prompt, pixels = list(model_input.prompt_token_ids), torch.from_numpy(model_input.tiles[0].pixels)
        expected, found = (logits(each, prompt + answer, pixels)[len(prompt) - 1 : -1] for each in (exact, rounded))
        shares.append(float((found - expected).norm() / expected.norm()))
        same += int((found.argmax(-1) == expected.argmax(-1)).sum())
        total += len(answer)
    return {"logits_error": {"median": median(shares), "highest": max(shares)}, "likeliest": [same, total]}


def compare(options: argparse.Namespace) -> dict[str, Any]:
    small = DocumentOptions(kinds={"word": 1.0}) if options.smoke else DocumentOptions()
    generator = DocumentGenerator("held_out", options.seed, small)
    documents = [generator.document(index) for index in range(options.documents)]
    processor, params = Processor.from_pretrained("bundled"), SamplingParams(max_new_tokens=options.max_new_tokens)
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}]
    inputs = [processor(turn, [each.image]) for each in documents]
    exact, report = Engine.from_pretrained("bundled"), {}
    expected: list[list[int]] = []
    for name, way in WAYS.items():
        if name == "int8" and not has_int8():
            continue
        engine = Engine.from_pretrained("bundled", **way)
        answers = [each.token_ids for each in engine.generate(inputs, params)]
        expected = expected or answers
        texts = [processor.decode(ids).strip() for ids in answers]
        pairs = zip((each.text for each in documents), texts, strict=True)
        report[name] = {
            "cer": asdict(measure(pairs).cer),
            "equal": sum(ids == others for ids, others in zip(answers, expected, strict=True)),
            **errors(exact, engine, inputs, expected),
        }
        print(name, report[name], flush=True)
    return {"documents": len(inputs), "ways": report}


def perplexities(options: argparse.Namespace) -> dict[str, Any]:
    """Of the first tokens of a text, and the share of places where the likeliest token is that of float32's cache."""
    ids = Processor.from_pretrained(options.text_model).tokenizer.encode(options.text.read_text(encoding="utf-8")).ids
    chunks = [ids[start : start + CHUNK] for start in range(0, min(len(ids), options.tokens), CHUNK)]
    report: dict[str, Any] = {}
    expected: list[Tensor] = []
    for name in (EXACT, "fp8 cache"):
        engine = Engine.from_pretrained(options.text_model, **WAYS[name])
        found = [logits(engine, chunk).log_softmax(-1) for chunk in chunks]
        pairs = zip(found, chunks, strict=True)
        losses = [-each[:-1].gather(1, torch.tensor(chunk[1:]).unsqueeze(1)) for each, chunk in pairs]
        likeliest = torch.cat([each.argmax(-1) for each in found])
        expected.append(likeliest)
        same = float((likeliest == expected[0]).float().mean())
        report[name] = {"perplexity": math.exp(float(torch.cat(losses).mean())), "likeliest": same}
        print(name, report[name], flush=True)
    return report


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--max-new-tokens", type=int, default=1024)
    parser.add_argument("--text", type=Path, help="a file for the perplexity of --text-model")
    parser.add_argument("--text-model", default="bundled", help="checkpoint directory")
    parser.add_argument("--tokens", type=int, default=4096, help="of the text")
    parser.add_argument("--smoke", action="store_true", help="a few short documents")
    options = parser.parse_args()
    if options.smoke:
        options.documents, options.max_new_tokens, options.tokens = 2, 16, 64
    return options


@torch.inference_mode()
def main() -> None:
    options = parse()
    report = compare(options)
    if options.text is not None:
        report["text"] = perplexities(options)
    print(json.dumps(report | provenance(torch.device("cpu"), "torch")))


if __name__ == "__main__":
    main()
