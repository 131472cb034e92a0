"""Measuring on the way: the engine that serves reads examples that training never shows."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from smolvlm.engine import Engine
from smolvlm.processor import Processor
from smolvlm.sampling import SamplingParams
from smolvlm.training.documents import DocumentGenerator
from smolvlm.training.examples import DrawDocument, Labelled
from smolvlm.training.metrics import measure
from smolvlm.training.plan import Evaluation, TrainingPlan

if TYPE_CHECKING:
    from smolvlm.training.loop import Trainer
    from smolvlm.training.run import SourceData

PROBE_SEED = 1_000_003  # not a seed of the final evaluation's documents, which nothing may be tuned on


@dataclass(frozen=True)
class Score:
    """Character and word error rate, share of exact answers (0.01 is one per cent), and seconds it took."""

    cer: float
    wer: float
    exact: float
    seconds: float


def probe(plan: TrainingPlan, options: Evaluation, trainer: Trainer, source: SourceData | None) -> Score:
    """Answer `options.count` examples greedily: documents of the generator in training fonts and words, drawn with a
    seed of their own, or the first rows of `source`, which is `options.source` opened."""
    started = time.perf_counter()
    examples = _examples(options, source)
    with tempfile.TemporaryDirectory() as folder:
        directory = trainer.save_model(Path(folder) / "model")
        engine = Engine.from_pretrained(directory, device=plan.device, dtype=plan.precision)
        processor = Processor.from_pretrained(directory)
    content = [{"type": "image"}, {"type": "text", "text": plan.prompt}]
    inputs = [processor([{"role": "user", "content": content}], [example.image]) for example in examples]
    answers = engine.generate(inputs, SamplingParams(max_new_tokens=options.max_new_tokens))
    texts = [processor.decode(answer.token_ids).strip() for answer in answers]
    metrics = measure([(example.text, text) for example, text in zip(examples, texts, strict=True)])
    return Score(metrics.cer.value, metrics.wer.value, metrics.exact.value, time.perf_counter() - started)


def _examples(options: Evaluation, source: SourceData | None) -> list[Labelled]:
    if options.documents is not None:
        draw = DrawDocument(DocumentGenerator("train", PROBE_SEED, options.documents))
        return [draw(index) for index in range(options.count)]
    assert source is not None, "check_plan saw to it"
    return [source.draw(index) for index in range(min(options.count, source.count))]
