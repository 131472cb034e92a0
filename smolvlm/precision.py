"""Which numbers a model computes in, by name."""

from __future__ import annotations

import platform

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO = "auto"


def dtype_named(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a name; `auto` is bfloat16 where the device multiplies it in hardware, float32 elsewhere.

    Raises:
        ValueError: there is no such name.
    """
    if name == AUTO:
        return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}; it must be one of {', '.join((AUTO, *DTYPES))}")
    return DTYPES[name]


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is the fast one. A CPU without instructions for it takes several times as long as in
    float32; a GPU that this project runs on has them."""
    if device.type != "cpu":
        return True
    if platform.machine() in ("aarch64", "arm64"):
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
