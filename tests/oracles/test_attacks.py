"""Attacks on private training: what they find is within the promise, and beyond it where the noise is left out."""

import math

import pytest
import torch
from scipy.stats import beta
from torch import nn

from client_app.privacy import poisson_sample
from common import tasks
from common.config.privacy import PrivacyConfig
from common.config.run import RunConfig, TrainConfig
from common.models import adapted, base
from common.privacy.accounting import Release, epsilon
from common.privacy.accounting import noise_multiplier as least_noise
from common.privacy.gaussian import Gaussian
from common.tasks import Example
from strategies.rules import FedIT
from tests.support.architectures import tiny_bert
from tests.support.factors import initial
from tests.support.private_steps import attach, train_here


def found_epsilon(inside, outside, delta):
    """A lower bound of epsilon, 99.9 % sure, from the scores of runs with and without a canary.

    The threshold is chosen on one half of the runs and tried on the other (Jagielski et al., arXiv:2006.07709).
    """
    half = len(inside) // 2
    thresholds = torch.cat([inside[:half], outside[:half]])
    gaps = [(inside[:half] > t).float().mean() - (outside[:half] > t).float().mean() for t in thresholds]
    threshold = thresholds[int(torch.stack(gaps).argmax())]
    hits, alarms = (int((scores[half:] > threshold).sum()) for scores in (inside, outside))
    rest = len(inside) - half
    sure = 0.0005
    hits_at_least = float(beta.ppf(sure, hits, rest - hits + 1))
    alarms_at_most = float(beta.ppf(1 - sure, alarms + 1, rest - alarms))
    return math.log(max(hits_at_least - delta, 1e-9) / alarms_at_most)


@pytest.mark.parametrize(("share", "kept"), [(1.0, True), (0.1, False)])
def test_a_canary_is_found_no_better_than_epsilon_allows(share, kept):
    """One private step with and without an example that is unlike all others; ``share`` of the noise is added."""
    torch.manual_seed(0)
    network = nn.Linear(20, 1, bias=False)
    data, canary = 0.1 * torch.randn(8, 20), 100 * torch.eye(20)[:1]
    release, delta = Release(noise_multiplier=2.0, sample_rate=0.9, steps=1), 1e-5
    mechanism = Gaussian(1.0, share * release.noise_multiplier)
    weight = network.weight

    def score(examples):
        with attach("fast", network, mechanism.bound) as engine:
            if sample := poisson_sample(len(examples), release.sample_rate):
                engine.add(network(examples[sample])[:, 0])
            return dict(mechanism.release(engine.take()))[weight][0, 0]

    inside = torch.stack([score(torch.cat([data, canary])) for _ in range(1500)])
    outside = torch.stack([score(data) for _ in range(1500)])
    found = found_epsilon(inside, outside, delta)
    assert (found <= epsilon([release], delta, "rdp")) == kept, found


def advantage(scores_in, scores_out):
    """Of the best threshold on the loss: how much oftener it calls a member a member than a stranger one."""
    return max(float((scores_in <= t).float().mean() - (scores_out <= t).float().mean()) for t in scores_in)


@pytest.mark.slow
def test_membership_shows_without_privacy_and_within_the_bound_with_it(tmp_path):
    """A classifier that learns 64 random labels by heart; an attacker who knows the losses.

    Any attack on an (epsilon, delta)-private model has an advantage of at most tanh(epsilon / 2) + delta (Humphries et
    al., arXiv:2010.12112); a sample of 64 members and 64 strangers adds its own error.
    """
    generator = torch.Generator().manual_seed(0)
    settings = {"model.name": tiny_bert(tmp_path), "model.quantization": "none", "task.name": "classify"}
    config = RunConfig.from_flower(settings)
    task = tasks.build(config.task)
    examples = [
        Example(torch.randint(3, 2000, (8,), generator=generator).tolist(), [int(label)])
        for label in torch.randint(2, (128,), generator=generator)
    ]
    steps, epsilon, delta = 200, 0.5, 1e-3
    training = TrainConfig.model_validate({"batch-size": 64, "learning-rate": 0.003, "schedule": "constant"})
    found = {}
    for sigma in (0.0, least_noise(epsilon, delta, 0.5, steps, "rdp")):
        model = adapted.LoraModel(base.load(config.model, 2, torch.device("cpu")), config.lora)
        state = initial(FedIT(), model.spec)
        model.install(state.adapter, state.scale, {})
        privacy = PrivacyConfig.model_validate({"expected-batch": 32, "clip": 1.0 if sigma else 100.0})
        release = Release(sigma, 0.5, steps)
        train_here(model, examples[:64], release, privacy, training, task)
        model.network.eval()
        with torch.no_grad():
            losses = task.losses(model.outputs(task.collate(examples, 0)))
        found[sigma > 0] = advantage(losses[:64], losses[64:])
    bound = math.tanh(epsilon / 2) + delta
    assert found[False] > 0.6
    # Twice the deviation of a difference of two frequencies among 64, on top of the bound.
    assert found[True] < bound + 2 * math.sqrt(2 * 0.25 / 64) < 0.45
