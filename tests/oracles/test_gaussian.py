"""The Gaussian mechanism: what its noise is, where it comes from, and that the grid hides the input."""

import math
import random
import secrets

import mpmath
import numpy as np
import pytest
import torch
from scipy import stats

from common.privacy import gaussian
from common.privacy.gaussian import MARGIN, Gaussian, clip, rounded_normal

CPU = torch.device("cpu")
# Nothing here is seeded, so a test may fail by chance: once in a million runs.
UNLIKELY = 1e-6


def within(value, expected, deviation):
    return abs(value - expected) <= 5 * deviation


def test_mean_variance_and_shape_over_many_draws():
    z = rounded_normal(400_001, 2.0**20, CPU).numpy() / 2**20
    n = len(z)
    assert within(z.mean(), 0, n**-0.5)
    assert within(z.var(), 1, (2 / n) ** 0.5)
    assert stats.kstest(z, "norm").pvalue > UNLIKELY
    half = n // 2
    assert within(float(np.corrcoef(z[:half], z[-half:])[0, 1]), 0, half**-0.5)
    assert within(float(np.corrcoef(z[: n - 1], z[1:])[0, 1]), 0, n**-0.5)


@pytest.mark.parametrize("scale", [0.4, 3.0])
def test_every_whole_number_has_the_probability_of_its_interval(scale):
    n = 200_000
    values = rounded_normal(n, scale, CPU).long()
    reach = math.ceil(4 * scale)
    counts = [int((values == k).sum()) for k in range(-reach, reach + 1)]
    cells = np.diff(stats.norm.cdf((np.arange(-reach, reach + 2) - 0.5) / scale))
    kept = cells * n > 20
    observed, expected = np.array(counts)[kept], cells[kept] * n
    observed, expected = np.append(observed, n - observed.sum()), np.append(expected, n - expected.sum())
    assert stats.chisquare(observed, expected).pvalue > UNLIKELY


@pytest.mark.parametrize("scale", [2.0**12, 2.0**22, 2.0**34])
def test_a_value_is_the_rounding_of_the_exact_normal(scale, monkeypatch):
    """Also where float64 cannot tell: at 2^34 it often cannot, at the ends of the range never."""
    pairs = 400
    words = torch.tensor([[0, 1, 2**63 - 1, 2**62, 2**40], [1, 2**61, 2**62, 0, 2**63 - 1]])
    words = torch.cat([words, torch.randint(2**63 - 1, (2, pairs))], dim=1)
    monkeypatch.setattr(gaussian.os, "urandom", lambda count: words.numpy().tobytes()[:count])
    monkeypatch.setattr(gaussian.secrets, "randbits", lambda bits: 0)
    got = rounded_normal(words.numel(), scale, CPU).view(2, -1).T.tolist()
    with mpmath.workprec(400):
        for pair, (first, second) in zip(got, words.T.tolist(), strict=True):
            u, v = ((mpmath.mpf(bits) + mpmath.mpf(2) ** -192) / 2**63 for bits in (first, second))
            radius = scale * mpmath.sqrt(-2 * mpmath.log(u))
            exact = [radius * mpmath.cos(2 * mpmath.pi * v), radius * mpmath.sin(2 * mpmath.pi * v)]
            assert pair == [float(mpmath.nint(value)) for value in exact]


def test_no_seed_gives_the_noise():
    def draw():
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(42)
        return rounded_normal(64, 2.0**20, CPU)

    assert not torch.equal(draw(), draw())


def test_float_noise_gives_the_input_away_and_the_grid_does_not():
    """Mironov's attack: some float32 sums are reachable from one input only."""

    def tells(outputs):
        near = outputs[outputs.abs() < 0.25].double() * 2**24
        return float((near != near.round()).double().mean())

    n = 40_000
    noise = torch.randn(n, generator=torch.Generator().manual_seed(secrets.randbits(63)))
    assert tells(0 + noise) > 0.1
    assert tells(1 + noise) == 0
    mechanism = Gaussian(sensitivity=1.0, noise_multiplier=1.0)
    step = mechanism.step(n)
    for value in (0.0, 1.0, 1 / 3):
        released = dict(mechanism.release({"x": torch.full((n,), value)}))["x"]
        assert torch.equal(released / step, (released / step).round())


