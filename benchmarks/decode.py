"""A GPU's decode step: replayed as a CUDA graph beside torch's operators one by one, and the attention kernel alone.

    python benchmarks/decode.py --size 256m --batch 128 --context 1200

Random weights and tokens; both sides take turns on the same device. A step is limited by the bytes that it must read
(weights of the text model once, keys and values of all sequences) at the bandwidth that a plain copy on this device
reaches. The last line is one JSON object. `--smoke` shows on a CPU that it runs: without a graph, and with the kernel
interpreted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

if "--smoke" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from measuring.hardware import provenance
from measuring.limits import decode_bytes
from measuring.timing import median_seconds, now
from torch import Tensor

from smolvlm import Engine, SamplingParams
from smolvlm.attention import KVCache, paged_decode
from smolvlm.config import ModelConfig
from smolvlm.engine.cuda_graph import GraphCapture
from smolvlm.engine.engine import BLOCK_SIZE
from smolvlm.engine.runner import DecodeMode
from smolvlm.engine.static_decode import STEPS, DecodeAttention, StaticDecoder
from smolvlm.kernels.paged_decode import fused_paged_decode
from smolvlm.precision import DTYPES
from smolvlm.processor import ModelInput
from smolvlm.scratch import SIZES, create_checkpoint

WARM_UP_VISITS = 3
COPIED_BYTES = 2**30
KERNELS: dict[str, DecodeAttention] = {"graph": fused_paged_decode, "eager": paged_decode}


def engines(checkpoint: Path, args: argparse.Namespace) -> dict[str, Engine]:
    """One engine a side, each with `batch` sequences of `context` tokens under way."""
    made = {}
    for side in ("graph", "eager"):
        decode: DecodeMode = "graph" if side == "graph" and args.device.startswith("cuda") else "eager"
        options = {
            "max_num_sequences": args.batch,
            "kv_cache_bytes": cache_bytes(checkpoint, args),
            "prefix_caching": False,
        }
        engine = Engine.from_pretrained(checkpoint, args.device, args.dtype, decode=decode, **options)
        if side != decode:
            runner = engine.runner
            runner.static = StaticDecoder(runner.model, runner.cache, runner.device, paged_decode, lambda step: step)
        made[side] = fill(engine, args)
    return made


def cache_bytes(checkpoint: Path, args: argparse.Namespace) -> int:
    """What the sequences fill, and the share that an engine keeps for online ones."""
    token = KVCache.block_bytes(ModelConfig.from_pretrained(checkpoint).text, 1, DTYPES[args.dtype])
    return int(args.batch * (args.context + num_tokens(args) + 2 * BLOCK_SIZE) * token * 8 // 7)


def num_tokens(args: argparse.Namespace) -> int:
    """Enough for whole visits of the host, and for those that are started ahead."""
    visits = WARM_UP_VISITS + args.repeats * -(-args.steps // STEPS) + 2
    return int(visits * STEPS)


def fill(engine: Engine, args: argparse.Namespace) -> Engine:
    generator = torch.Generator().manual_seed(0)
    params = SamplingParams(max_new_tokens=num_tokens(args), ignore_eos=True)
    highest = engine.config.image_token_id  # text tokens lie below
    for _ in range(args.batch):
        ids = torch.randint(highest, (args.context,), generator=generator).tolist()
        engine.add(ModelInput(ids, []), params)
    while len(engine.scheduler.running) < args.batch:
        engine.step()
    for _ in range(WARM_UP_VISITS):
        engine.step()
    return engine


def step_seconds(engine: Engine, steps: int) -> float:
    """Seconds of one step, in visits of the host that come to `steps` or more.

    The device is idle at both ends: a visit that was started ahead before is made up for by the one behind.
    """
    device, before, sequences = engine.runner.device, engine.counters.generated_tokens, len(engine.scheduler.running)
    start, done = now(device), 0
    while done < steps * sequences:
        engine.step()
        done = engine.counters.generated_tokens - before
    return (now(device) - start) * sequences / done


def copy_bandwidth(device: torch.device, size: int, repeats: int) -> float:
    """Bytes a second, read and written, of a plain copy."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / median_seconds(lambda: target.copy_(source), device, repeats)


