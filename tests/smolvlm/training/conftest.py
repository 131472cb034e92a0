"""One tiny fresh checkpoint, the plan around it, and batches of pictures of words."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fixture_types import MakePlan

from smolvlm.scratch import Shape, TextShape, VisionShape
from smolvlm.training.examples import ExampleMaker
from smolvlm.training.fresh import NUM_TOKENS, create_fresh_checkpoint
from smolvlm.training.plan import Losses, Optimizer, Stage, Start, TrainingPlan

VISION = VisionShape(32, 64, 2, 2, image_size=64, patch_size=8)
TEXT = TextShape(32, 64, 3, 2, 1, 16, max_position_embeddings=128, rope_theta=1e4, vocab_size=NUM_TOKENS)
SHAPE = Shape(VISION, TEXT, scale_factor=2, longest_edge=64)
SPLIT_SHAPE = Shape(VISION, TEXT, scale_factor=2, longest_edge=128)
ALL = Losses(1.0, 0.5, 0.5)


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one 64-pixel tile per picture."""
    return create_fresh_checkpoint(tmp_path_factory.mktemp("fresh"), SHAPE, seed=0)


@pytest.fixture(scope="session")
def fresh_split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with pictures of up to 128 pixels, which are split."""
    return create_fresh_checkpoint(tmp_path_factory.mktemp("split"), SPLIT_SHAPE, seed=0)


@pytest.fixture(scope="session")
def make(fresh: Path) -> ExampleMaker:
    return ExampleMaker(fresh, "Read.")


@pytest.fixture
def plan_of(tmp_path: Path, fresh: Path) -> MakePlan:
    stage = Stage("only", steps=4, batch_size=4, learning_rate=(1e-3, 1e-4), losses=ALL)
    plan = TrainingPlan(
        name="test",
        output=str(tmp_path / "run"),
        start=Start(str(fresh)),
        stages=(stage,),
        prompt="Read.",
        optimizer=Optimizer("muon"),
        precision="float32",
        data_workers=0,
    )

    def make_plan(**changes: Any) -> TrainingPlan:
        of_stage = {
            key: changes.pop(key) for key in list(changes) if key in Stage.__dataclass_fields__ and key != "name"
        }
        return replace(plan, **{"stages": (replace(stage, **of_stage),)} | changes)

    return make_plan


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """More would cost time on models this small."""
    torch.set_num_threads(1)
