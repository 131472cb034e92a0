"""The engine: continuous batching over a paged key/value cache.

engine          Engine: add, step, generate          loop       EngineLoop: a thread that steps, futures
scheduler       what to do next                      runner     does it, on tensors
sequence        one request                          images     images on their way through the encoder
block_manager   pages of the cache
"""

from smolvlm.engine.engine import Engine, PromptTooLong
from smolvlm.engine.loop import EngineDied, EngineLoop
from smolvlm.engine.sequence import Completion, Sequence

__all__ = ["Completion", "Engine", "EngineDied", "EngineLoop", "PromptTooLong", "Sequence"]
