"""SmolVLM in plain PyTorch: image processor, model and a continuously batching engine.

`import smolvlm` stays light, since the decoder subprocesses of the pipeline import `smolvlm.image` and must not pay for
torch: the public names are resolved on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smolvlm.engine import Engine
    from smolvlm.processor import Processor
    from smolvlm.sampling import SamplingParams

__all__ = ["Engine", "Processor", "SamplingParams"]

_HOMES = {"Engine": "smolvlm.engine", "Processor": "smolvlm.processor", "SamplingParams": "smolvlm.sampling"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'smolvlm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
