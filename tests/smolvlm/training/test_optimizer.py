import io
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from smolvlm.model import SmolVLM
from smolvlm.training.objective import Objective
from smolvlm.training.optimizer import build_optimizers, freeze, learning_rate, set_learning_rate
from smolvlm.training.plan import Optimizer, Stage

OPTIMIZERS = [Optimizer("adamw"), Optimizer("adamw8bit"), Optimizer("muon")]
STAGE = Stage("s", steps=14, batch_size=1, learning_rate=(1.0, 0.2), warmup_steps=4)


@pytest.fixture(scope="module")
def objective(fresh: Path) -> Objective:
    return Objective(SmolVLM.from_pretrained(fresh)).requires_grad_(True)


def names_in(objective: Objective, parameters: list[nn.Parameter]) -> set[str]:
    wanted = {id(parameter) for parameter in parameters}
    return {name for name, parameter in objective.named_parameters() if id(parameter) in wanted}


def test_the_rate_rises_in_a_line_and_falls_along_a_cosine() -> None:
    rates = [learning_rate(STAGE, step) for step in range(14)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:] == pytest.approx([0.2 + 0.8 * (1 + math.cos(math.pi * step / 10)) / 2 for step in range(10)])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0.2 < rates[-1] < 0.23


def test_without_warm_up_it_begins_at_its_first_value() -> None:
    stage = Stage("s", 10, 1, (0.5, 0.5))
    assert {learning_rate(stage, step) for step in range(10)} == {0.5}


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda each: each.kind)
def test_every_parameter_is_in_one_group_and_only_matrices_decay(objective: Objective, optimizer: Optimizer) -> None:
    optimizers = build_optimizers(objective, optimizer)
    groups = [group for each in optimizers for group in each.param_groups]
    members = [name for group in groups for name in names_in(objective, group["params"])]
    assert sorted(members) == sorted(name for name, _ in objective.named_parameters())
    decayed = {name for group in groups if group["weight_decay"] for name in names_in(objective, group["params"])}
    linears = {f"{name}.weight" for name, module in objective.named_modules() if isinstance(module, nn.Linear)}
    assert decayed == linears
    assert "model.text.embedding.weight" not in decayed


def test_muon_takes_the_matrices_between_the_first_and_the_last(objective: Objective) -> None:
    muon, adamw = build_optimizers(objective, Optimizer("muon", muon_rate=7.0, weight_decay=0.1))
    names = names_in(objective, muon.param_groups[0]["params"])
    others = {"model.vision.embedding.projection.weight", "model.head.weight", "glyph_head.weight"}
    linears = {f"{name}.weight" for name, module in objective.named_modules() if isinstance(module, nn.Linear)}
    assert names == linears - others
    set_learning_rate([muon, adamw], 0.01)
    assert muon.param_groups[0]["lr"] == pytest.approx(0.07)
    assert {group["lr"] for group in adamw.param_groups} == {0.01}
    # What a step takes off a weight is rate × decay, and must not depend on the kind.
    assert muon.param_groups[0]["lr"] * muon.param_groups[0]["weight_decay"] == pytest.approx(0.01 * 0.1)


def test_a_frozen_part_needs_no_gradients_until_it_is_freed(objective: Objective) -> None:
    freeze(objective, ("vision", "text"))
    trained = {name for name, parameter in objective.named_parameters() if parameter.requires_grad}
    assert trained == {"model.connector.projection.weight", "glyph_head.weight", "glyph_head.bias"}
    freeze(objective, ())
    assert all(parameter.requires_grad for parameter in objective.parameters())


def test_the_eight_bit_optimizer_keeps_bytes_and_loads_what_it_saved() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(128, 64), nn.Linear(128, 64)]
    layers[1].load_state_dict(layers[0].state_dict())
    optimizers = [build_optimizers(layer, Optimizer("adamw8bit"))[0] for layer in layers]
    set_learning_rate(optimizers, 0.01)
    inputs = torch.randn(8, 128)

    def step(number: int) -> None:
        layers[number](inputs).square().mean().backward()
        optimizers[number].step()
        optimizers[number].zero_grad()

    step(0)
    moments = optimizers[0].state[layers[0].weight]
    assert moments["state1"].dtype == moments["state2"].dtype == torch.uint8
    stored = io.BytesIO()
    torch.save(optimizers[0].state_dict(), stored)
    stored.seek(0)
    optimizers[1].load_state_dict(torch.load(stored, weights_only=True))
    layers[1].load_state_dict(layers[0].state_dict())
    step(0)
    step(1)
    assert torch.equal(layers[0].weight, layers[1].weight)


def test_bitsandbytes_missing_is_said_with_the_remedy(objective: Objective, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim.adamw", None)
    with pytest.raises(ValueError, match="adamw8bit needs bitsandbytes; install it"):
        build_optimizers(objective, Optimizer("adamw8bit"))
