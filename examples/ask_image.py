"""Ask questions about images with the engine alone: no Ray, no storage.

python examples/ask_image.py photo.jpg "What is this?" --model <checkpoint directory> [--device cuda --dtype bfloat16]
python examples/ask_image.py --smoke      # a tiny random checkpoint and a drawn image
"""

import argparse
import tempfile
from pathlib import Path

from PIL import Image

from smolvlm import Engine, Processor, SamplingParams
from smolvlm.image import decode_image


def main() -> None:
    arguments = parse_arguments()
    if arguments.smoke:
        from smolvlm.scratch import create_checkpoint

        with tempfile.TemporaryDirectory() as folder:
            checkpoint = create_checkpoint(Path(folder), "tiny")
            ask(
                str(checkpoint),
                Image.new("RGB", (64, 48), "teal"),
                ["What is this?", "Which colour?"],
                "cpu",
                "float32",
            )
        return
    image = decode_image(arguments.image.read_bytes()).image
    ask(arguments.model, image, arguments.questions, arguments.device, arguments.dtype)


def ask(model: str, image: Image.Image, questions: list[str], device: str, dtype: str) -> None:
    """Print one answer per question; all of them run as one batch."""
    processor = Processor.from_pretrained(model)
    engine = Engine.from_pretrained(model, device=device, dtype=dtype)
    inputs = [
        processor(
            messages=[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
            images=[image],
        )
        for question in questions
    ]
    answers = engine.generate(inputs, SamplingParams(max_new_tokens=64))
    for question, done in zip(questions, answers, strict=True):
        print(question)
        print(f"  {processor.decode(done.token_ids).strip()} [{done.finish_reason}, {done.output_tokens} tokens]")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path, nargs="?")
    parser.add_argument("questions", nargs="*", default=["Describe this image."])
    parser.add_argument("--model", help="checkpoint directory")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    if not arguments.smoke and (arguments.image is None or arguments.model is None):
        parser.error("an image and --model are needed, or --smoke")
    return arguments


if __name__ == "__main__":
    main()
