import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import training_pair
from fixture_types import MakePlan
from torch import Tensor
from word_pictures import WordPictures

from smolvlm.training.batches import Windows, collate
from smolvlm.training.examples import ExampleMaker
from smolvlm.training.loop import ALONE, StepReport, Trainer, TrainingDiverged
from smolvlm.training.plan import Losses, Optimizer, Stage, TrainingPlan

PAIR = Path(training_pair.__file__)
OPTIMIZERS = [Optimizer("adamw"), Optimizer("adamw8bit"), Optimizer("muon")]


def trainer_of(plan: TrainingPlan) -> Trainer:
    assert plan.start.id is not None
    return Trainer(plan, Path(plan.start.id))


def train(trainer: Trainer, make: ExampleMaker) -> list[StepReport]:
    plan = trainer.plan

    def windows_of(number: int) -> Windows:
        return Windows(WordPictures(), make, trainer.share(plan.stages[number]), 20, seed=number)

    return list(trainer.run(windows_of))


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.objective.state_dict().items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


def test_every_step_is_reported(plan_of: MakePlan, make: ExampleMaker) -> None:
    stages = (Stage("first", 2, 4, (0.5e-3, 0.5e-3)), Stage("second", 3, 6, (1e-3, 1e-3), losses=Losses(0, 1, 0)))
    reports = train(trainer_of(plan_of(stages=stages)), make)
    assert [(each.step, each.stage, each.examples) for each in reports] == [
        (1, "first", 4),
        (2, "first", 4),
        (3, "second", 6),
        (4, "second", 6),
        (5, "second", 6),
    ]
    assert [set(each.losses) for each in reports] == [{"text"}] * 2 + [{"glyph"}] * 3
    assert [each.learning_rate for each in reports] == [0.5e-3] * 2 + [1e-3] * 3
    assert all(each.grad_norm > 0 and each.tokens > 0 for each in reports)


def test_micro_batches_change_nothing_but_rounding(plan_of: MakePlan, make: ExampleMaker) -> None:
    """All three losses are means over the step, also where its parts differ in length."""
    whole, parts = (trainer_of(plan_of(optimizer=Optimizer("adamw"), micro_batches=count)) for count in (1, 2))
    for step in range(3):
        halves = training_pair.Halves(make, None)._step(step)
        together = collate(
            [make(WordPictures()(index)) for index in (step, 5, 0, step + 3, 3, 8)], make.config.image_token_id
        )
        one = whole._update(whole.plan.stages[0], [together], 1e-3)
        two = parts._update(parts.plan.stages[0], halves, 1e-3)
        assert one[0] == pytest.approx(two[0], rel=1e-5)
        assert one[1] == pytest.approx(two[1], rel=1e-4)
    torch.testing.assert_close(weights(parts), weights(whole), atol=2e-4, rtol=1e-3)


def test_frozen_parts_do_not_move_and_move_once_they_are_freed(plan_of: MakePlan, make: ExampleMaker) -> None:
    rate = (1e-3, 1e-3)
    plan = plan_of(
        optimizer=Optimizer("adamw", weight_decay=0.5), steps=2, learning_rate=rate, freeze=("vision", "text")
    )
    trainer = trainer_of(plan)
    before = weights(trainer)
    train(trainer, make)
    moved = changed(before, weights(trainer))
    assert moved == {"model.connector.projection.weight", "glyph_head.weight", "glyph_head.bias"}
    freed = trainer_of(plan_of(stages=(*plan.stages, Stage("all", 1, 4, rate))))
    train(freed, make)
    parts = {name.split(".")[1] for name in changed(before, weights(freed))}
    assert {"vision", "text", "head", "connector"} <= parts


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda each: each.kind)
def test_training_learns(plan_of: MakePlan, make: ExampleMaker, optimizer: Optimizer) -> None:
    rate = (3e-3, 3e-3)
    reports = train(trainer_of(plan_of(optimizer=optimizer, steps=12, batch_size=10, learning_rate=rate)), make)
    for name in ("text", "glyph", "reading"):
        assert reports[-1].losses[name] < 0.8 * reports[0].losses[name], name


