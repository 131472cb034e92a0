"""Weights in 8 bits: the kinds by name, where each runs, and rounding a model to one."""

from __future__ import annotations

import torch

from smolvlm.cpu.layers import check_int8, quantize_layers
from smolvlm.fp8 import check_fp8, quantize_encoder
from smolvlm.model import SmolVLM

CHECKS = {"int8": check_int8, "fp8": check_fp8}
QUANTIZERS = {"int8": quantize_layers, "fp8": quantize_encoder}


def check_quantization(name: str | None, device: torch.device, dtype: torch.dtype) -> None:
    """Raise ValueError for an unknown name, or where the device does not run it with hidden states of `dtype`."""
    if name is None:
        return
    if name not in CHECKS:
        raise ValueError(f"quantization is {name!r}; it must be 'int8' or 'fp8', or left out")
    CHECKS[name](device, dtype)


def quantize(model: SmolVLM, name: str | None) -> None:
    """Round a model in place. Raises ValueError if it has sizes that the products do not take."""
    if name is not None:
        QUANTIZERS[name](model)
