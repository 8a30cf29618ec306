"""Gradients of single examples in models that see images, and what is refused in a private run."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from client_app.probe import probe
from common.error import BouquetError
from common.privacy.accounting import Release
from strategies.gradients import GRADIENTS
from tests.support.private_steps import attach, brute_force, clipped_sum, relative, train_here
from tests.support.seeing import examples, loaded, settings


@pytest.mark.parametrize("kind", ["llava", "llava-next"])
@pytest.mark.parametrize("engine", ["fast", "hooks"])
def test_every_example_has_a_gradient_of_its_own(kind: str, engine: str) -> None:
    """An example is a record with its images, whatever stands beside it in a batch."""
    config = settings(kind)
    (task, chosen), model = examples(config), loaded(config)
    parameters = model.train_only(model.keys)
    rows = brute_force(model, parameters, chosen, task)
    bound = float(rows.norm(dim=1).median())
    expected = (rows * (bound / rows.norm(dim=1)).clamp(max=1.0)[:, None]).sum(0)
    assert relative(clipped_sum(model, chosen, engine, bound, task=task), expected) < 1e-5


@pytest.mark.parametrize("engine", ["fast", "hooks"])
def test_looks_at_a_model_leave_it_as_it_was(engine: str) -> None:
    """At its first image Transformers puts hooks on a tower. Twice there, they take another layer for the last."""
    config = settings("llava")
    (task, chosen), model, untouched = examples(config), loaded(config), loaded(config)
    model.train_only(model.keys)
    for _ in range(2):
        with (
            nullcontext() if GRADIENTS[engine].packs else model.padded(),
            attach(engine, model.network, 1.0, sequences=True) as attached,
        ):
            probe(attached, model, task)
    batch = task.collate(chosen, model.pad)
    with torch.no_grad():
        assert torch.equal(model.outputs(batch).values, untouched.outputs(batch).values)


class _Mixed(nn.Module):
    """Takes from each image the mean over all images of a batch."""

    def __init__(self, projector: nn.Module) -> None:
        super().__init__()
        self.projector = projector

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        seen: torch.Tensor = self.projector(features)
        return seen - 0.1 * seen.mean(0, keepdim=True)


def test_a_model_that_mixes_the_images_of_a_batch_is_refused_in_private() -> None:
    config = settings("llava")
    (task, _), model = examples(config), loaded(config)
    body = model.network.base_model.model.model
    body.multi_modal_projector = _Mixed(body.multi_modal_projector)
    model.train_only(model.keys)
    with (
        attach("fast", model.network, 1.0, sequences=True) as engine,
        pytest.raises(BouquetError, match="this model does not keep the examples of a batch apart"),
    ):
        probe(engine, model, task)


@pytest.mark.parametrize("targets", ["vision_tower", "all-linear,multi_modal_projector"])
def test_what_sees_is_not_trained_with_a_gradient_for_each_example(targets: str) -> None:
    """Its rows are images, and an example may have several."""
    config = settings("llava", **{"lora.targets": targets})
    (task, chosen), model = examples(config), loaded(config)
    said = "the vision layers have no gradient for each example .*got model.(vision_tower|multi_modal_projector)"
    with pytest.raises(BouquetError, match=said):
        train_here(model, chosen, Release(1.0, 1.0, 1), task=task)
