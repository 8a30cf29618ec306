"""Shrinking noised gradients: against the shrinker written down over a whole SVD, and against what there was before."""

import numpy as np
import pytest
import torch
from torch import Tensor

from client_app.privacy import train_privately
from client_app.training import Turn
from common import tasks
from common.config.run import TaskConfig
from common.privacy.accounting import Release
from strategies import Recipe
from strategies.optimizers import SvdShrink
from tests.support.private_steps import EXAMPLES, fresh

SIGMA = 0.05


def noised(rows: int, columns: int, *singular: float) -> tuple[Tensor, Tensor]:
    """A matrix of these singular values, and itself under noise."""
    generator = torch.Generator().manual_seed(0)
    normal = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((rows, 8), (columns, 8)))
    left, right = (torch.linalg.qr(each).Q[:, : len(singular)] for each in normal)
    signal = left @ torch.diag(torch.tensor(singular, dtype=torch.float64)) @ right.T
    noise = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return signal, signal + SIGMA * noise


def shrunk(matrix: Tensor, floor: float) -> Tensor:
    """Of an SVD, value by value."""
    u, values, vh = np.linalg.svd(matrix.numpy(), full_matrices=False)
    small, large = sorted(matrix.shape)
    beta = small / large
    found = np.zeros_like(values)
    for place, value in enumerate(values / (SIGMA * np.sqrt(large))):
        eta = np.sqrt((value**2 - beta - 1) ** 2 - 4 * beta) / value if value > 1 + np.sqrt(beta) else 0.0
        found[place] = max(eta, floor * value) * SIGMA * np.sqrt(large)
    return torch.from_numpy(u @ np.diag(found) @ vh)


@pytest.mark.parametrize("shape", [(200, 400), (400, 200), (8, 1024), (1024, 8), (16, 16)], ids=str)
@pytest.mark.parametrize("floor", [0.1, 0.5])
def test_singular_values_are_shrunk_as_the_formula_says(shape, floor):
    _, matrix = noised(*shape, 4.0, 1.0)
    torch.testing.assert_close(SvdShrink(floor=floor).denoised(matrix, SIGMA), shrunk(matrix, floor))


def test_what_is_left_is_nearer_to_what_there_was():
    """A factor's gradient of rank 16: two directions above the noise, the others in it."""
    signal, matrix = noised(16, 1024, 4.0, 2.0)
    raw, left = (float((each - signal).norm()) for each in (matrix, SvdShrink(floor=1e-6).denoised(matrix, SIGMA)))
    assert left < 0.6 * raw
    # And no other share of the same directions is nearer by much: its own optimum, found with the signal at hand.
    u, _, _ = torch.linalg.svd(matrix, full_matrices=False)
    best = torch.diagonal(u.T @ signal @ matrix.T @ u) / torch.diagonal(u.T @ matrix @ matrix.T @ u)
    assert left < 1.05 * float((u @ torch.diag(best) @ u.T @ matrix - signal).norm())


def test_without_noise_nothing_is_shrunk_and_vectors_never_are():
    _, matrix = noised(16, 64, 4.0)
    assert torch.equal(SvdShrink().denoised(matrix, 0.0), matrix)
    assert torch.equal(SvdShrink().denoised(matrix[0], SIGMA), matrix[0])


def test_noise_alone_leaves_the_floor():
    _, matrix = noised(16, 1024)
    torch.testing.assert_close(SvdShrink(floor=0.25).denoised(1 * matrix, 2 * SIGMA), 0.25 * matrix)
    assert not SvdShrink().denoised(torch.zeros(3, 5), SIGMA).any()


def test_a_private_step_shrinks_by_the_noise_that_it_has_drawn(monkeypatch):
    """Sigma C over the expected batch, of every factor."""
    seen: list[tuple[tuple[int, ...], float]] = []

    def denoised(_: SvdShrink, gradient: Tensor, deviation: float) -> Tensor:
        seen.append((tuple(gradient.shape), deviation))
        return gradient

    monkeypatch.setattr(SvdShrink, "denoised", denoised)
    flat = {"privacy.mode": "example", "train.weighting": "uniform", "optimizer.name": "svd-shrink"}
    flat |= {"privacy.clip": 0.5, "privacy.expected-batch": 4, "train.batch-size": 4}
    model, units = fresh("none"), [[example] for example in EXAMPLES]
    recipe, task = Recipe.read(flat), tasks.build(TaskConfig())
    train_privately(model, recipe, task, units, Turn(0, model.keys), Release(3.0, 0.5, 1))
    assert sorted(shape for shape, _ in seen) == sorted(map(tuple, (model.spec.factor_shapes()).values()))
    assert {deviation for _, deviation in seen} == {3.0 * 0.5 / 4}
