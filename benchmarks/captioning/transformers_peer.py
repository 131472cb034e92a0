"""transformers' side of `benchmarks/captions.py`: its own processor and batched `generate`."""

import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoTokenizer, Idefics3ForConditionalGeneration
from transformers.models.idefics3 import Idefics3ImageProcessorPil, Idefics3Processor
from turns import Caption, take_turns


def prepare(work: dict[str, Any]) -> Caption:
    """Load the model in the given dtype; every answer has exactly the asked number of tokens."""
    torch.set_num_threads(work["threads"])
    checkpoint = work["checkpoint"]
    model: Any = Idefics3ForConditionalGeneration.from_pretrained(checkpoint, dtype=getattr(torch, work["dtype"]))
    model.eval().generation_config.eos_token_id = None
    processor: Any = Idefics3Processor(
        Idefics3ImageProcessorPil.from_pretrained(checkpoint),
        AutoTokenizer.from_pretrained(checkpoint),
        image_seq_len=work["image_seq_len"],
    )
    text = work["prompt_text"]

    def caption(pictures: list[Path], tokens: int) -> list[int]:
        images = [[Image.open(picture).convert("RGB")] for picture in pictures]
        inputs = processor(
            text=[text] * len(images), images=images, do_image_splitting=False, padding=True, return_tensors="pt"
        )
        inputs = inputs.to(model.dtype)
        with torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
        return [tokens if out.shape[1] == inputs["input_ids"].shape[1] + tokens else 0 for _ in images]

    return caption


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    take_turns(prepare)
