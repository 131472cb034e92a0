"""The engine beside transformers' batched `generate`: same random weights, prompts and token counts, in one process.

    python benchmarks/engine.py --size 256m --tiles 1 --tokens 64 --batch 1 4 16 --dtype bfloat16 --plot engine.png

Both start from what their own preparation hands them (uint8 tiles; normalised float pixels) and generate exactly
`--tokens` greedy tokens per image. The runs of the two alternate; the medians and the spread go into a table and, as
the last line, into one JSON object, beside what the device could do at best (measuring/limits.py). The figures at the
top of the object are those of the last batch size. The first token is that of one image alone. On a GPU a phase is
timed in a run that waits for its end, and the whole in one that does not: `overlap` is the share of the phases' time
that the second saves, by vision beside decode and by a host that runs ahead.

`--quantization int8` is of ours alone: the peer computes in `--dtype`. `--context` puts so many words before the
question, so that decoding has more to look back on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from measuring.hardware import provenance
from measuring.inputs import make_inputs
from measuring.limits import Load, Rates, limit_seconds, measure_rates
from measuring.plot import draw
from measuring.timing import now

from smolvlm import Engine, SamplingParams
from smolvlm.config import ModelConfig
from smolvlm.engine.runner import Runner
from smolvlm.processor import ModelInput
from smolvlm.scratch import SIZES, create_checkpoint

PHASES = ("vision", "prefill", "decode")


class Clock:
    """Seconds spent per phase. Waits for the device at both ends, so that a phase is charged what it caused."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self.waits = True

    def now(self) -> float:
        return now(self.device)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if not self.waits:
            yield
            return
        start = self.now()
        yield
        self.seconds[name] += self.now() - start


@dataclass(frozen=True)
class Run:
    """One timed pass over the batch: seconds in all and by phase, and the tokens that came out."""

    total_s: float
    phase_s: dict[str, float]
    token_ids: list[list[int]]


@dataclass
class Side:
    """Ours or the peer, with the runs made so far."""

    name: str
    once: Callable[[int, int], Run]  # (images, tokens)
    runs: list[Run] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)  # of one image alone


def watch_phases(runner: Runner, clock: Clock) -> None:
    """Put the stopwatch on each phase of this engine's runner."""
    for phase, name in zip(PHASES, ("encode", "prefill", "decode"), strict=True):
        setattr(runner, name, _timed(getattr(runner, name), clock, phase))


def _timed(work: Callable[[list[Any]], Any], clock: Clock, phase: str) -> Callable[[list[Any]], Any]:
    def timed(items: list[Any]) -> Any:
        with clock.phase(phase):
            return work(items)

    return timed


def ours(checkpoint: Path, inputs: list[ModelInput], args: argparse.Namespace) -> Side:
    engine = Engine.from_pretrained(
        checkpoint,
        args.device,
        args.dtype,
        max_num_sequences=len(inputs),
        tile_batch=args.tile_batch,
        quantization=args.quantization,
        prefix_caching=False,  # runs repeat their prompts
    )
    device = engine.runner.device
    clock = Clock(device)
    watch_phases(engine.runner, clock)

    def once(images: int, tokens: int) -> Run:
        clock.seconds = defaultdict(float)
        params = SamplingParams(max_new_tokens=tokens, ignore_eos=True)
        clock.waits = True
        start = clock.now()
        done = engine.generate(inputs[:images], params)
        total = clock.now() - start
        if device.type == "cuda":  # phases that wait for the device are not what the engine does
            clock.waits = False
            start = now(device)
            done = engine.generate(inputs[:images], params)
            total = now(device) - start
        return Run(total, dict(clock.seconds), [completion.token_ids for completion in done])

    return Side("ours", once)


