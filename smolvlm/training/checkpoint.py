"""Saving and resuming: a checkpoint is a published-format model and, beside it, what only training needs.

    OUTPUT/checkpoints/step_00000500/  config, tokenizer, float32 weights, trainer.pt
    OUTPUT/model/                      the finished model

Each appears by one rename, whole or not at all; the last two checkpoints are kept.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from smolvlm.model import SmolVLM
from smolvlm.training.plan import TrainingPlan
from smolvlm.weights import WEIGHTS_FILE, save_weights

if TYPE_CHECKING:
    from collections.abc import Mapping

KEPT = 2
STATE_FILE = "trainer.pt"
STEP = re.compile(r"step_(\d{8})")


class PlanChanged(ValueError):
    """The output folder belongs to a run of another plan."""


def check_unchanged(plan: TrainingPlan, checkpoint: Path) -> None:
    """Raise PlanChanged, naming every difference, where a checkpoint was made by another plan."""
    theirs = _given(load_state(checkpoint)["plan"])
    ours = _given(_plain(plan, step_of(checkpoint)))
    differences = [
        f"{key}: {theirs.get(key)!r} there, {ours.get(key)!r} here"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    ]
    if differences:
        raise PlanChanged(
            f"{checkpoint} was made by another plan: {'; '.join(differences)}. Choose another output, or undo the "
            "change to resume"
        )


def _plain(plan: TrainingPlan, step: int) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(json.dumps(plan.fingerprint(step)))
    return content


def _given(content: Any) -> Any:
    """Without what is null: a key left out is no difference to a version that did not know it."""
    if isinstance(content, dict):
        return {key: _given(value) for key, value in content.items() if value is not None}
    return [_given(value) for value in content] if isinstance(content, list) else content


def latest_checkpoint(output: Path) -> Path | None:
    """The newest whole checkpoint of a run."""
    return max(_checkpoints(output), default=None)


def step_of(checkpoint: Path) -> int:
    found = STEP.fullmatch(checkpoint.name)
    assert found is not None
    return int(found[1])


def save_model(model: SmolVLM, files_from: Path, directory: Path, dtype: str = "float32") -> Path:
    """Write a model in the published format; configs and tokenizer are those of the checkpoint it started from."""
    with _appearing(directory) as building:
        _write_model(model, files_from, building, dtype)
    return directory


def _write_model(model: SmolVLM, files_from: Path, directory: Path, dtype: str) -> None:
    for file in files_from.glob("*.json"):
        if file.name != f"{WEIGHTS_FILE}.index.json":
            shutil.copyfile(file, directory / file.name)
    config = json.loads((files_from / "config.json").read_text(encoding="utf-8"))
    (directory / "config.json").write_text(json.dumps(config | {"dtype": dtype}, indent=1) + "\n", encoding="utf-8")
    save_weights(model, directory, getattr(torch, dtype))


def save_checkpoint(plan: TrainingPlan, step: int, model: SmolVLM, files_from: Path, state: Mapping[str, Any]) -> Path:
    """Write OUTPUT/checkpoints/step_N: the state after N optimizer steps."""
    output = Path(plan.output)
    target = output / "checkpoints" / f"step_{step:08d}"
    with _appearing(target) as building:
        _write_model(model, files_from, building, "float32")
        torch.save({**state, "plan": _plain(plan, step)}, building / STATE_FILE)
    for old in sorted(_checkpoints(output))[:-KEPT]:
        shutil.rmtree(old)
    return target


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A folder to fill, which then takes the place of `target`; after an error `target` is what it was."""
    building = target.with_name(f".{target.name}")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    yield building
    shutil.rmtree(target, ignore_errors=True)
    building.rename(target)


def load_state(checkpoint: Path) -> dict[str, Any]:
    """What training keeps beside the model; tensors and plain values only, no code is run."""
    state: dict[str, Any] = torch.load(checkpoint / STATE_FILE, map_location="cpu", weights_only=True)
    return state


def head_state(head: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in head.state_dict().items()}


def _checkpoints(output: Path) -> list[Path]:
    folder = output / "checkpoints"
    return [path for path in folder.iterdir() if STEP.fullmatch(path.name)] if folder.exists() else []
