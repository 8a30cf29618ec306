"""A node of several processes: its gradients and its adapter are one process's, and none of them is left behind."""

import os
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.synchronize import Event
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from client_app import children, session
from client_app.children import Children
from client_app.privacy import train_privately
from client_app.shares import ALONE
from client_app.training import Turn, train
from common.adapter.values import State
from common.config.run import RunConfig, TrainConfig
from common.error import BouquetError
from common.models.adapted import LoraModel
from common.privacy import gaussian
from common.privacy.accounting import Release
from common.tasks import Example
from strategies.gradients import Fast
from strategies.objectives import FedSpeed, Plain
from strategies.optimizers import AdamW, Optimizer
from tests.support.budgets import FORK
from tests.support.grid import run_in_process
from tests.support.outcome import events, failures
from tests.support.private_runs import PRIVATE, spent
from tests.support.private_steps import EXAMPLES, TEXT, fresh, gradients
from tests.support.private_steps import PRIVATE as CLIPPED
from tests.support.processes import holders, wait_for
from tests.support.training import recipe_of

pytestmark = pytest.mark.slow

RUN = RunConfig().to_flower() | {"model.quantization": "none"}
# So that what rounding does to one step is not magnified by the next.
RATE = 1e-3
UNKNOWN = Example([1, 10, 5000], [1, 10, 5000])


@dataclass(frozen=True, kw_only=True)
class Sgd(Optimizer):
    """Steps as long as the gradient: unlike Adam's, they are no further apart than the gradients are."""

    name = "sgd"
    paper = "none"

    def build(self, pairs, adapter, head):
        return torch.optim.SGD(adapter.parameters, lr=adapter.rate)


@pytest.fixture(scope="module")
def three() -> Iterator[Children]:
    """This process and two more, over gloo."""
    together = Children(["cpu", "cpu", "cpu"])
    yield together
    together.close()


def begun(together: Children, model: LoraModel, units: list[list[Example]], **changes: Any) -> Turn:
    """The first turn, which all processes have begun with the same model."""
    turn = Turn(0, model.keys, seed="s")
    together.load(RUN | changes)
    together.begin(State(model.tensors(), model.pairs()[0].scale), turn, units)
    return replace(turn, processes=together)


def moved(model: LoraModel) -> torch.Tensor:
    """Where training has brought the model from, in one vector."""
    start = fresh("none").tensors()
    return torch.cat([(tensor - start[key]).flatten() for key, tensor in model.tensors().items()])


@pytest.mark.parametrize(
    ("batch", "accumulation", "objective"),
    [
        (7, 1, Plain()),
        (5, 2, FedSpeed()),
        *(pytest.param(*each, Plain(), marks=pytest.mark.exhaustive) for each in ((4, 1), (1, 1), (2, 3), (3, 4))),
    ],
)
def test_the_gradient_of_a_step_is_that_of_one_process(batch, accumulation, objective, three):
    wanted = {"steps": 3, "batch-size": batch, "accumulation": accumulation, "clip-norm": 0.0, "learning-rate": RATE}
    recipe = recipe_of(TrainConfig.model_validate(wanted), optimizer=Sgd(), objective=objective)
    seen, trained, told = [], [], []
    for together in (None, three):
        model = fresh("none")
        turn = begun(together, model, [EXAMPLES]) if together else Turn(0, model.keys, seed="s")
        with gradients() as steps:
            training = train(model, recipe, TEXT, EXAMPLES, turn)
        seen.append(torch.stack(steps))
        trained.append(moved(model))
        told.append((pytest.approx(training.loss), training.tokens))
    first, *later = (seen[1] - seen[0]).norm(dim=1) / seen[0].norm(dim=1)
    assert first < 1e-6
    assert max(later) < 1e-5  # from parameters that rounding has moved apart already
    assert (trained[1] - trained[0]).norm() < 1e-5 * trained[0].norm()
    assert told[0] == told[1]


def entropy(monkeypatch) -> None:
    """The same samples and the same noise as the last time, for as long as this process alone draws them."""
    drawn = random.Random(0)
    monkeypatch.setattr(gaussian.os, "urandom", drawn.randbytes)
    monkeypatch.setattr("client_app.privacy.secrets.token_bytes", drawn.randbytes)


SAMPLES = ((1.0, 1.0), (1e-9, 1.0), (1.0, 0.0))


@pytest.mark.parametrize(
    ("rate", "noise"), [(0.5, 1.0), *(pytest.param(*each, marks=pytest.mark.exhaustive) for each in SAMPLES)]
)
def test_a_private_step_is_that_of_one_process_with_its_noise_drawn_once(rate, noise, three, monkeypatch, capfd):
    """Of units with one, two and no examples, and one that fails; and of none at all."""
    units = [EXAMPLES[:2], [EXAMPLES[2]], [], [UNKNOWN], [EXAMPLES[3]], EXAMPLES[4:6], [EXAMPLES[6]]]
    config = TrainConfig.model_validate({"batch-size": 3, "clip-norm": 0.0, "learning-rate": RATE})
    recipe = recipe_of(config, gradient=Fast(), optimizer=Sgd())
    recipe = replace(recipe, config=recipe.config.model_copy(update={"privacy": CLIPPED}))
    release, seen, trained, told = Release(noise, rate, 4), [], [], []
    for together in (None, three):
        model = fresh("none")
        turn = begun(together, model, units, **PRIVATE) if together else Turn(0, model.keys)
        with gradients() as steps, monkeypatch.context() as patch:
            entropy(patch)
            training = train_privately(model, recipe, TEXT, units, turn, release)
        seen.append(torch.stack(steps))
        trained.append(moved(model))
        told.append((pytest.approx(training.loss), training.tokens, capfd.readouterr().err.count("counted as zero")))
    # Of what the units may add, and of the rounding to float32 of the sum with its noise.
    most = 1e-6 * len(units) * CLIPPED.clip / CLIPPED.expected_batch + 1e-7 * seen[0].norm(dim=1)
    assert ((seen[1] - seen[0]).norm(dim=1) < most).all()
    assert (trained[1] - trained[0]).norm() < 5e-5 * trained[0].norm()
    assert told[0] == told[1]
    assert bool(noise) == (seen[0].norm(dim=1).min() > 1)