def peer(checkpoint: Path, inputs: list[ModelInput], args: argparse.Namespace) -> Side:
    from transformers import Idefics3ForConditionalGeneration

    device = torch.device(args.device)
    model: Any = Idefics3ForConditionalGeneration.from_pretrained(checkpoint, dtype=getattr(torch, args.dtype))
    model.to(device).eval()
    model.generation_config.eos_token_id = None  # both generate exactly the asked number of tokens
    clock = Clock(device)
    _watch(model, clock)
    ids = torch.tensor([each.prompt_token_ids for each in inputs], device=device)
    pixels = torch.stack([torch.from_numpy(each.tiles[0].pixels) for each in inputs]).to(device)
    pixels = (pixels.permute(0, 1, 4, 2, 3).to(model.dtype) / 255 - 0.5) / 0.5  # [B, N, 3, S, S]

    def once(images: int, tokens: int) -> Run:
        clock.seconds = defaultdict(float)
        start = clock.now()
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids[:images],
                attention_mask=torch.ones_like(ids[:images]),
                pixel_values=pixels[:images],
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )
        total = clock.now() - start
        seconds = dict(clock.seconds)
        seconds["decode"] = total - seconds["vision"] - seconds["prefill"]
        return Run(total, seconds, out[:, ids.shape[1] :].tolist())

    return Side("transformers", once)


