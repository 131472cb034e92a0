"""Compile the Triton kernels for GPUs that need not be there, and tell as JSON what came out.

A script of its own: it needs TRITON_INTERPRET=0 before Triton is imported.
"""

import json
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from smolvlm.kernels.fused_triton import (
    gate_kernel,
    likeliest_kernel,
    norm_kernel,
    patches_kernel,
    quantize_kernel,
    rotate_kernel,
)
from smolvlm.kernels.paged_decode import NUM_STAGES, TILE
from smolvlm.kernels.paged_decode_triton import attend_kernel, join_kernel

FLOAT = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
GROUPS = {"256m": (3, 3), "2.2b": (32, 1)}  # key/value heads, query heads for each


def attend(size: str, dtype: str, splits: int, capability: int, pages: str | None = None) -> dict[str, Any]:
    kv_heads, group = GROUPS[size]
    part = "fp32" if splits > 1 else dtype
    types = {"q_ptr": f"*{dtype}", "kv_ptr": f"*{dtype}", "pages_ptr": f"*{pages or dtype}"}
    types |= {"table_ptr": "*i64", "positions_ptr": "*i64", "out_ptr": f"*{part}", "weights_ptr": f"*{part}"}
    strides = ("q_batch", "q_head", "kv_batch", "kv_part", "kv_head", "table_batch", "positions_batch")
    types |= dict.fromkeys(strides, "i32") | {"scale": "fp32"}
    sizes = {"KV_HEADS": kv_heads, "GROUP": group, "ROWS": 16, "HEAD_DIM": 64, "PAGE": 16, "TILE": TILE}
    constants = sizes | {"SPLITS": splits, "PRODUCT": FLOAT[dtype]}
    return _compiled(attend_kernel, types, constants, capability) | {"size": size, "dtype": dtype, "splits": splits}


def join(splits: int, capability: int) -> dict[str, Any]:
    types = {"parts_ptr": "*fp32", "weights_ptr": "*fp32", "out_ptr": "*bf16"}
    return _compiled(join_kernel, types, {"HEAD_DIM": 64, "SPLITS": splits}, capability)


def quantize(dtype: str, capability: int) -> dict[str, Any]:
    types = {"values_ptr": f"*{dtype}", "out_ptr": "*fp8e4nv", "scales_ptr": "*fp32"}
    return _compiled(quantize_kernel, types, {"SIZE": 768, "BLOCK": 1024}, capability)


def fused(capability: int) -> list[dict[str, Any]]:
    """All of smolvlm.kernels.fused, at 256M."""
    half = dict.fromkeys(("hidden_ptr", "delta_ptr", "weight_ptr", "bias_ptr", "out_ptr"), "*bf16")
    heads = {"heads_ptr": "*bf16", "positions_ptr": "*i64", "cos_ptr": "*bf16", "sin_ptr": "*bf16", "row_stride": "i32"}
    chosen = {"logits_ptr": "*bf16", "tokens_ptr": "*i64", "logprobs_ptr": "*fp32"}
    pixels = {"pixels_ptr": "*u8", "mean_ptr": "*fp32", "std_ptr": "*fp32", "out_ptr": "*bf16"}
    patch = {"SIDE": 512, "CHANNELS": 3, "PATCH": 16, "GRID": 32, "BLOCK": 1024}
    launches: list[tuple[Any, dict[str, str], dict[str, Any]]] = [
        (norm_kernel, half | {"eps": "fp32"}, {"SIZE": 768, "BLOCK": 1024, "ADDS": True, "CENTRES": True}),
        (norm_kernel, half | {"eps": "fp32"}, {"SIZE": 576, "BLOCK": 1024, "ADDS": False, "CENTRES": False}),
        (rotate_kernel, heads, {"HEADS": 12, "ROWS": 16, "HEAD_DIM": 64}),
        (gate_kernel, {"gate_up_ptr": "*bf16", "out_ptr": "*bf16"}, {"SIZE": 1536, "BLOCK": 1024}),
        (likeliest_kernel, chosen, {"SIZE": 49280, "BLOCK": 4096}),
        (patches_kernel, pixels, patch),
    ]
    return [_compiled(kernel, types, constants, capability) for kernel, types, constants in launches]


def _compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int) -> dict[str, Any]:
    """Pointers and strides are multiples of 16 elements or bytes, as those of the engine's tensors are."""
    signature = types | dict.fromkeys(constants, "constexpr")
    assert list(signature) == kernel.arg_names, "the launch passes other arguments"
    aligned = {(index,): [["tt.divisibility", 16]] for index, kind in enumerate(types.values()) if kind != "fp32"}
    options = {"num_stages": NUM_STAGES} if kernel is attend_kernel else {}
    source = ASTSource(kernel, signature, constants, aligned)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assembly = built.asm["ptx"]
    return {
        "kernel": kernel.fn.__name__,
        "capability": capability,
        "binary_bytes": len(built.asm["cubin"]),
        "shared_bytes": built.metadata.shared,
        "tensor_core_products": assembly.count("mma.sync"),
        "wide_copies": assembly.count("cp.async.cg"),
    }


if __name__ == "__main__":
    built = [attend("256m", "bf16", 1, 90), attend("2.2b", "bf16", 4, 80), attend("256m", "fp32", 1, 90), join(4, 90)]
    built += [attend("256m", "bf16", 1, 90, "fp8e4nv"), attend("2.2b", "bf16", 4, 89, "fp8e4nv")]
    built += [quantize("bf16", 90), quantize("bf16", 89)]
    print(json.dumps([*built, *fused(80), *fused(90)]))