def children_of(process: int, size: str = "2") -> list[psutil.Process]:
    """The children of a node's process, where it is one of so many."""
    commands = {each: each.cmdline() for each in psutil.Process(process).children()}
    return [each for each, command in commands.items() if "client_app.child" in command and command[-2] == size]


def is_gone(process: psutil.Process) -> bool:
    """Whether it has ended, waited for by its new parent or not."""
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_a_child_that_dies_ends_the_round_and_is_started_anew_for_the_next():
    model = fresh("none")
    together = children.on(["cpu", "cpu"])
    assert children.on(["cpu", "cpu"]) is together
    turn = begun(together, model, [EXAMPLES])
    (child,) = children_of(os.getpid())
    child.kill()
    with pytest.raises(
        BouquetError, match=r"another process of this node ended .*\(device = cpu,cpu\)\. Read the node"
    ):
        train(model, recipe_of(TrainConfig()), TEXT, EXAMPLES, turn)
    assert not together.alive
    with children.on(["cpu", "cpu"]) as anew:
        assert anew is not together
        wait_for(lambda: len(children_of(os.getpid())) == 1, "the new child")


def test_a_private_round_whose_child_dies_is_one_without_records(settings, tmp_path, monkeypatch, capfd):
    """It is paid for, and the coordinator is not told."""
    tried = []

    def dying(model, recipe, task, units, turn, release):
        tried.append((len(units), turn.processes is ALONE))
        if turn.processes is not ALONE:
            for child in children_of(os.getpid()):
                child.kill()
        return train_privately(model, recipe, task, units, turn, release)

    monkeypatch.setattr(session, "train_privately", dying)
    once = PRIVATE | {"num-server-rounds": 1, "evaluation.every": 0, "min-nodes": 1}
    run_in_process(settings(**once), nodes=1, node_config={0: {"device": "cpu,cpu"}})
    assert [alone for _, alone in tried] == [False, True]
    assert tried[0][0] > tried[1][0] == 0
    assert failures(tmp_path / "run") == []
    assert [row.round for row in spent(tmp_path, "node-000")] == [1]
    assert "another process of this node ended before it answered" in capfd.readouterr().err


def test_a_round_of_a_warm_node_of_two_processes_is_that_of_one(settings, tmp_path):
    """And killed, it takes its child with it."""
    state = tmp_path / "warm"
    node = {"state-directory": str(state), "warm": 60.0, "device": "cpu,cpu"}
    once = {"num-server-rounds": 1, "train.accumulation": 3, "optimizer.name": AdamW.name, "min-nodes": 1}
    for name, own in (("one", {}), ("two", node)):
        run_in_process(settings(**{"run-name": name, **once}), nodes=1, node_config={0: own})
        assert failures(tmp_path / name) == []
    one, two = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        # Where a gradient is next to none, AdamW makes a step of its rounding.
        assert (two[key] - tensor).norm() <= 1e-2 * tensor.norm()
    (alone,), (shared,) = (events(tmp_path, "train", name) for name in ("one", "two"))
    assert (alone["tokens"], alone["steps"]) == (shared["tokens"], shared["steps"])
    assert alone["loss"] == pytest.approx(shared["loss"], rel=1e-5)

    (process,) = holders(state)
    (child,) = children_of(process)
    os.kill(process, signal.SIGKILL)
    wait_for(lambda: is_gone(child), "the child to go", limit=30)


def compute_for_minutes(started: Event) -> None:
    """A node's process, in whose first step there is more to compute than a test waits for."""
    model, many = fresh("none"), [Example([1] * 128, [1] * 128)] * 4000
    with Children(["cpu", "cpu"]) as together:
        turn = begun(together, model, [many])
        started.set()
        config = TrainConfig.model_validate({"steps": 1, "batch-size": 4, "accumulation": 1000})
        train(model, recipe_of(config), TEXT, many, turn)


def test_a_child_ends_with_its_parent_in_the_middle_of_a_step():
    started = FORK.Event()
    parent = FORK.Process(target=compute_for_minutes, args=(started,))
    parent.start()
    assert started.wait(120)
    (child,) = children_of(parent.pid)
    before = child.cpu_times().user
    wait_for(lambda: child.cpu_times().user > before + 1, "the child to compute")
    parent.kill()
    wait_for(lambda: is_gone(child), "the child to go", limit=30)
    parent.join()
