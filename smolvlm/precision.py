"""Which numbers a model computes in, by name."""

from __future__ import annotations

import platform
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO = "auto"
FP8 = "fp8"
E4M3 = torch.float8_e4m3fn  # 4 bits of exponent, 3 of mantissa
LARGEST_E4M3 = torch.finfo(E4M3).max  # 448
FP8_CAPABILITY = (8, 9)  # of the first GPUs with instructions for it
CPU_INFO = Path("/proc/cpuinfo")  # of Linux
FP8_NEEDS = "8-bit floats need a CPU, or a GPU of compute capability 8.9 or above"


def dtype_named(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a name; `auto` is bfloat16 where the device is fast at it, float32 elsewhere.

    Raises:
        ValueError: there is no such name.
    """
    if name == AUTO:
        return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}; it must be one of {', '.join((AUTO, *DTYPES))}")
    return DTYPES[name]


def name_of(dtype: torch.dtype) -> str:
    """The name of a dtype, without its module."""
    return str(dtype).removeprefix("torch.")


def cache_dtype_named(name: str, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of cached keys and values: `auto` is `dtype`, the one that the model computes in; `fp8` is e4m3.

    Raises:
        ValueError: there is no such name, or the device has no such numbers.
    """
    if name == AUTO:
        return dtype
    if name != FP8:
        raise ValueError(f"kv_cache_dtype is {name!r}; it must be 'auto' or 'fp8'")
    if not has_fp8(device):
        raise ValueError(f"kv_cache_dtype is 'fp8' and device {str(device)!r}; {FP8_NEEDS}: leave it out here")
    return E4M3


def has_fp8(device: torch.device) -> bool:
    """Whether e4m3 is computed with on this device; a CPU does it in software."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= FP8_CAPABILITY
    return device.type == "cpu"


def to_e4m3(values: Tensor) -> Tensor:
    """The nearest e4m3 to each value; the largest there is to what lies beyond it."""
    return values.clamp(-LARGEST_E4M3, LARGEST_E4M3).to(E4M3)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is the fast one. A CPU without instructions for it takes several times as long as in
    float32; a GPU that this project runs on has them.

    Intel's processors do it well in tiles (AMX) only, which some virtual machines hide: their vector instruction
    reached 83 GFLOP/s of a core on Emerald Rapids, float32 168. AMD's takes half the time of float32.
    """
    if device.type != "cpu":
        return True
    if platform.machine() in ("aarch64", "arm64"):
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.cpu._is_amx_tile_supported() or (torch.cpu._is_avx512_bf16_supported() and not _is_intel())


def _is_intel() -> bool:
    return CPU_INFO.exists() and "GenuineIntel" in CPU_INFO.read_text()
