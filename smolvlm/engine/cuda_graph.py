"""CUDA graphs: a step recorded once, then launched as one piece.

A decode step at 256M is some 500 small kernels, which take the host longer to launch than the device to run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from smolvlm.attention import KVCache
from smolvlm.engine.static_decode import StaticDecoder, Step
from smolvlm.engine.static_encode import StaticEncoder
from smolvlm.model import SmolVLM

if TYPE_CHECKING:
    from smolvlm.kernels.fused_model import FusedSmolVLM

WARM_UPS = 2  # compile kernels, and let libraries take the workspaces that they must not ask for while recording


class GraphCapture:
    """Records steps on one device; all recordings share the memory of their intermediate results, since no two run
    at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        with torch.cuda.device(self.device):
            self._warm_up(step)
            graph = torch.cuda.CUDAGraph()
            # thread_local: other threads of the process may use the device meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                step()
        return graph.replay

    def _warm_up(self, step: Step) -> None:
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                step()
        current.wait_stream(stream)


def captured(model: SmolVLM, cache: KVCache, device: torch.device) -> tuple[FusedSmolVLM, StaticEncoder, StaticDecoder]:
    """The model with fused kernels, and its encoder and its decode step as CUDA graphs.

    Raises:
        ImportError: Triton is missing.
        ValueError: the attention kernel does not take this model's heads.
    """
    try:
        from smolvlm.kernels.fused_model import FusedSmolVLM
        from smolvlm.kernels.paged_decode import check_supported, fused_paged_decode
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "triton":
            raise
        raise ImportError(
            "decoding on a GPU needs triton, which torch's CUDA builds bring along and this environment lacks: install "
            "it, or pass decode='eager' to do without, more slowly"
        ) from error
    check_supported(cache)
    fused, capture = FusedSmolVLM(model), GraphCapture(device)
    encoder = StaticEncoder(fused.encode_tiles, capture)
    return fused, encoder, StaticDecoder(fused, cache, device, fused_paged_decode, capture)
