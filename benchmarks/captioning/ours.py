"""Our side of `benchmarks/captions.py`: decode, split, engine."""

from pathlib import Path
from typing import Any

import torch
from turns import Caption, take_turns

from smolvlm import Engine, Processor, SamplingParams
from smolvlm.image import decode_image


def prepare(work: dict[str, Any]) -> Caption:
    """Load the engine; pictures are not split, as for the peers."""
    torch.set_num_threads(work["threads"])
    engine = Engine.from_pretrained(
        work["checkpoint"], "cpu", work["dtype"], prefix_caching=False, quantization=work["quantization"]
    )
    processor = Processor.from_pretrained(work["checkpoint"])
    content = [{"type": "image"}, {"type": "text", "text": work["prompt"]}]
    messages = [{"role": "user", "content": content}]

    def caption(pictures: list[Path], tokens: int) -> list[int]:
        images = [decode_image(picture.read_bytes()).image for picture in pictures]
        inputs = [processor(messages, [image], image_splitting=False) for image in images]
        done = engine.generate(inputs, SamplingParams(max_new_tokens=tokens, ignore_eos=True))
        return [len(completion.token_ids) for completion in done]

    return caption


if __name__ == "__main__":
    take_turns(prepare)
