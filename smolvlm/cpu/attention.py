"""The native attention functions behind tensors; each gives None where it does not apply, and torch's operator does."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from smolvlm.cpu.build import declared, native_library
from smolvlm.precision import E4M3

HEAD_DIM = 64  # of all published sizes in the text model, of 256M and 500M in the encoder
MAX_GROUP = 4  # query heads that share a key head
DTYPES = (torch.float32, torch.bfloat16)


class _Decode(ctypes.Structure):
    """`Decode` of attention.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "cache", "table", "positions", "out")),
        *((name, ctypes.c_int64) for name in ("batch", "q_stride", "table_stride", "kv_heads")),
        *((name, ctypes.c_int64) for name in ("group", "block_size", "threads")),
    )


class _Dense(ctypes.Structure):
    """`Dense` of attention.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "length")),
        ("strides", ctypes.c_int64 * 9),
        ("threads", ctypes.c_int64),
    )


def decode_attention(q: Tensor, cache: Tensor, block_table: Tensor, positions: Tensor) -> Tensor | None:
    """One query a sequence over the pages of its keys and values, each read once: → [B, heads, D].

    q is [B, heads, D], cache [blocks, block_size, 2, kv_heads, D] in the dtype of q or e4m3, block_table int64 [B, N],
    positions int64 [B]: keys 0..positions[b] are seen. A sequence's result does not depend on the others.
    """
    library, kv_heads = _decode_library(), cache.shape[3]
    group = q.shape[1] // kv_heads
    if library is None or q.device.type != "cpu" or q.shape[2] != HEAD_DIM or group > MAX_GROUP:
        return None
    if q.dtype not in DTYPES or q.stride()[1:] != (HEAD_DIM, 1):
        return None
    assert all(tensor.is_contiguous() for tensor in (cache, positions)), "pages and positions are read in one run"
    assert cache.dtype in (q.dtype, E4M3)
    assert block_table.stride(1) == 1
    out = torch.empty(q.shape, dtype=q.dtype)
    pointers = (tensor.data_ptr() for tensor in (q, cache, block_table, positions, out))
    sizes = (len(q), q.stride(0), block_table.stride(0), kv_heads, group, cache.shape[1], torch.get_num_threads())
    library(ctypes.byref(_Decode(*pointers, *sizes)), q.dtype == torch.bfloat16, cache.dtype == E4M3)
    return out


def encoder_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
    """Attention without a mask: [B, heads, T, 64] in bfloat16 → the same, a view of [B, T, heads, 64].

    For CPUs that multiply bfloat16 in vector registers but not in tiles (AMX), where torch's operator is good.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or q.shape[3] != HEAD_DIM or k.shape != q.shape:
        return None
    library = _dense_library()
    if library is None or any(tensor.stride(3) != 1 for tensor in (q, k, v)):
        return None
    batch, heads, length, _ = q.shape
    out = torch.empty(batch, length, heads, HEAD_DIM, dtype=q.dtype)
    strides = (ctypes.c_int64 * 9)(*(stride for tensor in (q, k, v) for stride in tensor.stride()[:3]))
    pointers = (tensor.data_ptr() for tensor in (q, k, v, out))
    library(ctypes.byref(_Dense(*pointers, batch, heads, length, strides, torch.get_num_threads())))
    return out.transpose(1, 2)


@cache
def _decode_library() -> ctypes._NamedFuncPointer | None:
    library = native_library("attention")
    if library is None:
        return None
    return declared(library.paged_decode, ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_bool)


@cache
def _dense_library() -> ctypes._NamedFuncPointer | None:
    """None too where the processor has no such instructions."""
    library = native_library("attention")
    if library is None or not declared(library.has_dense_attention, ctypes.c_bool)():
        return None
    return declared(library.dense_attention, ctypes.c_bool, ctypes.c_void_p)
