"""The whole of training on fifty words: read back exactly by the engine, and the same when it was interrupted."""

from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from smolvlm.engine import Engine
from smolvlm.processor import Processor
from smolvlm.sampling import SamplingParams
from smolvlm.scratch import Shape, TextShape, VisionShape
from smolvlm.training.documents import DocumentGenerator, DocumentOptions
from smolvlm.training.examples import DrawDocument, Labelled
from smolvlm.training.fresh import NUM_TOKENS
from smolvlm.training.plan import Losses, Optimizer, Stage, Start, TrainingPlan
from smolvlm.training.run import read_metrics, run_training

COUNT, STEPS, STOP_AFTER = 50, 240, 117  # stopped in the middle of a window
SHAPE = Shape(
    VisionShape(96, 192, 2, 3, image_size=96, patch_size=12),
    TextShape(96, 192, 3, 3, 3, 32, max_position_embeddings=128, rope_theta=1e4, vocab_size=NUM_TOKENS),
    scale_factor=2,
    longest_edge=96,
)
WORDS = DocumentOptions({"word": 1}, (96, 96), (12, 32), 128, degraded_share=0, max_chars=8, max_lines=1)
MOST_RISE = 0.1  # of the smoothed loss over its lowest value so far


def plan_in(folder: Path) -> TrainingPlan:
    stage = Stage(
        "by heart",
        STEPS,
        batch_size=10,
        learning_rate=(3e-3, 1e-4),
        warmup_steps=10,
        losses=Losses(1.0, 0.5, 0.5),
        documents=WORDS,
        num_documents=COUNT,
    )
    return TrainingPlan(
        name="overfit",
        output=str(folder),
        start=Start(shape=SHAPE),
        stages=(stage,),
        optimizer=Optimizer("muon", weight_decay=0.0),
        precision="float32",
        data_workers=0,
    )


def learned() -> list[Labelled]:
    """The documents of the plan's only stage."""
    draw = DrawDocument(DocumentGenerator("train", 0, WORDS))
    return [draw(index) for index in range(COUNT)]


def read_back(model: Path, pictures: list[Labelled]) -> list[str]:
    engine, processor = Engine.from_pretrained(model, dtype="float32"), Processor.from_pretrained(model)
    content = [{"type": "image"}, {"type": "text", "text": "Transcribe all text."}]
    inputs = [processor([{"role": "user", "content": content}], [picture.image]) for picture in pictures]
    return [processor.decode(each.token_ids).strip() for each in engine.generate(inputs, SamplingParams(16))]


def smoothed(losses: list[float], width: int = 20) -> list[float]:
    return [sum(losses[start : start + width]) / width for start in range(0, len(losses) - width + 1, width)]


@pytest.mark.timeout(1200)
def test_fifty_words_are_learned_by_heart_also_in_two_goes(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    whole, parts = plan_in(tmp_path / "whole"), plan_in(tmp_path / "parts")
    model = run_training(whole)
    assert model is not None

    pictures = learned()
    assert read_back(model, pictures) == [picture.text for picture in pictures]

    losses = [line["losses"]["text"] for line in read_metrics(Path(whole.output))]
    means = smoothed(losses)
    assert means[-1] < 0.05 < 1 < means[0]
    assert all(value <= min(means[: number + 1]) + MOST_RISE for number, value in enumerate(means))

    asked = count(1)
    assert run_training(parts, is_stopping=lambda: next(asked) >= STOP_AFTER) is None
    resumed = run_training(parts)
    assert resumed is not None
    ours, theirs = (load_file(each / "model.safetensors") for each in (resumed, model))
    torch.testing.assert_close(ours, theirs, atol=0, rtol=0)
    assert [line["losses"]["text"] for line in read_metrics(Path(parts.output))] == losses
