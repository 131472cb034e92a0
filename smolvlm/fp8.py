"""The vision encoder's matrix products in 8-bit floats (e4m3), for inference on GPUs that multiply them faster.

Weights have a scale for each output. Inputs have one for each row, chosen when they come, so that an answer does not
depend on what else is in the batch. Sums are float32. Patches, connector and text model keep their dtype: they are a
small part of the work or, decoding, bound by memory.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import ScalingType

from smolvlm.precision import FP8_NEEDS, LARGEST_E4M3, has_fp8, name_of, to_e4m3
from smolvlm.vision import VisionLayer

ALIGNMENT = 16  # sizes of products are multiples of it


class Fp8Linear(nn.Module):
    """A linear layer [.., inputs] → [.., outputs] in the dtype of its inputs. It can be neither trained nor saved."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.scale = quantized_rows(linear.weight.detach())  # [outputs, inputs], [outputs, 1]
        self.bias = linear.bias.detach()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.product(*quantized_rows(inputs))

    def product(self, rows: Tensor, scales: Tensor) -> Tensor:
        """The layer's output for inputs that quantized_rows has rounded."""
        outputs: Tensor = F.scaled_mm(
            rows.flatten(0, -2), self.weight.t(), scales.flatten(0, -2), ScalingType.RowWise, self.scale.t(),
            ScalingType.RowWise, bias=self.bias, output_dtype=self.bias.dtype,
        )  # fmt: skip
        return outputs.view(*rows.shape[:-1], -1)


def quantized_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """Values [.., n] → e4m3 [.., n] and what 1 counts in each row, float32 [.., 1]; a row's largest becomes 448."""
    values = values.float()
    scales = (values.abs().amax(-1, keepdim=True) / LARGEST_E4M3).clamp_min(torch.finfo(torch.float32).tiny)
    return to_e4m3(values / scales), scales


def check_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """Raise ValueError unless this device multiplies 8-bit floats, with results in `dtype`."""
    if not has_fp8(device):
        raise ValueError(f"quantization is 'fp8' and device {str(device)!r}; {FP8_NEEDS}: leave it out here")
    taken = (torch.bfloat16,) if device.type == "cuda" else (torch.float32, torch.bfloat16)
    if dtype not in taken:
        names = " or ".join(map(name_of, taken))
        raise ValueError(f"quantization is 'fp8' and dtype {name_of(dtype)!r}; on {device} it goes with {names}")


def quantize_encoder(model: nn.Module) -> None:
    """Replace the linear layers of the encoder's blocks, one after the other: memory grows by one layer only.

    Raises:
        ValueError: a layer has sizes that the products do not take.
    """
    blocks = [each for each in model.modules() if isinstance(each, VisionLayer)]
    linears = [each for block in blocks for each in block.modules() if isinstance(each, nn.Linear)]
    if any(each.in_features % ALIGNMENT or each.out_features % ALIGNMENT for each in linears):
        raise ValueError(f"quantization 'fp8' wants an encoder whose sizes are multiples of {ALIGNMENT}; leave it out")
    for block in blocks:
        for part in (block.attention, block.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(part, name, Fp8Linear(child))
