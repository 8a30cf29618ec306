"""What the papers say of structures: entry by entry, and where one structure is another."""

import peft
import pytest
import torch
from torch import Tensor, nn

from common.adapter.dora import Dora
from common.adapter.ia3 import IA3
from common.adapter.randlora import RandLora, ScaledDown
from common.adapter.spec import Spec
from common.adapter.values import Key, LayerShape, Update
from strategies import Recipe
from strategies.meter import Meter
from strategies.rules import FedIT

SHAPE = LayerShape(9, 8)


def drawn(structure, rank: int) -> dict[Key, Tensor]:
    """A layer whose parts are all drawn, those that start at zero too."""
    generator = torch.Generator().manual_seed(rank)
    return {Key("l", part): torch.randn(size, generator=generator) for part, size in structure.layer(SHAPE, rank)}


def update(structure, tensors: dict[Key, Tensor]) -> Tensor:
    b, a = structure.factors(tensors, "l")
    return b @ a


@pytest.mark.parametrize(("bases", "rank", "sizes"), [(2, 6, [3, 3]), (4, 6, [2, 2, 1, 1]), (4, 3, [1, 1, 1])])
def test_randlora_is_a_sum_over_bases_each_with_a_diagonal_before_it(bases, rank, sizes):
    structure = RandLora(bases=bases)
    tensors = drawn(structure, rank)
    b, a, g = (tensors[Key("l", part)] for part in "BAG")
    expected, first = torch.zeros(SHAPE), 0
    for size, diagonal in zip(sizes, g.split(SHAPE.d_in), strict=True):
        own = slice(first, first + size)
        expected += b[:, own] @ a[own] @ torch.diag(diagonal)
        first += size
    torch.testing.assert_close(update(structure, tensors), expected)

    down = ScaledDown(nn.Linear(SHAPE.d_in, rank, bias=False), bases)
    down.down.weight.data = a
    for scaled, diagonal in zip(down.diagonals, g.split(SHAPE.d_in), strict=True):
        scaled.weight.data = diagonal
    torch.testing.assert_close(b @ down(torch.eye(SHAPE.d_in)).T, expected)


def test_the_rank_of_randlora_is_that_of_all_its_bases():
    structure = RandLora(bases=2)
    tensors = drawn(structure, rank=8)
    assert tensors[Key("l", "G")].numel() == 2 * SHAPE.d_in
    assert int(torch.linalg.matrix_rank(update(structure, tensors))) == 8


def test_randlora_of_a_base_a_slot_is_a_lora_whose_b_is_frozen():
    structure, rank = RandLora(bases=4), 4
    tensors, wanted = drawn(structure, rank), torch.randn(rank, SHAPE.d_in)
    reached = tensors | {Key("l", "G"): (wanted / tensors[Key("l", "A")]).flatten()}
    torch.testing.assert_close(update(structure, reached), tensors[Key("l", "B")] @ wanted, rtol=1e-4, atol=1e-4)


def adapted(structure, scale: float):
    """A linear layer with the structure in it, every part drawn: the layer, its weight, its bias, the parts."""
    network = nn.Sequential(nn.Linear(SHAPE.d_in, SHAPE.d_out))
    frozen = network[0].requires_grad_(False)
    peft.inject_adapter_in_model(peft.LoraConfig(r=3, target_modules=["0"]), network)
    parts = {part: parameters[0] for part, parameters in structure.inject(network[0]).items()}
    network[0].scaling["default"] = scale
    for parameter in parts.values():
        parameter.data = torch.randn(parameter.shape)
    return network, frozen.weight, frozen.bias, parts


def test_ia3_scales_all_that_a_frozen_layer_gives_its_bias_too():
    network, weight, bias, parts = adapted(IA3(), scale=0.5)
    x = torch.randn(3, SHAPE.d_in)
    torch.testing.assert_close(network(x), (1 + 0.5 * parts["g"]) * (x @ weight.T + bias))


def test_dora_turns_the_rows_of_the_weight_and_lengthens_them():
    """The norm is a constant to the gradient, and the bias is neither turned nor lengthened."""
    network, weight, bias, parts = adapted(Dora(), scale=0.5)
    parts["n"].data = Dora().measure(weight)["n"]
    x, trained = torch.randn(4, SHAPE.d_in), [parts[part] for part in "ABg"]
    direction = weight + 0.5 * parts["B"] @ parts["A"]
    length = weight.norm(dim=1) * (1 + 0.5 * parts["g"])
    expected = x @ ((length / direction.norm(dim=1).detach())[:, None] * direction).T + bias
    torch.testing.assert_close(network(x), expected)
    ours, theirs = (torch.autograd.grad(output.square().sum(), trained) for output in (network(x), expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

    parts["B"].data.zero_()
    parts["g"].data.zero_()
    torch.testing.assert_close(network(x), x @ weight.T + bias)


@pytest.mark.parametrize("nodes", [2, 20])
def test_what_a_mean_of_ia3_misses_is_measured_without_the_weight(nodes):
    """By both ways of the meter, over a weight whose rows are alike; the one of many nodes is an estimate."""
    rule = FedIT(adapter=IA3())
    state = Recipe.around(rule).start(Spec({"l": SHAPE}, {}, 4, 1.0, rule.structure), 0)
    generator, key = torch.Generator().manual_seed(0), Key("l", "g")
    updates = [Update({key: torch.randn(SHAPE.d_out, generator=generator)}, 1.0, 1.0) for _ in range(nodes)]
    meter = Meter(rule, state, nodes)
    merged = rule.aggregate(state, meter.watch(updates))
    mean, other = merged.adapter[key], torch.randn(SHAPE.d_out, generator=generator)
    assert meter.read(merged)[""] < 1e-5
    moved = {**merged.adapter, key: other}
    expected = float((other - mean).norm() / mean.norm())
    assert meter.read(type(merged)(moved, 1.0))[""] == pytest.approx(expected, rel=1e-4)
