"""Private training, private changes and the private mean: guarantees and refusals."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from client_app.privacy import poisson_sample, privatise, train_privately
from client_app.training import Turn, train, turn_of
from common.adapter.values import Key, State, Update
from common.config.privacy import PrivacyConfig
from common.config.run import LoraConfig, RunConfig
from common.error import BouquetError
from common.models import adapted
from common.privacy.accounting import Release
from common.tasks import Example
from strategies import RULES, Recipe, read_config
from strategies.gradients import Backward, Fast
from strategies.optimizers import AdamW, LaLora
from strategies.private_mean import PrivateMean
from strategies.rules import FLASC, FedIT, Ravan
from tests.support.factors import initial, started, trained
from tests.support.private_steps import EXAMPLES, PLAIN, PRIVATE, TEXT, fresh, gradients, train_here, within
from tests.support.training import recipe_of

UNBOUNDED = PrivacyConfig.model_construct(mode="example", clip=math.inf, expected_batch=1)


@pytest.mark.parametrize("rate", [0.02, 0.5])
def test_every_example_is_drawn_at_the_rate_and_by_itself(rate):
    count, steps = 200, 2000
    drawn = np.zeros((steps, count))
    for step in range(steps):
        drawn[step, poisson_sample(count, rate)] = 1
    deviation = math.sqrt(rate * (1 - rate))
    assert np.abs(drawn.mean(0) - rate).max() <= 6 * deviation / math.sqrt(steps)
    sizes = drawn.sum(1)
    assert within(sizes.mean(), count * rate, deviation * math.sqrt(count / steps))
    assert sizes.var() == pytest.approx(count * deviation**2, rel=6 * math.sqrt(2 / steps))
    assert within(float(np.corrcoef(drawn[:-1].ravel(), drawn[1:].ravel())[0, 1]), 0, (steps * count) ** -0.5)


def test_a_rate_of_one_draws_all_and_no_seed_gives_the_sample():
    assert poisson_sample(50, 1.0) == list(range(50))

    def draw():
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(42)
        return poisson_sample(200, 0.5)

    assert draw() != draw()


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule", [n for n, rule in RULES.items() if rule().plan(1).sent and Fast.knows(rule().structure)]
)
def test_no_noise_and_no_clipping_is_the_rule_itself_to_the_bit(rule):
    """On one example, so that a Poisson sample at rate 1 and a shuffled pass are the same batch."""
    rule = Ravan(scales=0) if rule == "ravan" else RULES[rule]()
    tokens = [1, *range(10, 42)]
    sent = []
    for private in (False, True):
        model = fresh(structure=rule.structure)
        state = State(model.tensors(), 2.0, round=1)
        model.install(state.adapter, state.scale, {})
        steps = PLAIN.model_copy(update={"steps": 3, "batch_size": 1})
        config = RunConfig().model_copy(update={"train": steps, "privacy": UNBOUNDED, "num_server_rounds": 2})
        chosen = replace(Recipe.around(rule, config), gradient=Fast() if private else Backward())
        turn = turn_of(chosen, state, model.keys, seed="s")
        if private:
            train_privately(model, chosen, TEXT, [[Example(tokens, tokens)]], turn, Release(0.0, 1.0, 3))
        else:
            train(model, chosen, TEXT, [Example(tokens, tokens)], turn)
        update = rule.send(state, model.tensors())
        start = None if rule.relative else state.adapter
        sent.append(privatise(start, update, math.inf, 0.0) if private else update)
    assert sent[0].keys() == sent[1].keys()
    assert all(torch.equal(sent[0][key], sent[1][key]) for key in sent[0])
    assert any(not torch.equal(sent[0][key], state.adapter[key]) for key in sent[0])


def test_a_step_is_the_clipped_sum_and_noise_over_the_public_batch():
    model = fresh()
    size = sum(tensor.numel() for tensor in model.tensors().values())
    privacy = PRIVATE.model_copy(update={"clip": 0.5, "expected_batch": 16})
    with gradients() as noisy:
        train_here(fresh(), EXAMPLES, Release(4.0, 1.0, 1), privacy)
    with gradients() as clean:
        train_here(fresh(), EXAMPLES, Release(0.0, 1.0, 1), privacy)
    assert float(clean[0].norm()) <= len(EXAMPLES) * 0.5 / 16
    noise = noisy[0] - clean[0]
    assert within(float(noise.mean()), 0, 4 * 0.5 / 16 * size**-0.5)
    assert within(float(noise.std()), 4 * 0.5 / 16, 4 * 0.5 / 16 * (2 * size) ** -0.5)


def test_what_rests_in_a_step_is_neither_clipped_nor_noised():
    """LA-LoRA trains the factors in turns: its first step is that of whoever trains B alone."""
    recipe = replace(recipe_of(PLAIN, gradient=Fast()), optimizer=LaLora(filter=0))
    privacy = PRIVATE.model_copy(update={"clip": 1e-3})
    recipe = replace(recipe, config=recipe.config.model_copy(update={"privacy": privacy}))
    units, model = [[example] for example in EXAMPLES], fresh()
    outer = [key for key in model.keys if key.part == "B"]
    with gradients() as turns:
        train_privately(model, recipe, TEXT, units, Turn(0, model.keys), Release(0.0, 1.0, 2))
    with gradients() as alone:
        train_privately(fresh(), replace(recipe, optimizer=AdamW()), TEXT, units, Turn(0, outer), Release(0.0, 1.0, 1))
    assert torch.equal(turns[0], alone[0])
    sizes = [sum(t.numel() for key, t in model.tensors().items() if key.part == part) for part in "BA"]
    assert [len(step) for step in turns] == sizes
    with gradients() as noisy:
        train_privately(fresh(), recipe, TEXT, units, Turn(0, model.keys), Release(4.0, 1.0, 2))
    assert [len(step) for step in noisy] == sizes


def test_neighbours_differ_by_at_most_the_clipping_norm():
    """Through the whole step, sampling and batches included: with and without an example that is clipped."""
    seen = []
    for data in (EXAMPLES, EXAMPLES[1:]):
        with gradients() as step:
            train_here(fresh(), data, Release(0.0, 1.0, 1))
        seen.append(step[0] * PRIVATE.expected_batch)
    assert 0.99 < float((seen[0] - seen[1]).norm()) <= 1


def test_an_empty_sample_is_a_step_of_noise_alone():
    model = fresh()
    before = model.tensors()
    with gradients() as seen:
        training = train_here(model, EXAMPLES, Release(2.0, 1e-9, 3))
    assert (training.steps, training.tokens, len(seen)) == (3, 0, 3)
    for gradient in seen:
        assert within(float(gradient.std()), 2 / 4, 2 / 4 * (2 * len(gradient)) ** -0.5)
    assert abs(float(torch.corrcoef(torch.stack(seen))[0, 1])) <= 5 * len(seen[0]) ** -0.5
    assert all(not torch.equal(tensor, before[key]) for key, tensor in model.tensors().items())


@pytest.mark.slow
def test_two_private_runs_of_one_seed_differ_and_so_does_their_dropout():
    for release, dropout in ((Release(1.0, 1.0, 1), 0.0), (Release(0.0, 1.0, 1), 0.5)):
        seen = []
        for _ in range(2):
            torch.manual_seed(0)
            model = fresh()
            for name, module in model.network.named_modules():
                if isinstance(module, torch.nn.Identity) and "lora_dropout" in name:
                    parent, child = name.rsplit(".", 1)
                    model.network.get_submodule(parent)[child] = torch.nn.Dropout(dropout)
            with gradients() as step:
                train_here(model, EXAMPLES, release)
            seen.append(step[0])
        assert not torch.equal(*seen)


def test_a_tensor_that_did_not_move_ends_the_round():
    with pytest.raises(BouquetError, match=r"a trained tensor has not moved .*expected a change in every tensor"):
        train_here(fresh(), EXAMPLES, Release(1.0, 1.0, 1), config=PLAIN.model_copy(update={"learning_rate": 1e-30}))

    class Corrupted(adapted.LoraModel):
        """What is trained is no longer what is sent: PEFT and Opacus have done it in silence."""

        def tensors(self):
            return {key: torch.ones(2) for key in self.keys}

    model = Corrupted(adapted.base.load(RunConfig().model, 0, torch.device("cpu")), LoraConfig())
    with pytest.raises(
        BouquetError, match=r"Raise train.learning-rate if it is tiny; otherwise what is trained is not"
    ):
        train_here(model, EXAMPLES, Release(1.0, 1.0, 1))


def state_and_change(size):
    """A state, and what a node would send after a change of norm ``size``."""
    model = fresh("none")
    state = initial(FedIT(), model.spec)
    change = {key: torch.randn(tensor.shape) for key, tensor in state.adapter.items()}
    norm = math.sqrt(sum(float(tensor.square().sum()) for tensor in change.values()))
    return state, {key: state.adapter[key] + tensor * size / norm for key, tensor in change.items()}


def moved(state, tensors):
    return torch.cat([(tensor.double() - state.adapter[key]).flatten() for key, tensor in tensors.items()])


def test_a_private_change_is_clipped_whole_and_its_noise_covers_any_other():
    state, sent = state_and_change(10.0)
    clipped = moved(state, privatise(state.adapter, sent, 0.5, 0.0))
    assert 0.49 < float(clipped.norm()) <= 0.5
    noise = moved(state, privatise(state.adapter, sent, 0.5, 3.0)) - clipped
    # Two data sets of one node may send opposite changes: 2 C apart.
    assert within(float(noise.std()), 3 * 2 * 0.5, 3.0 * (2 * len(noise)) ** -0.5)
    assert within(float(noise.mean()), 0, 3.0 * len(noise) ** -0.5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_change_that_is_not_finite_is_none_and_no_change_is_noised_too(value):
    state, sent = state_and_change(0.1)
    key = next(iter(sent))
    sent[key][0, 0] = value
    assert not moved(state, privatise(state.adapter, sent, 0.5, 0.0)).any()
    nothing = privatise(state.adapter, dict(state.adapter), 0.5, 1.0)
    assert within(float(moved(state, nothing).std()), 1.0, 0.01)


def test_the_private_mean_bounds_every_node_whatever_it_sends_and_claims():
    state, small = state_and_change(0.1)
    _, huge = state_and_change(1e6)
    broken = {key: tensor * math.nan for key, tensor in small.items()}
    others = [Update(small, 1.0, state.scale)] * 2
    mean = PrivateMean(clip=0.5, noise_multiplier=0.0)
    without = moved(state, mean(state, others, asked=4).tensors)
    assert float(without.norm()) == pytest.approx(2 * 0.1 / 4, rel=1e-4)
    for node, influence in ((Update(huge, 1e9, state.scale), 0.5 / 4), (Update(broken, 1.0, state.scale), 0.0)):
        influenced = moved(state, mean(state, [*others, node], asked=4).tensors)
        assert float((influenced - without).norm()) == pytest.approx(influence, rel=0.01, abs=1e-6)
    noise = moved(state, PrivateMean(0.5, 3.0)(state, others, asked=4).tensors) - without
    assert within(float(noise.std()), 3 * 0.5 / 4, 3 * 0.5 / 4 * (2 * len(noise)) ** -0.5)


def test_the_private_mean_without_noise_and_bound_is_the_mean():
    state, one = state_and_change(0.1)
    _, two = state_and_change(0.2)
    got = PrivateMean(math.inf, 0.0)(state, [Update(one, 5.0, 2.0), Update(two, 1.0, 2.0)], asked=2).tensors
    for key, tensor in got.items():
        torch.testing.assert_close(tensor, (one[key] + two[key]) / 2, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("relative", [True, False])
def test_a_change_that_is_not_finite_leaves_no_trace_of_itself(value, relative):
    """A difference is sent by some rules; zero times infinity would be NaN, and tell where there was one."""
    key = Key("layer", "B")
    sent = {key: torch.tensor([1.0, value, 2.0])}
    start = None if relative else {key: torch.zeros(3)}
    assert torch.equal(privatise(start, sent, 1.0, 0.0)[key], torch.zeros(3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rule.name": "fedit", "privacy.mode": "update-central", "mean.name": "median"},
            r"a robust mean looks at every update.*\(privacy.mode = 'update-central', mean.name\): expected weighted",
        ),
        (
            {"rule.name": "hetlora", "privacy.mode": "update-local"},
            r"the size of a message reveals what a node learned.*expected rule.hetlora.keep = 1.0",
        ),
        ({"rule.name": "fed-plora", "privacy.mode": "update-central"}, "needs more of the updates than their mean"),
    ],
)
def test_a_mode_that_would_not_be_private_with_a_rule_is_refused(changes, message):
    with pytest.raises(BouquetError, match=message):
        Recipe.build(read_config(changes | {"train.weighting": "uniform"}))


def test_differences_are_noised_as_they_are_sent():
    """FLASC sends changes: they are clipped as such, and every value is noised, the masked ones too."""
    rule = FLASC()
    state = started(FedIT())
    update = trained(rule, state, 0, 1.0)
    noised = privatise(None, update.tensors, 0.5, 1.0)
    # Noise on a grid is now and then 0.
    assert all(tensor.count_nonzero() > 0.99 * tensor.numel() for tensor in noised.values())
    clipped = privatise(None, update.tensors, 0.5, 0.0)
    assert sum(float(tensor.square().sum()) for tensor in clipped.values()) ** 0.5 == pytest.approx(0.5, rel=0.01)
    mean = PrivateMean(0.5, 0.0, relative=True)(state, [update, update], asked=2)
    for key, tensor in mean.tensors.items():
        torch.testing.assert_close(tensor, clipped[key], rtol=1e-2, atol=1e-3)
