"""Image preparation: file bytes → tiles on one core: ours, exact and `fast`, and transformers' PIL processor.

    python benchmarks/prepare.py [--smoke] [--repeats N]

All decode the same JPEG and PNG files, in one process, taking turns image by image. The exact tiles are compared with
transformers' byte by byte first, the fast ones with the exact ones: absolute differences in steps of 8-bit values.
transformers gets its pixels as its model wants them: float32, normalised; ours stay uint8, since the engine normalises
on the device. The last line of stdout is one JSON object: images per second and per core.
"""

import argparse
import io
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core each; before numpy starts its threads

import numpy as np
import numpy.typing as npt
import PIL
import transformers
from PIL import Image, ImageDraw, ImageFilter
from rich.console import Console
from rich.table import Table
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from smolvlm.config import ImageConfig
from smolvlm.image import ImagePolicy, decode_image, split_decoded
from smolvlm.scratch import SIZES

UInt8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Case:
    """One kind of image: how to draw it, and how it is split."""

    name: str
    draw: Callable[[int, int, int], Image.Image]
    size: tuple[int, int]
    format: str
    num_tiles: int
    splitting: bool = True


@dataclass(frozen=True)
class Difference:
    """Fast tiles less exact ones, absolute, in steps of 8-bit values."""

    mean: float
    percentile_99: float
    largest: int


@dataclass(frozen=True)
class Result:
    """Images per second in each repeat; `fast` is another way than `ours`, with other pixels."""

    case: Case
    ours: list[float]
    fast: list[float]
    peer: list[float]
    difference: Difference


