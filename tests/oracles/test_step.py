"""The gradient of a plain step: the mean over every token that it learns, whatever batches they come in."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from common import tasks
from common.config.run import TaskConfig, TrainConfig
from common.models import token_losses
from common.tasks import TASKS, Example
from common.tasks.task import IGNORED
from tests.support.private_steps import TEXT, fresh, gradients
from tests.support.training import train_plainly

LENGTHS = (30, 4, 17, 9)
EXAMPLES = [
    Example(tokens := [1, *range(10 + n, 9 + n + length)], [IGNORED] * 3 + tokens[3:])
    for n, length in enumerate(LENGTHS)
]


def dense():
    """By autograd through all logits, one text at a time."""
    model = fresh("none")
    model.network.eval()
    parameters = model.train_only(model.keys)
    total = torch.tensor(0.0)
    for example in EXAMPLES:
        tokens = torch.tensor([example.tokens])
        total += cross_entropy(model.network(tokens).logits[0, 2:-1], tokens[0, 3:], reduction="sum")
    (total / sum(length - 3 for length in LENGTHS)).backward()
    return torch.cat([parameter.grad.double().flatten() for parameter in parameters])


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (2, 2), (1, 4)])
@pytest.mark.parametrize("chunk", [token_losses.LOGITS, 5 * 2048])
def test_a_step_is_the_mean_over_all_its_tokens(batch, accumulation, chunk, monkeypatch):
    monkeypatch.setattr(token_losses, "LOGITS", chunk)
    wanted = {"steps": 1, "batch-size": batch, "accumulation": accumulation, "clip-norm": 0.0}
    with gradients() as seen:
        train_plainly(fresh("none"), TEXT, EXAMPLES, TrainConfig.model_validate(wanted))
    expected = dense()
    assert float((seen[0] - expected).norm()) < 1e-5 * float(expected.norm())


@pytest.mark.parametrize("name", TASKS)
def test_the_labels_that_a_step_is_weighed_by_are_those_of_its_batches(name):
    task = tasks.build(TaskConfig.model_validate({"name": name}))
    examples = [task.made_up([1, *range(5, 5 + length)], number) for number, length in enumerate((9, 4, 12))]
    assert torch.equal(task.labels(examples), task.collate(examples, 0)["labels"])
