"""The engine: continuous batching over a paged key/value cache.

engine          Engine: add, step, generate          loop       EngineLoop: a thread that steps, futures
scheduler       what to do next                      runner     does it, on tensors
admission       whose turn it is for memory          prefix     names of what pages hold
sequence        one request                          images     images on their way through the encoder
static_decode   the decode step on static buffers    cuda_graph captures that step for replay
block_manager   pages of the cache                   upload     tiles from the host to the device
chosen          what a step chose, on the host       stats      what it is doing, in numbers
"""

from smolvlm.engine.engine import Engine, PromptTooLong
from smolvlm.engine.loop import EngineDied, EngineLoop
from smolvlm.engine.sequence import BATCH, ONLINE, Completion, Sequence, Token
from smolvlm.engine.stats import ClassStats, EngineStats

__all__ = [
    "BATCH",
    "ONLINE",
    "ClassStats",
    "Completion",
    "Engine",
    "EngineDied",
    "EngineLoop",
    "EngineStats",
    "PromptTooLong",
    "Sequence",
    "Token",
]