def test_bfloat16_stays_near_float32(plan_of: MakePlan, make: ExampleMaker) -> None:
    losses = [
        train(trainer_of(plan_of(precision=precision, steps=1)), make)[0].losses
        for precision in ("float32", "bfloat16")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != losses[1]


@pytest.mark.parametrize("found", [True, False])
def test_auto_is_the_precision_of_the_hardware(
    plan_of: MakePlan, make: ExampleMaker, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smolvlm.precision.multiplies_bfloat16", lambda device: found)
    losses = [
        train(trainer_of(plan_of(precision=precision, steps=1)), make)[0].losses
        for precision in ("auto", "bfloat16" if found else "float32")
    ]
    assert losses[0] == losses[1]


def test_recomputing_activations_changes_no_gradient(plan_of: MakePlan, make: ExampleMaker) -> None:
    trainers = [trainer_of(plan_of(checkpoint_activations=value)) for value in (False, True)]
    batch = training_pair.Halves(make, None)._step(0)[0]
    for trainer in trainers:
        sum(trainer.objective(batch, trainer.plan.stages[0].losses).values(), torch.zeros(())).backward()
    ours, recomputed = ({name: p.grad for name, p in each.objective.named_parameters()} for each in trainers)
    torch.testing.assert_close(recomputed, ours, atol=0, rtol=0)


def test_fewer_activations_are_kept_when_they_are_recomputed(plan_of: MakePlan, make: ExampleMaker) -> None:
    kept = []
    batch = training_pair.Halves(make, None)._step(0)[0]
    for value in (False, True):
        trainer = trainer_of(plan_of(checkpoint_activations=value))
        sizes: dict[int, int] = {}

        def note(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            trainer.objective(batch, Losses(1, 0, 0))
        kept.append(sum(sizes.values()))
    assert kept[1] < 0.7 * kept[0]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch\\..*", "ignore:The .grad attribute of a Tensor")
def test_compiled_training_is_training(plan_of: MakePlan, make: ExampleMaker) -> None:
    plain, compiled = (trainer_of(plan_of(compile=value, steps=2)) for value in (False, True))
    ours, theirs = train(plain, make), train(compiled, make)
    for one, other in zip(ours, theirs, strict=True):
        assert one.losses == pytest.approx(other.losses, rel=1e-4)
    torch.testing.assert_close(weights(compiled), weights(plain), atol=5e-4, rtol=1e-2)


def test_a_loss_that_is_no_number_ends_the_run_before_it_does_harm(plan_of: MakePlan, make: ExampleMaker) -> None:
    trainer = trainer_of(plan_of())
    with torch.no_grad():
        trainer.model.connector.projection.weight[0, 0] = float("nan")
    before = weights(trainer)
    with pytest.raises(TrainingDiverged, match=r"step 1 of stage 'only': losses .*nan.*Lower learning_rate"):
        train(trainer, make)
    torch.testing.assert_close(weights(trainer), before, atol=0, rtol=0, equal_nan=True)


def test_a_huge_rate_ends_the_run_too(plan_of: MakePlan, make: ExampleMaker) -> None:
    plan = plan_of(optimizer=Optimizer("adamw"), steps=50, learning_rate=(1e30, 1e30))
    with pytest.raises(TrainingDiverged, match="Lower learning_rate"):
        train(trainer_of(plan), make)


def test_two_processes_are_one(plan_of: MakePlan, tmp_path: Path) -> None:
    """Each has its half of every step, of another length: gradients, losses and weights are those of the whole step."""
    optimizer, rate = Optimizer("adamw"), (1e-3, 1e-3)
    frozen, free = Stage("a", 2, 6, rate, freeze=("vision",)), Stage("b", 2, 6, rate, losses=Losses(1, 0.5, 0.5))
    plan = plan_of(stages=(frozen, free), optimizer=optimizer)
    (tmp_path / "plan").write_bytes(pickle.dumps(plan))
    processes = [
        subprocess.Popen(
            [sys.executable, PAIR, str(rank), tmp_path / "meet", tmp_path / "plan", tmp_path / f"{rank}.pt"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(PAIR.parents[2]), str(PAIR.parent)])},
        )
        for rank in (0, 1)
    ]
    assert [process.wait(timeout=250) for process in processes] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    torch.testing.assert_close(first["weights"], second["weights"], atol=0, rtol=0)
    whole = training_pair.trained(plan, ALONE, None)
    for rank in (first, second):
        for ours, theirs in zip(rank["losses"], whole["losses"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)
        assert rank["grad_norms"] == pytest.approx(whole["grad_norms"], rel=1e-3)
    torch.testing.assert_close(first["weights"], whole["weights"], atol=2e-4, rtol=1e-3)
    assert first["stopping"] is second["stopping"] is True  # one of two wished it