def photograph(width: int, height: int, seed: int) -> Image.Image:
    """Soft shapes and sensor noise: compresses like a photograph."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    return Image.fromarray(np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8))


def page(width: int, height: int, seed: int) -> Image.Image:
    """A scanned page: lines of word-like strokes on paper."""
    rng = np.random.default_rng(seed)
    sheet = Image.new("RGB", (width, height), (250, 249, 245))
    pen = ImageDraw.Draw(sheet)
    for top in range(height // 12, height - height // 12, max(height // 60, 3)):
        left = width // 10
        while left < width * 9 // 10:
            word = int(rng.integers(width // 60 + 1, width // 12 + 2))
            pen.rectangle((left, top, left + word, top + max(height // 150, 1)), fill=(30, 30, 40))
            left += word + width // 90 + 1
    return sheet.filter(ImageFilter.GaussianBlur(0.6))


def grey_page(width: int, height: int, seed: int) -> Image.Image:
    return page(width, height, seed).convert("L").convert("RGB")


def cases(smoke: bool) -> list[Case]:
    photo, letter, thumb = ((40, 30), (51, 66), (16, 12)) if smoke else ((1600, 1200), (1275, 1650), (640, 480))
    camera, scan = ((400, 300), (204, 264)) if smoke else ((4000, 3000), (2550, 3300))
    return [
        Case("camera, 13 tiles", photograph, camera, "JPEG", 13),
        Case("camera, unsplit", photograph, camera, "JPEG", 1, splitting=False),
        Case("scan, 17 tiles", page, scan, "JPEG", 17),
        Case("scan, unsplit", page, scan, "JPEG", 1, splitting=False),
        Case("photo, 13 tiles", photograph, photo, "JPEG", 13),
        Case("page, 17 tiles", page, letter, "PNG", 17),
        Case("grey page, 17 tiles", grey_page, letter, "JPEG", 17),
        Case("small photo, 13 tiles", photograph, thumb, "JPEG", 13),
        Case("photo, unsplit", photograph, photo, "JPEG", 1, splitting=False),
    ]


def encode(case: Case, seed: int) -> bytes:
    buffer = io.BytesIO()
    case.draw(*case.size, seed).save(buffer, case.format)
    return buffer.getvalue()


def image_config(smoke: bool) -> ImageConfig:
    """The published policy of SmolVLM-256M, or that of the tiny checkpoint of the tests."""
    shape = SIZES["tiny" if smoke else "256m"]
    half = (0.5, 0.5, 0.5)
    return ImageConfig(shape.vision.image_size, shape.longest_edge, do_image_splitting=True, mean=half, std=half)


def peer_processor(config: ImageConfig, pixels_only: bool) -> Idefics3ImageProcessorPil:
    return Idefics3ImageProcessorPil(
        size={"longest_edge": config.longest_edge},
        max_image_size={"longest_edge": config.tile_size},
        image_mean=list(config.mean),
        image_std=list(config.std),
        do_rescale=not pixels_only,
        do_normalize=not pixels_only,
    )


def prepare_ours(data: bytes, config: ImageConfig, splitting: bool, fast: bool = False) -> UInt8:
    policy = ImagePolicy(image_splitting=splitting, fast=fast)
    return split_decoded(decode_image(data, needed=policy.needed(config)), config, policy).pixels


def prepare_peer(data: bytes, processor: Idefics3ImageProcessorPil, splitting: bool) -> npt.NDArray[Any]:
    image = Image.open(io.BytesIO(data))
    batch: Any = processor.preprocess(image, do_image_splitting=splitting, return_tensors="np")
    pixels: npt.NDArray[Any] = batch["pixel_values"][0]
    return pixels


def assert_equal_tiles(case: Case, files: list[bytes], config: ImageConfig) -> None:
    processor = peer_processor(config, pixels_only=True)
    for data in files:
        ours = prepare_ours(data, config, case.splitting)
        theirs = prepare_peer(data, processor, case.splitting).transpose(0, 2, 3, 1)
        if len(ours) != case.num_tiles or not np.array_equal(ours, theirs):
            raise SystemExit(f"{case.name}: the tiles differ from those of transformers")


def differences(case: Case, files: list[bytes], config: ImageConfig) -> Difference:
    exact = np.stack([prepare_ours(data, config, case.splitting) for data in files])
    fast = np.stack([prepare_ours(data, config, case.splitting, fast=True) for data in files])
    apart = np.abs(fast.astype(np.int16) - exact)
    return Difference(float(apart.mean()), float(np.percentile(apart, 99)), int(apart.max()))


def measure(case: Case, files: list[bytes], config: ImageConfig, repeats: int) -> Result:
    assert_equal_tiles(case, files, config)
    processor = peer_processor(config, pixels_only=False)
    result = Result(case, [], [], [], differences(case, files, config))
    for _ in range(repeats):
        exact, fast, theirs = 0.0, 0.0, 0.0
        for data in files:
            exact += seconds(prepare_ours, data, config, case.splitting)
            fast += seconds(prepare_ours, data, config, case.splitting, True)
            theirs += seconds(prepare_peer, data, processor, case.splitting)
        for rates, spent in zip((result.ours, result.fast, result.peer), (exact, fast, theirs), strict=True):
            rates.append(len(files) / spent)
    return result


def seconds(work: Callable[..., object], *arguments: object) -> float:
    """Processor time of this thread: another process on the core does not count."""
    start = time.thread_time()
    work(*arguments)
    return time.thread_time() - start


def show(results: list[Result]) -> None:
    rates = Table("case", "ours, images/s", "fast", "transformers", "ours / transformers", "fast / ours")
    pixels = Table("fast against exact, steps of 8 bits", "mean", "99th percentile", "largest")
    for result in results:
        sides = [f"{statistics.median(side):.2f}" for side in (result.ours, result.fast, result.peer)]
        rates.add_row(result.case.name, *sides, spread(result.ours, result.peer), spread(result.fast, result.ours))
        apart = result.difference
        pixels.add_row(result.case.name, f"{apart.mean:.2f}", f"{apart.percentile_99:.0f}", f"{apart.largest}")
    console = Console(width=118)
    console.print(rates)
    console.print(pixels)
    print(f"one core, {platform.machine()}; pillow {PIL.__version__}, transformers {transformers.__version__}")


def spread(rates: list[float], others: list[float]) -> str:
    """The ratio of the medians, and the lowest and highest of a repeat."""
    ratios = [rate / other for rate, other in zip(rates, others, strict=True)]
    ratio = statistics.median(rates) / statistics.median(others)
    return f"{ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def summary(results: list[Result]) -> dict[str, Any]:
    """The means are those of a job that holds as many images of each case."""
    sides = ("ours", "fast", "peer")
    cases = {r.case.name: {side: statistics.median(getattr(r, side)) for side in sides} for r in results}
    means = {side: statistics.harmonic_mean([case[side] for case in cases.values()]) for side in sides}
    return {
        **compared(means),
        "unit": "images/s per core",
        "cases": {r.case.name: {**compared(cases[r.case.name]), "difference": asdict(r.difference)} for r in results},
    }


def compared(rates: dict[str, float]) -> dict[str, float]:
    return {**rates, "ratio": rates["ours"] / rates["peer"], "fast_ratio": rates["fast"] / rates["ours"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny images, for tests")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--images", type=int, default=4, help="different images in each case")
    options = parser.parse_args()
    config = image_config(options.smoke)
    results = []
    for case in cases(options.smoke):
        files = [encode(case, seed) for seed in range(1 if options.smoke else options.images)]
        results.append(measure(case, files, config, options.repeats))
    show(results)
    print(json.dumps(summary(results)))


if __name__ == "__main__":
    main()
