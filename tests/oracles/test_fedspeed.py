"""FedSpeed against its algorithm: on nodes that pull apart it comes to the common optimum, which FedProx misses."""

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from client_app.memory import Memory
from client_app.training import Turn, train
from common import tasks, wire
from common.adapter.values import Key
from common.config.run import TaskConfig, TrainConfig
from strategies.objectives import FedProx, FedSpeed, Objective, Plain, Sam
from tests.support.grid import run_in_process
from tests.support.private_steps import EXAMPLES, fresh
from tests.support.training import recipe_of

NODES, SIZE, ROUNDS, STEPS, RATE = 8, 5, 20, 60, 0.1
TEXT = tasks.build(TaskConfig())


def quadratics() -> list[tuple[Tensor, Tensor]]:
    """Of every node the curvatures, and where its own optimum lies: far from all others'."""
    generator = torch.Generator().manual_seed(0)
    draw = [torch.rand(2, SIZE, dtype=torch.float64, generator=generator) for _ in range(NODES)]
    return [(0.2 + 2 * curvature, 10 * place - 5) for curvature, place in draw]


def local_round(objective: Objective, node: tuple[Tensor, Tensor], start: Tensor, memory: Tensor) -> Tensor:
    """Gradient steps of one node on its quadratic; where it ends."""
    curvature, optimum = node
    w = nn.Parameter(start.clone())

    def compute() -> tuple[float, int]:
        w.grad = curvature * (w.detach() - optimum)
        return 0.0, 1

    for _ in range(STEPS):
        objective.gradients(compute, [w])
        objective.add([w], [start], [memory])
        with torch.no_grad():
            w -= RATE * w.grad
    return w.detach()


def distances(objective: Objective) -> list[float]:
    """By round, how far the server's mean is from the optimum of the mean of all nodes' losses."""
    nodes = quadratics()
    common = sum(h * c for h, c in nodes) / sum(h for h, _ in nodes)
    server, memories = torch.zeros(SIZE, dtype=torch.float64), [torch.zeros(SIZE, dtype=torch.float64)] * NODES
    found = []
    for _ in range(ROUNDS):
        sent = []
        for number, node in enumerate(nodes):
            w = nn.Parameter(local_round(objective, node, server, memories[number]))
            if objective.remembers:
                (memories[number],) = objective.remember([w], [server], [memories[number]])
            sent.append(objective.sent(w.detach(), memories[number]))
        server = torch.stack(sent).mean(0)
        found.append(float((server - common).norm()))
    return found


def test_it_comes_to_the_common_optimum_and_the_others_do_not():
    ours = distances(FedSpeed(pull=1.0, radius=0.0))
    assert ours[-1] < 1e-3 * ours[0]
    for other in (Plain(), FedProx(mu=1.0)):
        theirs = distances(other)
        assert theirs[-1] > 0.1
        assert theirs[-1] == pytest.approx(theirs[-2], rel=1e-2)  # it has settled there


def test_uphill_first_is_the_gradient_there():
    """A quadratic's gradient is linear: a step uphill adds the curvature times that step."""
    (curvature, optimum), start = quadratics()[0], torch.ones(SIZE, dtype=torch.float64)
    w = nn.Parameter(start.clone())

    def compute() -> tuple[float, int]:
        w.grad = curvature * (w.detach() - optimum)
        return 1.5, 4

    first = curvature * (start - optimum)
    figures = FedSpeed(radius=0.3, ascent=0.25).gradients(compute, [w])
    torch.testing.assert_close(w.grad, first + 0.25 * curvature * 0.3 * first / first.norm())
    assert torch.equal(w.detach(), start)
    assert figures == (1.5, 8)


def trained(objective: Objective, memory: dict[Key, Tensor] | None = None):
    """What a few steps on the embedded model come to, and what the node remembers of them."""
    model = fresh("none")
    config = TrainConfig.model_validate({"steps": 3, "batch-size": 4, "learning-rate": 0.01, "clip-norm": 0.0})
    recipe = recipe_of(config, objective=objective)
    training = train(model, recipe, TEXT, EXAMPLES, Turn(0, model.keys, seed="s", remembered=memory or {}))
    return model.tensors(), training.remembered


def test_next_to_no_pull_and_no_ascent_is_plain_training():
    plain, nothing = trained(Plain())
    ours, remembered = trained(FedSpeed(pull=1e-12, radius=0.0))
    assert nothing == {}
    assert ours.keys() == remembered.keys()
    for key, tensor in plain.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-5, atol=1e-7)


def test_what_a_node_remembers_is_what_it_moved_and_comes_back_from_its_disk(tmp_path):
    start = fresh("none").tensors()
    after, remembered = trained(FedSpeed())
    for key, tensor in remembered.items():
        torch.testing.assert_close(tensor, after[key] - start[key], rtol=1e-5, atol=1e-7)
    Memory(tmp_path, "run", "ward-3").save("objective", remembered, 1)
    kept = Memory(tmp_path, "run", "ward-3").load("objective", 1)
    assert kept.keys() == remembered.keys()
    assert all(torch.equal(tensor, remembered[key]) for key, tensor in kept.items())
    assert Memory(tmp_path, "run", "ward-3").load("objective", 0) == {}
    again, total = trained(FedSpeed(), kept)
    assert any(not torch.equal(again[key], after[key]) for key in after)
    for key, tensor in total.items():
        torch.testing.assert_close(tensor, kept[key] + again[key] - start[key], rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "part"), [({"rule.name": "fedit"}, "B"), ({"rule.name": "ravan", "rule.ravan.scales": 0}, "R")]
)
def test_the_correction_leaves_with_what_was_trained(rule, part, settings, tmp_path):
    """What starts at zero has been twice moved when it leaves first: by training, and by the correction from it."""
    flat = settings(**rule, **{"objective.name": "fedspeed", "num-server-rounds": 1, "model.quantization": "none"})
    grid = run_in_process(flat, nodes=2)
    records = [content["update"] for kind, content in grid.returned if kind == "train"]
    kept = [load_file(file) for file in sorted((tmp_path / "state").rglob("objective-0001.safetensors"))]
    assert len(records) == len(kept) == 2
    for record, memory in zip(records, kept, strict=True):
        _, update = wire.unpack_update(record, rule=rule["rule.name"], round=0)
        moved = [tensor for key, tensor in update.tensors.items() if key.part == part]
        total = sum(float(tensor.double().square().sum()) for tensor in moved)
        own = sum(float(t.double().square().sum()) for key, t in memory.items() if key.endswith(f":{part}"))
        assert own > 0
        assert total == pytest.approx(4 * own, rel=1e-5)


def test_sam_takes_the_gradient_uphill():
    """Of a quadratic: at w + radius g / |g|, and the parameters stay."""
    curvature, w = torch.tensor([1.0, 4.0, 9.0]), nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))

    def compute() -> tuple[float, int]:
        w.grad = curvature * w.detach()
        return 3.0, 2

    start = w.detach().clone()
    gradient = curvature * start
    assert Sam(radius=0.3).gradients(compute, [w]) == (3.0, 4)
    assert torch.equal(w.detach(), start)
    torch.testing.assert_close(w.grad, curvature * (start + 0.3 * gradient / gradient.norm()))