def kernel_seconds(side: str, cache: KVCache, args: argparse.Namespace) -> float:
    """One layer's attention for the batch at its context."""
    device, (_, kv_heads, head_dim) = cache.storage.device, cache.token_shape
    pages = -(-args.context // BLOCK_SIZE)
    table = torch.arange(args.batch * pages, device=device).view(args.batch, pages)
    positions = torch.full((args.batch,), args.context - 1, device=device)
    attention = KERNELS[side](positions, table, cache)
    heads = SIZES[args.size].text.num_attention_heads
    q, kv = (_noise(cache, args.batch, *shape) for shape in ((heads, head_dim), (2, kv_heads, head_dim)))
    layers = range(len(cache.storage))  # another layer each time: no key is still in a cache of the device

    def work() -> None:
        for layer in layers:
            attention.attend(layer, q, kv)

    captured = GraphCapture(device)(work) if device.type == "cuda" else work  # launches are not what is measured
    return median_seconds(captured, device, args.repeats) / len(layers)


def _noise(cache: KVCache, *shape: int) -> Tensor:
    return torch.randn(shape, device=cache.storage.device, dtype=cache.storage.dtype)


@torch.inference_mode()
def measure(checkpoint: Path, args: argparse.Namespace) -> dict[str, Any]:
    sides = engines(checkpoint, args)
    times: dict[str, list[float]] = {side: [] for side in sides}
    for repeat in range(args.repeats):
        for side in sides if repeat % 2 == 0 else reversed(sides):
            times[side].append(step_seconds(sides[side], args.steps))
    cache = sides["graph"].runner.cache
    bandwidth = copy_bandwidth(cache.storage.device, args.copied_bytes, args.repeats)
    half_way = args.batch * (args.context + num_tokens(args) // 2)  # tokens
    limit_s = decode_bytes(sides["graph"].config, half_way, DTYPES[args.dtype]) / bandwidth
    layer_bytes = args.batch * args.context * cache.storage[0, 0, 0].nbytes
    kernels = {side: kernel_seconds(side, cache, args) for side in KERNELS}
    return {
        "copy_gb_per_s": round(bandwidth / 1e9, 1),
        "limit_ms": round(1e3 * limit_s, 4),
        "step_ms": {side: round(1e3 * statistics.median(each), 4) for side, each in times.items()},
        "step_ms_min_max": {side: [round(1e3 * f(each), 4) for f in (min, max)] for side, each in times.items()},
        "share_of_limit": {side: round(limit_s / statistics.median(each), 3) for side, each in times.items()},
        "attention_ms": {side: round(1e3 * each, 4) for side, each in kernels.items()},
        "attention_gb_per_s": {side: round(layer_bytes / each / 1e9, 1) for side, each in kernels.items()},
    }


def report(measured: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    step_ms = measured["step_ms"]
    return {
        "benchmark": "decode",
        "unit": "tokens/s",
        "ours": round(1e3 * args.batch / step_ms["graph"], 1),
        "peer": round(1e3 * args.batch / step_ms["eager"], 1),
        "ratio": round(step_ms["eager"] / step_ms["graph"], 3),
        "peer_name": "torch's operators one by one",
        "details": measured,
        "setting": vars(args),
        **provenance(torch.device(args.device), "torch", "triton"),
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", default="256m", choices=list(SIZES))
    parser.add_argument("--batch", type=int, default=128, help="sequences decoded together")
    parser.add_argument("--context", type=int, default=1200, help="tokens of each at the start")
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES))
    parser.add_argument("--steps", type=int, default=24, help="steps in a row of one side")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--copied-bytes", type=int, default=COPIED_BYTES, help="size of the copy that sets the limit")
    parser.add_argument("--smoke", action="store_true", help="tiny model on a CPU: shows that it runs")
    args = parser.parse_args(argv)
    if args.smoke:
        args.device, args.size, args.batch, args.context, args.dtype = "cpu", "tiny", 3, 40, "float32"
        args.steps, args.repeats, args.copied_bytes = 2, 2, 2**20
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = create_checkpoint(Path(directory) / args.size, args.size, num_vision_layers=1, dtype=args.dtype)
        measured = measure(checkpoint, args)
    for name, value in measured.items():
        print(f"{name:20} {value}")
    print(json.dumps(report(measured, args)))


if __name__ == "__main__":
    main()
