"""Native 8-bit integer products behind tensors: weights packed once, and the two calls on them.

Each output column of a weight has its own scale, each row of inputs a scale and an offset chosen when it comes (dynamic
quantisation), so that an answer does not depend on what else is in the batch; torch's own dynamic operators choose one
scale for all rows. Hidden states keep the model's dtype between calls.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smolvlm.cpu.build import declared, native_library

BLOCK = 64  # outputs that are finished together
VECTOR = 16  # sizes are multiples of it
LARGEST = 127


class _Linear(ctypes.Structure):
    """`Linear` of layers.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "scale", "sums", "bias")),
        *((name, ctypes.c_int64) for name in ("inputs", "outputs")),
    )


class _Norm(ctypes.Structure):
    """`Norm` of layers.cpp."""

    _fields_ = (("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("eps", ctypes.c_double))


class _Product(ctypes.Structure):
    """`Product` of layers.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "out")),
        *(("norm", _Norm), ("linear", _Linear)),
        *((name, ctypes.c_void_p) for name in ("cos", "sin")),
        *((name, ctypes.c_int64) for name in ("rows", "rotated", "threads")),
    )


class _Tail(ctypes.Structure):
    """`Tail` of layers.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("attended", "hidden", "out")),
        *((name, _Linear) for name in ("output", "up", "down")),
        ("norm", _Norm),
        *((name, ctypes.c_int64) for name in ("rows", "gated", "threads")),
    )


class Int8Linear:
    """The weight and bias of a linear layer as the native products read them."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.outputs, inputs = weight.shape
        assert self.outputs % VECTOR == inputs % VECTOR == 0
        integers, scale, sums = quantized(weight)
        self._tensors = [_packed(integers), *(_padded(each) for each in (scale, sums, bias))]
        self.native = _Linear(*_pointers(self._tensors), inputs, self.outputs)


class NativeNorm:
    """The weights of a LayerNorm or RMSNorm."""

    def __init__(self, norm: nn.LayerNorm | nn.RMSNorm) -> None:
        self._tensors = [norm.weight, norm.bias if isinstance(norm, nn.LayerNorm) else None]
        self.native = _Norm(*_pointers(self._tensors), norm.eps)


def quantized(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weight [outputs, inputs] → int8 of it, what 1 counts in each row, what each row sums up to, float32 [outputs]."""
    weight = weight.detach().float()
    scale = weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / LARGEST
    integers = (weight / scale.unsqueeze(1)).round_()
    return integers.to(torch.int8), scale, scale * integers.sum(1)


def product(
    x: Tensor, linear: Int8Linear, norm: NativeNorm | None = None, rotary: tuple[Tensor, Tensor, int] | None = None
) -> Tensor:
    """x [.., inputs] → norm → linear → [.., outputs], in the dtype of x, float32 or bfloat16.

    rotary: cos and signed sin [T, 64] of the T rows, and the number of heads of 64, from the first, that are turned.
    """
    x = x.contiguous()
    out = torch.empty(*x.shape[:-1], linear.outputs, dtype=x.dtype)
    cos, sin, heads = (None, None, 0) if rotary is None else (rotary[0].data_ptr(), rotary[1].data_ptr(), rotary[2])
    rows, threads = x.numel() // x.shape[-1], torch.get_num_threads()
    normed = _Norm() if norm is None else norm.native
    job = _Product(x.data_ptr(), out.data_ptr(), normed, linear.native, cos, sin, rows, heads, threads)
    _function("product")(ctypes.byref(job), x.dtype == torch.bfloat16)
    return out


def tail(
    attended: Tensor, hidden: Tensor, output: Int8Linear, norm: NativeNorm, mlp: tuple[Int8Linear, Int8Linear]
) -> Tensor:
    """What follows attention in a block: h = hidden + output(attended); h + down(activation(up(norm(h)))).

    The activation is tanh-GELU, or where `up` has twice as many outputs as `down` has inputs silu(gate) * up, with
    gate and up in turns of 32 (interleaved).
    """
    attended, hidden, (up, down) = attended.contiguous(), hidden.contiguous(), mlp
    assert attended.dtype == hidden.dtype
    out = torch.empty_like(hidden)
    pointers = (tensor.data_ptr() for tensor in (attended, hidden, out))
    gated = up.outputs != down.native.inputs
    rows, threads = hidden.numel() // hidden.shape[-1], torch.get_num_threads()
    job = _Tail(*pointers, output.native, up.native, down.native, norm.native, rows, gated, threads)
    _function("tail")(ctypes.byref(job), hidden.dtype == torch.bfloat16)
    return out


def interleaved(gate_up: Tensor) -> Tensor:
    """Rows of gate and up [2 * I, inputs], one below the other → in turns of 32, so that a block holds both."""
    turns: Tensor = gate_up.unflatten(0, (2, -1, BLOCK // 2)).transpose(0, 1).flatten(0, 2)
    return turns


@cache
def has_int8() -> bool:
    """Whether there is a compiler, and a processor with AVX-512 VNNI or AVX2."""
    library = native_library("layers")
    return library is not None and library.columns_of_tile() > 0


@cache
def _function(name: str) -> ctypes._NamedFuncPointer:
    library = native_library("layers")
    assert library is not None, "who packs has asked has_int8"
    return declared(getattr(library, name), None, ctypes.c_void_p, ctypes.c_bool)


def _packed(integers: Tensor) -> Tensor:
    """[outputs, inputs] → [outputs / columns, inputs / word, columns, word], as this processor's products read them."""
    library = native_library("layers")
    assert library is not None, "who packs has asked has_int8"
    columns, word = library.columns_of_tile(), library.inputs_of_word()
    padded = F.pad(integers, (0, 0, 0, -len(integers) % BLOCK))
    blocks: Tensor = padded.unflatten(1, (-1, word)).unflatten(0, (-1, columns)).transpose(1, 2).contiguous()
    return blocks


def _padded(values: Tensor | None) -> Tensor | None:
    return None if values is None else F.pad(values.detach().float(), (0, -len(values) % BLOCK))


def _pointers(tensors: Sequence[Tensor | None]) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]
