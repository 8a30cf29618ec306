"""Objectives that add a term of their own, against their papers: gradients by finite differences and dense products."""

import math

import pytest
import torch
from torch import Tensor

from client_app.training import Turn, train
from common import tasks
from common.adapter.values import Key, Tensors
from common.config.run import TaskConfig, TrainConfig
from strategies.objectives import GroupSparsity, Objective, Orthogonal, Plain
from tests.support.private_steps import EXAMPLES, fresh
from tests.support.training import recipe_of

SIZES = {Key("one", "A"): (2, 5), Key("one", "B"): (4, 2), Key("two", "A"): (2, 3), Key("two", "B"): (6, 2)}


def drawn(seed: int, sizes: dict[Key, tuple[int, ...]]) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(size, generator=generator, dtype=torch.float64) for key, size in sizes.items()}


def gradients(objective: Objective, tensors: Tensors, earlier: Tensors) -> Tensors:
    leaves = {key: tensor.clone().requires_grad_() for key, tensor in tensors.items()}
    objective.penalty(leaves, earlier).backward()
    return {key: leaf.grad for key, leaf in leaves.items() if leaf.grad is not None}


def test_group_sparsity_pulls_every_layer_with_the_same_force():
    tensors = drawn(0, SIZES | {Key("head", "W"): (3, 3)})
    found = gradients(GroupSparsity(weight=0.3), tensors, {})
    assert found.keys() == SIZES.keys()  # the head is in no group
    total = 0.0
    for layer in ("one", "two"):
        a, b = tensors[Key(layer, "A")], tensors[Key(layer, "B")]
        norm = math.sqrt(float(a.square().sum()) + float(b.square().sum()))
        total += 0.3 * norm
        for part, factor in (("A", a), ("B", b)):
            torch.testing.assert_close(found[Key(layer, part)], 0.3 * factor / norm)
    assert float(GroupSparsity(weight=0.3).penalty(tensors, {})) == pytest.approx(total)


def test_group_sparsity_leaves_a_layer_of_zeros_alone():
    """As B is under FFA-LoRA at the start: the root's slope there is taken for zero, and is not infinite."""
    found = gradients(GroupSparsity(), {Key("one", "B"): torch.zeros(4, 2), Key("two", "B"): torch.ones(6, 2)}, {})
    assert not found[Key("one", "B")].any()
    assert found[Key("two", "B")].isfinite().all()
    assert found[Key("two", "B")].any()


def offset(turn: Tensor) -> Tensors:
    """An earlier adapter of layer ``one`` of rank 2, one slot more empty, its product the same whatever ``turn`` is."""
    made = drawn(3, {Key("one", "Q"): (4, 2), Key("one", "P"): (2, 5)})
    q, p = made[Key("one", "Q")] @ turn, torch.linalg.solve(turn, made[Key("one", "P")])
    idle = torch.ones(1, 5, dtype=torch.float64)  # which B of zeros never looks at
    return {Key("one", "Q"): torch.nn.functional.pad(q, (0, 1)), Key("one", "P"): torch.cat([p, idle])}


@pytest.mark.parametrize("seed", [None, 4])
def test_what_a_has_in_the_earlier_rows_is_counted_whatever_their_factors(seed):
    turn = torch.eye(2, dtype=torch.float64) if seed is None else drawn(seed, {Key("", ""): (2, 2)})[Key("", "")]
    objective, tensors = Orthogonal(weight=0.25), drawn(0, SIZES)
    earlier = {key: tensor.double() for key, tensor in objective.earlier(offset(turn)).items()}
    rows = drawn(3, {Key("one", "Q"): (4, 2), Key("one", "P"): (2, 5)})[Key("one", "P")]
    projector = torch.linalg.pinv(rows) @ rows
    a = tensors[Key("one", "A")]
    assert float(objective.penalty(tensors, earlier)) == pytest.approx(0.25 * float((a @ projector).square().sum()))
    found = gradients(objective, tensors, earlier)
    assert found.keys() == {Key("one", "A")}
    torch.testing.assert_close(found[Key("one", "A")], 0.5 * a @ projector, rtol=1e-5, atol=1e-6)
    assert objective.penalty({key: tensors[key] for key in (Key("one", "B"), Key("two", "A"))}, earlier) is None


def test_an_empty_adapter_has_no_directions():
    nothing = {Key("one", "Q"): torch.zeros(4, 2), Key("one", "P"): torch.ones(2, 5)}
    assert not len(Orthogonal().earlier(nothing)[Key("one", "P")])


def overlap(objective: Objective) -> float:
    """What A of the embedded model has in a frozen adapter's rows, after some steps over it."""
    model, generator = fresh("none"), torch.Generator().manual_seed(2)
    state = model.tensors()
    under = Tensors()
    for layer, (d_out, d_in) in model.spec.layers.items():
        under[Key(layer, "Q")] = 0.01 * torch.randn(d_out, 2, generator=generator)
        under[Key(layer, "P")] = torch.randn(2, d_in, generator=generator)
    model.install(state, 1.0, under)
    config = TrainConfig.model_validate({"steps": 4, "batch-size": 4, "learning-rate": 0.01, "clip-norm": 0.0})
    turn = Turn(0, model.keys, seed="s", offset=under)
    train(model, recipe_of(config, objective=objective), tasks.build(TaskConfig()), EXAMPLES, turn)
    rows = Orthogonal().earlier(under)
    return float(Orthogonal(weight=1.0).penalty(model.tensors(), rows))


def test_a_round_turns_away_from_the_adapter_under_it():
    assert overlap(Orthogonal(weight=10.0)) < 0.7 * overlap(Plain())
