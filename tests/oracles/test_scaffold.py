"""SCAFFOLD against its algorithm, whose control variates travel: without them the nodes take the same steps."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from client_app.training import Training, Turn, train
from common import tasks
from common.adapter.values import Tensors
from common.config.run import TaskConfig, TrainConfig
from strategies.objectives import Objective, Plain, Scaffold
from tests.support.private_steps import EXAMPLES, fresh
from tests.support.training import recipe_of

NODES, SIZE, STEPS, RATE = 3, 4, 10, 0.1
WEIGHTS = [0.2, 0.3, 0.5]


def quadratics() -> list[tuple[Tensor, Tensor]]:
    """Of every node the curvatures, and where its own optimum lies: far from all others'."""
    generator = torch.Generator().manual_seed(0)
    draw = [torch.rand(2, SIZE, dtype=torch.float64, generator=generator) for _ in range(NODES)]
    return [(0.2 + 2 * curvature, 10 * place - 5) for curvature, place in draw]


def common() -> Tensor:
    """The optimum of the weighted mean of all nodes' losses."""
    nodes = list(zip(WEIGHTS, quadratics(), strict=True))
    return torch.stack([p * h * x for p, (h, x) in nodes]).sum(0) / torch.stack([p * h for p, (h, _) in nodes]).sum(0)


def mean(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([weight * tensor for weight, tensor in zip(WEIGHTS, tensors, strict=True)]).sum(0)


def the_papers(rounds: int) -> list[Tensor]:
    """Algorithm 1 with option II and a server's rate of 1, all nodes taking part: the state after each round."""
    state, variates = torch.zeros(SIZE, dtype=torch.float64), [torch.zeros(SIZE, dtype=torch.float64)] * NODES
    found = []
    for _ in range(rounds):
        server, ends, renewed = mean(variates), [], []
        for (curvature, optimum), own in zip(quadratics(), variates, strict=True):
            y = state.clone()
            for _ in range(STEPS):
                y = y - RATE * (curvature * (y - optimum) - own + server)
            ends.append(y)
            renewed.append(own - server + (state - y) / (STEPS * RATE))
        state, variates = mean(ends), renewed
        found.append(state)
    return found


def descent(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=RATE)


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.0)


def ours(
    objective: Objective, rounds: int, build: Callable[[list[nn.Parameter]], torch.optim.Optimizer] = descent
) -> list[Tensor]:
    """The state after each round of nodes whose messages hold nothing but what they trained."""
    state, memories, found = torch.zeros(SIZE, dtype=torch.float64), [None] * NODES, []
    for _ in range(rounds):
        ends = []
        for number, (curvature, optimum) in enumerate(quadratics()):
            memory = objective.first(state) if memories[number] is None else memories[number]
            w = nn.Parameter(state.clone())
            optimizer = build([w])
            for _ in range(STEPS):
                w.grad = curvature * (w.detach() - optimum)
                objective.add([w], [state], [memory])
                optimizer.step()
            (memories[number],) = objective.remember([w], [state], [memory])
            ends.append(objective.sent(w.detach(), memories[number]))
        state = mean(ends)
        found.append(state)
    return found


def test_no_variate_travels_and_every_state_is_the_papers():
    for mine, theirs in zip(ours(Scaffold(gain=1 / (STEPS * RATE)), 15), the_papers(15), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_it_comes_to_the_common_optimum_and_a_plain_mean_does_not():
    distances = [float((state - common()).norm()) for state in ours(Scaffold(gain=1 / (STEPS * RATE)), 60)]
    assert distances[-1] < 1e-4 * distances[0]
    one, two = ours(Plain(), 60)[-2:]
    assert float((two - common()).norm()) > 0.1
    torch.testing.assert_close(one, two, rtol=0, atol=1e-3)  # it has settled there


@pytest.mark.parametrize("gain", [0.5, 2.0])
def test_under_adamw_any_gain_leads_nearer_than_a_plain_mean(gain):
    plain, corrected = (ours(objective, 100, adam)[-1] for objective in (Plain(), Scaffold(gain=gain)))
    assert float((corrected - common()).norm()) < 0.25 * float((plain - common()).norm())


def trained(objective: Objective, remembered: Tensors) -> tuple[Tensors, Training]:
    """What a few steps on the embedded model come to."""
    model = fresh("none")
    config = TrainConfig.model_validate({"steps": 2, "batch-size": 4, "learning-rate": 0.01, "clip-norm": 0.0})
    turn = Turn(0, model.keys, seed="s", remembered=remembered)
    training = train(model, recipe_of(config, objective=objective), tasks.build(TaskConfig()), EXAMPLES, turn)
    return model.tensors(), training


def test_a_nodes_first_round_is_not_corrected_and_its_second_is():
    plain, _ = trained(Plain(), {})
    first, training = trained(Scaffold(), {})
    assert all(torch.equal(first[key], tensor) for key, tensor in plain.items())
    for key, tensor in training.remembered.items():  # where its own change alone has led it
        torch.testing.assert_close(tensor, first[key], rtol=0, atol=1e-6)
    second, _ = trained(Scaffold(), training.remembered)
    assert any(not torch.equal(second[key], tensor) for key, tensor in first.items())
