"""Our training loop beside transformers' Trainer: same weights, batches, precision and AdamW, in one process.

    python benchmarks/training.py smolvlm/assets/ocr/train.yaml

Model, batch size and documents are those of the training file's last stage, the loss is next-token on both sides, and
batches are ready before the clock starts. The two alternate for `--rounds` rounds of `--steps` steps, each round from
the same weights. Beside them, in every round, the best rate of a plain matrix product says what the hardware gives. The
medians and the spread go into a table and, as the last line, into one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, SequentialSampler
from torch.utils.flop_counter import FlopCounterMode

from jobs import documents
from jobs.training_file import parse
from smolvlm.precision import dtype_named, name_of
from smolvlm.training.batches import WINDOW_STEPS, Window, collate
from smolvlm.training.documents import DocumentGenerator
from smolvlm.training.examples import NO_TARGET, DrawDocument, Example, ExampleMaker
from smolvlm.training.fresh import create_fresh_checkpoint
from smolvlm.training.loop import Trainer
from smolvlm.training.plan import Losses, Optimizer, Stage, TrainingPlan

RATE = 1e-4
GEMM_SIDE, GEMM_REPEATS = 2048, 5


@dataclass
class Side:
    """Ours or the peer: seconds of each timed step, and the losses of the last round."""

    name: str
    once: Callable[[], tuple[list[float], list[float]]]
    step_s: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


class Prepared:
    """The same batches for every pass over them, in windows as our loop asks for them."""

    def __init__(self, batches: list[list[Example]], image_token_id: int) -> None:
        self.batches = [[collate(batch, image_token_id)] for batch in batches]

    def __getitem__(self, window: int) -> Window:
        return self.batches[window * WINDOW_STEPS : (window + 1) * WINDOW_STEPS]


def ours(plan: TrainingPlan, checkpoint: Path, batches: list[list[Example]]) -> Side:
    prepared = Prepared(batches, ExampleMaker(checkpoint, plan.prompt).config.image_token_id)

    def once() -> tuple[list[float], list[float]]:
        ends, losses = [], []
        for report in Trainer(plan, checkpoint).run(lambda _: prepared):  # type: ignore[arg-type, return-value]
            ends.append(now(plan.device))
            losses.append(report.losses["text"])
        return ends, losses

    return Side("ours", once)


class Rows(Dataset[dict[str, Any]]):
    """The examples as transformers takes them: whole answers, labels beside the tokens that they name."""

    def __init__(self, batches: list[list[Example]]) -> None:
        self.examples = [example for batch in batches for example in batch]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.examples[index]
        return {
            "input_ids": [*example.token_ids, example.labels[-1]],
            "labels": [NO_TARGET, *example.labels],
            "pixel_values": (example.tiles.pixels.astype(np.float32) / 255 - 0.5) / 0.5,
        }


def padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    length = max(len(row["input_ids"]) for row in rows)

    def stacked(name: str, filler: int) -> torch.Tensor:
        return torch.tensor([[*row[name], *[filler] * (length - len(row[name]))] for row in rows])

    sizes = torch.tensor([len(row["input_ids"]) for row in rows])
    return {
        "input_ids": stacked("input_ids", 0),
        "labels": stacked("labels", NO_TARGET),
        "attention_mask": (torch.arange(length) < sizes[:, None]).long(),
        "pixel_values": torch.from_numpy(np.stack([row["pixel_values"] for row in rows])).permute(0, 1, 4, 2, 3),
    }


def peer(plan: TrainingPlan, checkpoint: Path, batches: list[list[Example]], folder: str) -> Side:
    import transformers

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> SequentialSampler:
            return SequentialSampler(rows)

    class Clock(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(now(plan.device))

    stage, optimizer, rows = plan.stages[0], plan.optimizer, Rows(batches)
    settings = transformers.TrainingArguments(
        output_dir=folder,
        max_steps=stage.steps,
        per_device_train_batch_size=stage.batch_size,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.max_grad_norm,
        bf16=_dtype(plan) == torch.bfloat16,
        use_cpu=plan.device == "cpu",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=plan.device != "cpu",
    )

    def once() -> tuple[list[float], list[float]]:
        model = transformers.Idefics3ForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
        clock = Clock()
        trainer = InOrder(model, settings, data_collator=padded, train_dataset=rows, callbacks=[clock])
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        return clock.ends, [line["loss"] for line in trainer.state.log_history if "loss" in line]

    return Side("transformers", once)


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(sides: list[Side], plan: TrainingPlan, rounds: int) -> list[float]:
    """Alternate the sides, in an order that turns round; give the FLOP/s of the matrix product of each round."""
    peaks = []
    for number in range(rounds):
        peaks.append(gemm_flops_per_s(plan))
        for side in sides if number % 2 == 0 else reversed(sides):
            ends, side.losses = side.once()
            seconds = [after - before for before, after in pairwise(ends)]
            side.step_s += seconds
            print(f"{side.name}: {plan.stages[0].batch_size / statistics.median(seconds):.2f} samples/s", flush=True)
    return peaks


def _dtype(plan: TrainingPlan) -> torch.dtype:
    return dtype_named(plan.precision, torch.device(plan.device))


def gemm_flops_per_s(plan: TrainingPlan) -> float:
    """The best of some products of two square matrices, in the plan's precision."""
    matrix = torch.randn(GEMM_SIDE, GEMM_SIDE, device=plan.device).to(_dtype(plan))
    seconds = []
    for _ in range(GEMM_REPEATS):
        started = now(plan.device)
        matrix @ matrix
        seconds.append(now(plan.device) - started)
    return 2 * GEMM_SIDE**3 / min(seconds)