def test_the_noise_is_sigma_times_the_sensitivity_on_every_coordinate():
    mechanism = Gaussian(sensitivity=0.25, noise_multiplier=3.0)
    total = {"matrix": torch.full((300, 400), 2.0), "vector": torch.zeros(80_000), "number": torch.tensor(1000.0)}
    released = dict(mechanism.release(total))
    for name in ("matrix", "vector"):
        noise = (released[name] - total[name]).flatten()
        n = len(noise)
        assert within(float(noise.mean()), 0, 0.75 * n**-0.5)
        assert within(float(noise.std()), 0.75, 0.75 * (2 * n) ** -0.5)
    assert released["number"].shape == ()
    assert released["number"] != 1000.0
    assert within(float(released["number"]), 1000, 1.0)


@pytest.mark.parametrize("dimension", [1, 40_000, 2_000_000])
def test_rounding_keeps_the_sensitivity(dimension):
    mechanism = Gaussian(sensitivity=0.7, noise_multiplier=1.0)
    step, generator = mechanism.step(dimension), torch.Generator().manual_seed(0)
    one = 20 * torch.randn(dimension, generator=generator, dtype=torch.float64)
    change = torch.randn(dimension, generator=generator, dtype=torch.float64)
    other = one + change * mechanism.bound / change.norm()
    moved = float(((one / step).round() - (other / step).round()).norm()) * step
    assert moved <= mechanism.sensitivity
    # In the worst case every coordinate moves by a whole step.
    assert mechanism.bound + step * math.sqrt(dimension) <= mechanism.sensitivity * (1 - MARGIN / 2) * (1 + 1e-12)


def test_without_noise_nothing_is_changed():
    total = {"x": torch.randn(5)}
    assert torch.equal(dict(Gaussian(math.inf, 0.0).release(total))["x"], total["x"])
    assert torch.equal(dict(Gaussian(1.0, 0.0).release(total))["x"], total["x"])


def test_clipping_takes_all_tensors_as_one_vector():
    vector = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor(4.0)}
    clipped = clip(vector, 1.0)
    assert math.hypot(*clipped["a"].tolist(), clipped["b"].item()) == pytest.approx(1.0)
    assert clipped["b"].item() == pytest.approx(0.8)
    for untouched in (clip(vector, 5.1), clip(vector, math.inf)):
        assert torch.equal(untouched["a"], vector["a"].double())


@pytest.mark.parametrize("size", [1e-300, 1e-170, 1e170, 1.7e308])
@pytest.mark.parametrize("bound", [1e-290, 1.0, 1e200])
def test_clipping_is_right_for_every_finite_vector(size, bound):
    """Squares of the smallest vanish, and of the largest overflow."""
    vector = {"a": torch.tensor([0.6 * size, 0.0], dtype=torch.float64), "b": torch.tensor(-size, dtype=torch.float64)}
    clipped = clip(vector, bound)
    for key, tensor in vector.items():
        expected = tensor if math.hypot(0.6, 1) * size <= bound else tensor / size / math.hypot(0.6, 1) * bound
        torch.testing.assert_close(clipped[key], expected, rtol=1e-14, atol=0)
    assert clip({}, 1.0) == {}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_vector_that_is_not_finite_is_zero_and_a_zero_vector_stays(value):
    clipped = clip({"a": torch.tensor([1000.0, value]), "b": torch.ones(3)}, 1.0)
    assert not any(tensor.any() for tensor in clipped.values())
    assert not clip({"a": torch.zeros(3)}, 1.0)["a"].any()
