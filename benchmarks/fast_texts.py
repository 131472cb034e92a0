"""What the `fast` image policy costs in text: one model reads the same JPEGs prepared exactly and fast.

    python benchmarks/fast_texts.py --model bundled --documents 100

Held-out documents, enlarged two to three times and saved as JPEGs, so that a fast decode reduces them. Both sides see
the same files; answers are greedy. The last line of stdout is one JSON object: the share of texts that are equal, and
the character error rates of both, and of the fast texts against the exact ones.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring.hardware import provenance
from PIL import Image

from jobs.generated import draw
from pipeline.labelled import LabelledImage
from smolvlm import Engine, Processor, SamplingParams
from smolvlm.image import ImagePolicy, decode_image, split_decoded
from smolvlm.training.documents import DocumentOptions
from smolvlm.training.metrics import measure

ENLARGED = (2.0, 3.0)
QUALITY = 90
POLICIES = {"exact": ImagePolicy(), "fast": ImagePolicy(fast=True)}


def documents(count: int, seed: int, options: DocumentOptions) -> Iterator[tuple[LabelledImage, bytes]]:
    """Yield held-out documents, each with its enlarged JPEG."""
    rng = np.random.default_rng(seed)
    for document in draw("held_out", seed, count, options):
        image, factor = Image.open(io.BytesIO(document.data)).convert("RGB"), rng.uniform(*ENLARGED)
        target = io.BytesIO()
        size = (round(image.width * factor), round(image.height * factor))
        image.resize(size, Image.Resampling.LANCZOS).save(target, "JPEG", quality=QUALITY)
        yield document, target.getvalue()


def read(files: list[bytes], policy: ImagePolicy, processor: Processor, engine: Engine, tokens: int) -> list[str]:
    """Read each file; all of them are one batch."""
    config = processor.config.image
    content = [{"type": "image"}, {"type": "text", "text": "Transcribe all text."}]
    inputs = []
    for data in files:
        tiles = split_decoded(decode_image(data, needed=policy.needed(config)), config, policy)
        inputs.append(processor.from_tiles([{"role": "user", "content": content}], [tiles]))
    answers = engine.generate(inputs, SamplingParams(max_new_tokens=tokens))
    return [processor.decode(answer.token_ids).strip() for answer in answers]


def num_reduced(files: list[bytes], processor: Processor) -> int:
    needed = POLICIES["fast"].needed(processor.config.image)
    decoded = [decode_image(data, needed=needed) for data in files]
    return sum(each.image.width < each.width for each in decoded)


def compare(model: str, options: argparse.Namespace) -> dict[str, Any]:
    small = DocumentOptions(kinds={"word": 1.0}) if options.smoke else DocumentOptions()
    drawn = list(documents(options.documents, options.seed, small))
    files = [data for _, data in drawn]
    processor, engine = Processor.from_pretrained(model), Engine.from_pretrained(model, dtype="float32")
    texts = {name: read(files, policy, processor, engine, options.max_new_tokens) for name, policy in POLICIES.items()}
    references = [document.text for document, _ in drawn]
    pairs = list(zip(texts["exact"], texts["fast"], strict=True))
    written = [(exact, fast) for exact, fast in pairs if exact]
    return {
        "documents": len(files),
        "reduced": num_reduced(files, processor),
        "equal": sum(exact == fast for exact, fast in pairs) / len(pairs),
        "cer": {name: asdict(measure(zip(references, found, strict=True)).cer) for name, found in texts.items()},
        "cer_of_fast_against_exact": asdict(measure(written).cer) if written else None,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bundled", help="checkpoint directory, or `bundled`")
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--max-new-tokens", type=int, default=1024)
    parser.add_argument("--smoke", action="store_true", help="a tiny random checkpoint and a few documents")
    options = parser.parse_args()
    if options.smoke:
        options.documents, options.max_new_tokens = 4, 8
    return options


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        if options.smoke:
            from smolvlm.scratch import create_checkpoint

            options.model = str(create_checkpoint(Path(folder), "tiny"))
        report = compare(options.model, options)
    for key, value in report.items():
        print(f"{key}: {value}")
    print(json.dumps(report | provenance(torch.device("cpu"), "torch", "pillow")))


if __name__ == "__main__":
    main()
