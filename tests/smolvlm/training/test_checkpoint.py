import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixture_types import MakePlan
from safetensors.torch import load_file, save_file
from word_pictures import WordPictures

from smolvlm.model import SmolVLM
from smolvlm.training.batches import collate
from smolvlm.training.checkpoint import PlanChanged, check_unchanged, latest_checkpoint, load_state, save_model
from smolvlm.training.documents import DocumentOptions
from smolvlm.training.examples import ExampleMaker
from smolvlm.training.loop import Trainer
from smolvlm.training.objective import Objective
from smolvlm.training.plan import LabelledData, Losses, Optimizer, Stage, TrainingPlan
from smolvlm.weights import WEIGHTS_FILE


def saved(plan: TrainingPlan, *steps: int) -> Path:
    """Checkpoints of an untouched trainer after so many steps; the last one's folder."""
    assert plan.start.id is not None
    trainer = Trainer(plan, Path(plan.start.id))
    for step in steps:
        trainer.step = step
        folder = trainer.save()
    return folder


def test_a_checkpoint_is_a_model_and_what_training_needs(plan_of: MakePlan, fresh: Path) -> None:
    folder = saved(plan_of(), 2)
    assert folder.name == "step_00000002"
    published = {file.name for file in fresh.iterdir()}
    assert {file.name for file in folder.iterdir()} == published | {"trainer.pt"}
    ours, theirs = load_file(folder / WEIGHTS_FILE), load_file(fresh / WEIGHTS_FILE)
    torch.testing.assert_close(ours, theirs, atol=0, rtol=0)
    assert set(load_state(folder)) == {"plan", "optimizers", "glyph_head"}


def test_the_last_two_are_kept_and_nothing_half_written_counts(plan_of: MakePlan) -> None:
    plan = plan_of()
    folder = saved(plan, 1, 2, 3)
    (folder.parent / ".step_00000004").mkdir()  # killed while it was written
    assert sorted(each.name for each in folder.parent.glob("step_*")) == ["step_00000002", "step_00000003"]
    assert latest_checkpoint(Path(plan.output)) == folder
    assert latest_checkpoint(folder / "nowhere") is None


def test_an_error_while_saving_leaves_what_was_there(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SmolVLM.from_pretrained(fresh)
    folder = save_model(model, fresh, tmp_path / "model")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    model.head.weight.zero_()

    def full(*args: object, **options: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("smolvlm.weights.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        save_model(model, fresh, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "seed": ({"seed": 1}, r"seed: 0 there, 1 here"),
    "prompt": ({"prompt": "What?"}, r"prompt: 'Read.' there, 'What\?' here"),
    "optimizer": ({"optimizer": Optimizer("adamw")}, r"optimizer: .*'muon'.* there, .*'adamw'.* here"),
    "precision": ({"precision": "bfloat16"}, r"precision: 'float32' there"),
    "processes": ({"processes": 2}, r"processes: 1 there, 2 here"),
    "a begun stage": ({"batch_size": 8}, r"stages\[0\]: .*'batch_size': 4.* there, .*'batch_size': 8.* here"),
    "source": ({"source": LabelledData("x", digest="ab")}, r"source: None there, .*'digest': 'ab'.* here"),
}


@pytest.mark.parametrize(("change", "said"), CHANGES.values(), ids=CHANGES)
def test_a_changed_plan_is_refused_naming_the_difference(plan_of: MakePlan, change: dict[str, Any], said: str) -> None:
    folder = saved(plan_of(), 2)
    with pytest.raises(PlanChanged, match=said):
        check_unchanged(plan_of(**change), folder)


def test_what_does_not_touch_the_past_may_change(plan_of: MakePlan) -> None:
    plan = plan_of()
    folder = saved(plan, 2)
    later = Stage("more", 5, 8, (1e-3, 1e-3), documents=DocumentOptions())
    check_unchanged(replace(plan, stages=(*plan.stages, later), checkpoint_every=7, threads=2, data_workers=2), folder)


def test_a_key_that_an_older_version_did_not_know_is_no_difference(plan_of: MakePlan) -> None:
    folder = saved(plan_of(), 2)
    state = load_state(folder)
    assert state["plan"]["stages[0]"].pop("num_documents", 0) is None
    torch.save(state, folder / "trainer.pt")
    check_unchanged(plan_of(), folder)
    with pytest.raises(PlanChanged, match="num_documents"):
        check_unchanged(plan_of(num_documents=3), folder)


def test_a_checkpoint_of_another_shape_is_refused_by_its_key(plan_of: MakePlan, fresh: Path, tmp_path: Path) -> None:
    broken = save_model(SmolVLM.from_pretrained(fresh), fresh, tmp_path / "broken")
    weights = load_file(broken / WEIGHTS_FILE)
    weights["model.connector.modality_projection.proj.weight"] = torch.zeros(32, 7)
    save_file(weights, broken / WEIGHTS_FILE, metadata={"format": "pt"})
    plan = plan_of()
    with pytest.raises(ValueError, match=r"'model.connector.modality_projection.proj.weight' has shape \[32, 7\]"):
        Trainer(plan, broken)
    assert not Path(plan.output).exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_is_stored_as_asked_for(fresh: Path, tmp_path: Path, dtype: str) -> None:
    folder = save_model(SmolVLM.from_pretrained(fresh), fresh, tmp_path / "model", dtype)
    assert {str(tensor.dtype) for tensor in load_file(folder / WEIGHTS_FILE).values()} == {f"torch.{dtype}"}
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize("size", [(64, 64), (128, 64)], ids=["one tile", "split"])
def test_transformers_loads_it_and_has_the_same_loss(
    fresh: Path, fresh_split: Path, tmp_path: Path, size: tuple[int, int]
) -> None:
    from transformers import Idefics3ForConditionalGeneration

    start = fresh if size == (64, 64) else fresh_split
    model = SmolVLM.from_pretrained(start)
    with torch.no_grad():
        model.connector.projection.weight.mul_(1.5)  # not what it started from
    folder = save_model(model, start, tmp_path / "model")
    make = ExampleMaker(folder, "Read.")
    examples = [make(WordPictures(size)(index)) for index in (0, 3, 8)]
    batch = collate(examples, make.config.image_token_id)
    ours = Objective(model)(batch, Losses(1, 0, 0))["text"]

    theirs: Any = Idefics3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    pixels = np.stack([each.tiles.pixels for each in examples]).astype(np.float32)
    lengths = torch.tensor([len(each.token_ids) for each in examples])
    mask = (torch.arange(batch.token_ids.shape[1]) < lengths[:, None]).long()
    logits = theirs(
        input_ids=batch.token_ids,
        attention_mask=mask,
        pixel_values=torch.from_numpy((pixels / 255 - 0.5) / 0.5).permute(0, 1, 4, 2, 3),
    ).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
    torch.testing.assert_close(ours, loss, atol=1e-5, rtol=1e-5)