def _watch(model: Any, clock: Clock) -> None:
    """Time the peer's vision part and its first pass through the text model and head; the rest of a run is decoding."""
    marks: dict[str, float] = {}

    def start(name: str) -> Callable[..., None]:
        return lambda *_: marks.update({name: clock.now()})

    def stop(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if name not in clock.seconds:
                clock.seconds[name] = clock.now() - marks[name]

        return hook

    model.model.vision_model.register_forward_pre_hook(start("vision"))
    model.model.connector.register_forward_hook(stop("vision"))
    model.model.text_model.register_forward_pre_hook(start("prefill"))
    model.lm_head.register_forward_hook(stop("prefill"))


def summary(side: Side, load: Load) -> dict[str, Any]:
    """Medians over the runs: images/s with its spread, the rate of each phase, and the first token of one image."""
    rates = [load.batch / run.total_s for run in side.runs]
    work = {
        "vision": load.batch * load.tiles,
        "prefill": load.batch * load.prompt_tokens,
        "decode": load.batch * (load.tokens - 1),  # the first token comes from the prefill
    }
    seconds = {phase: statistics.median(run.phase_s.get(phase, 0.0) for run in side.runs) for phase in PHASES}
    return {
        "images_per_s": round(statistics.median(rates), 3),
        "images_per_s_min_max": [round(min(rates), 3), round(max(rates), 3)],
        "tiles_per_s": round(work["vision"] / seconds["vision"], 2) if seconds["vision"] else None,
        "prefill_tokens_per_s": round(work["prefill"] / seconds["prefill"], 1) if seconds["prefill"] else None,
        "decode_tokens_per_s": round(work["decode"] / seconds["decode"], 1) if work["decode"] else None,
        "first_token_s": round(statistics.median(side.first_token_s), 4),
        "overlap": round(1 - statistics.median(run.total_s for run in side.runs) / sum(seconds.values()), 3),
        "phase_s": {phase: round(seconds[phase], 4) for phase in PHASES},
    }


def compare(sides: list[Side], load: Load, limit_s: dict[str, float]) -> dict[str, Any]:
    """One batch size: both sides, their ratios, and the share of the limit that ours reaches, in all and by phase."""
    results = {side.name: summary(side, load) for side in sides}
    show(results, load.batch)
    mine, other = results["ours"], results.get("transformers")
    limit = load.batch / sum(limit_s.values())
    return {
        "batch": load.batch,
        "ours": mine["images_per_s"],
        "peer": other["images_per_s"] if other else None,
        "ratio": round(mine["images_per_s"] / other["images_per_s"], 3) if other else None,
        "first_token_ratio": round(other["first_token_s"] / mine["first_token_s"], 3) if other else None,
        "limit": round(limit, 3),
        "share": round(mine["images_per_s"] / limit, 3),
        "limit_s": {phase: round(seconds, 4) for phase, seconds in limit_s.items()},
        "phase_share": {
            phase: round(limit_s[phase] / mine["phase_s"][phase], 3) if mine["phase_s"][phase] else None
            for phase in PHASES
        },
        "same_tokens": same_tokens(sides),
        "details": results,
    }


def show(results: dict[str, dict[str, Any]], batch: int) -> None:
    print(f"\n{f'batch {batch}':24}" + "".join(f"{name:>22}" for name in results))
    for row in (key for key in results["ours"] if key != "phase_s"):
        print(f"{row:24}" + "".join(f"{result[row]!s:>22}" for result in results.values()))


def report(batches: list[dict[str, Any]], args: argparse.Namespace, prompt_tokens: int, rates: Rates) -> dict[str, Any]:
    return {
        "benchmark": "engine",
        "unit": "images/s",
        **batches[-1],
        "peer_name": None if args.peer == "none" else args.peer,
        "batches": batches,
        "rates": {"blocks_per_s": rates.blocks, "flops_per_s": rates.flops, "bytes_per_s": rates.bytes},
        "setting": {**vars(args), "prompt_tokens": prompt_tokens},
        **provenance(torch.device(args.device), "torch", "transformers"),
    }


def same_tokens(sides: list[Side]) -> float | None:
    """Share of the answers that are equal on both sides; below 1 in low precision, where near-ties fall either way."""
    if len(sides) < 2:
        return None
    pairs = list(zip(sides[0].runs[-1].token_ids, sides[1].runs[-1].token_ids, strict=True))
    return round(sum(mine == other for mine, other in pairs) / len(pairs), 3)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", default="256m", choices=list(SIZES))
    parser.add_argument("--tiles", type=int, default=1, help="tiles per image, the global one included")
    parser.add_argument("--tokens", type=int, default=64, help="tokens generated per image")
    parser.add_argument("--batch", type=int, nargs="+", default=[8], help="images generated together; several: in turn")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--quantization", default=None, choices=["int8", "fp8"], help="of our engine's weights")
    parser.add_argument("--layers", type=int, default=None, help="of encoder and decoder each; default: all")
    parser.add_argument("--context", type=int, default=0, help="words put before the question")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads")
    parser.add_argument("--tile-batch", type=int, default=None, help="tiles per encoder batch; default: the engine's")
    parser.add_argument("--peer", default="transformers", choices=["transformers", "none"])
    parser.add_argument("--plot", default=None, help="PNG to draw: images/s against batch, time by phase")
    parser.add_argument("--smoke", action="store_true", help="tiny model, tiny load: shows that it runs")
    args = parser.parse_args(argv)
    if args.smoke:
        args.tokens, args.batch, args.repeats, args.threads = 4, [1, 2], 2, 1
        args.size, args.layers = ("256m", 1) if args.quantization else ("tiny", None)  # tiny's heads are too small
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    dtype, in_int8 = getattr(torch, args.dtype), args.quantization == "int8"
    rates = measure_rates(torch.device(args.device), dtype, 64 if args.smoke else 2048, in_int8)
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = create_checkpoint(
            Path(directory) / args.size,
            args.size,
            num_text_layers=args.layers,
            num_vision_layers=args.layers,
            dtype=args.dtype,
        )
        inputs = make_inputs(checkpoint, args.tiles, max(args.batch), args.context)
        sides = [ours(checkpoint, inputs, args)]
        if args.peer != "none":
            sides.append(peer(checkpoint, inputs, args))
        config, prompt_tokens = ModelConfig.from_pretrained(checkpoint), len(inputs[0].prompt_token_ids)
        warm_up(sides, args)
        batches = []
        for batch in args.batch:
            load = Load(batch, args.tiles, prompt_tokens, args.tokens)
            measure(sides, load, args.repeats)
            batches.append(compare(sides, load, limit_seconds(config, load, dtype, rates, in_int8)))
    if args.plot:
        numbers = args.dtype + (f", ours {args.quantization}" if args.quantization else "")
        title = f"SmolVLM-{args.size}, tiles: {args.tiles}, tokens: {args.tokens}, {numbers}"
        draw(batches, title, Path(args.plot))
    print(json.dumps(report(batches, args, prompt_tokens, rates)))


def warm_up(sides: list[Side], args: argparse.Namespace) -> None:
    """Generate a little, then time the first token of one image; the sides take turns, as in `measure`."""
    for side in sides:
        side.once(max(args.batch), min(4, args.tokens))
    for repeat in range(args.repeats):
        for side in sides if repeat % 2 == 0 else reversed(sides):
            side.first_token_s.append(side.once(1, 1).total_s)


def measure(sides: list[Side], load: Load, repeats: int) -> None:
    """Alternate the sides, so that both see the same machine; the order turns round each time."""
    for side in sides:
        side.runs = []
    for repeat in range(repeats):
        for side in sides if repeat % 2 == 0 else reversed(sides):
            side.runs.append(side.once(load.batch, load.tokens))
            print(f"{side.name}: {load.batch / side.runs[-1].total_s:.3f} images/s", flush=True)


if __name__ == "__main__":
    main()
