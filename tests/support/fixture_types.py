"""What fixtures hand out that make something: the tests that ask for them name these types."""

from typing import Any, Protocol

from smolvlm.engine import Engine
from smolvlm.image import Tiles
from smolvlm.processor import ModelInput
from smolvlm.training.plan import TrainingPlan


class MakeTiles(Protocol):
    """Tiles of noise: rows × cols and the global one, another noise for another seed."""

    def __call__(self, rows: int = 0, cols: int = 0, seed: int = 0) -> Tiles: ...


class MakeInput(Protocol):
    """A prompt with these images and this text."""

    def __call__(self, *tiles: Tiles, text: str = "What is this?") -> ModelInput: ...


class MakeEngine(Protocol):
    """An engine on the tiny checkpoint, with the options of `Engine.from_pretrained`."""

    def __call__(self, **options: Any) -> Engine: ...


class MakePlan(Protocol):
    """A plan of one stage, on a source that the test opens, in float32; keyword arguments change stage or plan."""

    def __call__(self, **changes: Any) -> TrainingPlan: ...
