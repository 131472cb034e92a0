"""Linear layers in oneDNN's own weight layout, for inference on a CPU.

torch's plain linear reorders its weight, or reads it in an order that the cores do not like, on every call. Packed
once, a product with few rows takes about two thirds of the time, and the encoder's GELU runs inside its product.
The operators are those that torch's own compiler emits on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smolvlm.vision import VisionMLP


class PackedLinear(nn.Module):
    """A linear layer [.., inputs] → [.., outputs] with its weight packed, followed by tanh-GELU if `gelu`.

    It has no parameters any more: it can be neither trained nor saved.
    """

    def __init__(self, linear: nn.Linear, gelu: bool = False) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.activation: tuple[str, list[float], str] = ("gelu", [], "tanh") if gelu else ("none", [], "")

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, *self.activation)
        return outputs


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this CPU and this build of torch multiply packed weights of `dtype`."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack_linears(model: nn.Module) -> None:
    """Replace every linear layer of a model by its packed form, one after the other: memory grows by one layer only."""
    for module in list(model.modules()):
        if isinstance(module, VisionMLP) and isinstance(module.up, nn.Linear):
            module.up, module.activation = PackedLinear(module.up, gelu=True), nn.Identity()
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child))
