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

HIGH = -1  # priority of the small kernels of a step, which would stand in line behind an encoder's large ones
WARM_UPS = 2  # compile kernels, and let libraries take the workspaces that they must not ask for while recording


class GraphCapture:
    """Records steps on one device, of which no two may run at a time: they share the memory of their intermediate
    results, and the workspaces that torch gives to matrix products on one stream.

    Replays run on the current stream, at the `priority` recorded: a lower number goes first.
    """

    def __init__(self, device: torch.device, priority: int = 0) -> None:
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device, priority)

    def __call__(self, step: Step) -> Step:
        with torch.cuda.device(self.device):
            self._warm_up(step)
            graph = torch.cuda.CUDAGraph()
            # thread_local: other threads of the process may use the device meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                step()
        return graph.replay

    def _warm_up(self, step: Step) -> None:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                step()
        current.wait_stream(self._stream)


def captured(model: SmolVLM, cache: KVCache, device: torch.device) -> tuple[FusedSmolVLM, StaticEncoder, StaticDecoder]:
    """The model with fused kernels, and its encoder and its decode step as CUDA graphs that may run at the same time.

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
    fused = FusedSmolVLM(model)
    encoder = StaticEncoder(fused.encode_tiles, GraphCapture(device))
    decoder = StaticDecoder(fused, cache, device, fused_paged_decode, GraphCapture(device, HIGH))
    return fused, encoder, decoder