def flops_per_sample(plan: TrainingPlan, checkpoint: Path, batches: list[list[Example]]) -> float:
    """Matrix products of forward and backward passes over all batches, counted by torch while they run."""
    trainer = Trainer(plan, checkpoint)
    prepared = Prepared(batches, trainer.model.config.image_token_id)
    with FlopCounterMode(display=False) as counter:
        for (batch,) in prepared.batches:
            trainer.objective(batch.to(trainer.device), plan.stages[0].losses)["text"].backward()
    return float(counter.get_total_flops()) / sum(map(len, batches))


def summary(side: Side, batch_size: int, flops: float, peak: float) -> dict[str, Any]:
    rates = sorted(batch_size / seconds for seconds in side.step_s)
    median = statistics.median(rates)
    return {
        "samples_per_s": round(median, 3),
        "samples_per_s_quartiles": [round(rates[len(rates) // 4], 3), round(rates[len(rates) * 3 // 4], 3)],
        "percent_of_peak": round(100 * median * flops / peak, 2),
        "first_losses": [round(loss, 5) for loss in side.losses[:2]],
    }


def report(sides: list[Side], plan: TrainingPlan, peaks: list[float], flops: float) -> dict[str, Any]:
    stage, peak = plan.stages[0], statistics.median(peaks)
    results = {side.name: summary(side, stage.batch_size, flops, peak) for side in sides}
    print(f"\n{'':26}" + "".join(f"{name:>22}" for name in results))
    for row in results["ours"]:
        print(f"{row:26}" + "".join(f"{result[row]!s:>22}" for result in results.values()))
    mine, other = (results[side.name]["samples_per_s"] for side in sides)
    return {
        "benchmark": "training",
        "unit": "samples/s",
        "ours": mine,
        "peer": other,
        "ratio": round(mine / other, 3),
        "peer_name": "transformers Trainer",
        "details": results,
        "peak_tflops": round(peak / 1e12, 4),
        "peak_tflops_min_max": [round(value / 1e12, 4) for value in (min(peaks), max(peaks))],
        "gflop_per_sample": round(flops / 1e9, 4),
        "parameters": sum(parameter.numel() for parameter in _parameters(plan)),
        "setting": {
            "batch_size": stage.batch_size,
            "precision": name_of(_dtype(plan)),
            "device": plan.device,
        },
        "hardware": {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "versions": {name: version(name) for name in ("torch", "transformers")} | {"python": platform.python_version()},
        "command": " ".join(["python", *sys.argv]),
    }


def _parameters(plan: TrainingPlan) -> list[torch.nn.Parameter]:
    assert plan.start.id is not None
    return list(Trainer(plan, Path(plan.start.id)).model.parameters())


def plan_of(args: argparse.Namespace, folder: Path) -> TrainingPlan:
    """The training file's model, prompt and precision with AdamW and one stage of next-token loss alone."""
    content = documents.read(args.training_file)
    shape = content.get("start", {}).get("shape")
    if shape is None:
        raise SystemExit(f"{args.training_file}: start.shape is missing; the benchmark makes its weights from it")
    given = parse({**content, "start": {"shape": shape}, "output": str(folder / "run")}, str(args.training_file))
    assert given.start.shape is not None
    last = given.stages[-1]
    batch_size = args.batch_size or last.batch_size
    stage = Stage("bench", args.steps, batch_size, (RATE, RATE), losses=Losses(), documents=last.documents)
    checkpoint = create_fresh_checkpoint(folder / "fresh", given.start.shape, seed=0)
    return replace(
        given,
        start=replace(given.start, id=str(checkpoint), shape=None),
        stages=(stage,),
        optimizer=Optimizer("adamw"),
        data_workers=0,
        device=args.device,
    )


def make_batches(plan: TrainingPlan, checkpoint: Path) -> list[list[Example]]:
    """As many batches as a round has steps; each of neighbours in length, as both sides like them."""
    stage, make = plan.stages[0], ExampleMaker(checkpoint, plan.prompt)
    assert stage.documents is not None, "the last stage of the training file draws documents"
    draw = DrawDocument(DocumentGenerator("train", 0, stage.documents))
    examples = sorted(map(make, map(draw, range(stage.steps * stage.batch_size))), key=lambda each: len(each.token_ids))
    starts = np.random.default_rng(0).permutation(stage.steps) * stage.batch_size
    return [examples[start : start + stage.batch_size] for start in starts]


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("training_file", type=Path)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch-size", type=int, default=None, help="the last stage's own if left out")
    parser.add_argument("--steps", type=int, default=9, help="steps a round; the first is not timed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads")
    parser.add_argument("--smoke", action="store_true", help="tiny load: shows that it runs")
    args = parser.parse_args(argv)
    if args.smoke:
        args.batch_size, args.steps, args.rounds, args.threads = 4, 3, 2, 1
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name:
        plan = plan_of(args, Path(name))
        assert plan.start.id is not None
        checkpoint = Path(plan.start.id)
        batches = make_batches(plan, checkpoint)
        flops = flops_per_sample(plan, checkpoint, batches)
        sides = [ours(plan, checkpoint, batches), peer(plan, checkpoint, batches, name)]
        print(json.dumps(report(sides, plan, measure(sides, plan, args.rounds), flops)))


if __name__ == "__main__":
    main()
