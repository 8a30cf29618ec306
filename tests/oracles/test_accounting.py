"""Epsilon and noise: Opacus's figures, held to Google's dp-accounting and to what the literature gets wrong."""

import math
import time

import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant, RDPAccountant

from common.config.privacy import PrivacyConfig
from common.error import BouquetError
from common.privacy import accounting
from common.privacy.accounting import Release

DELTA = 1e-5
# Noise multipliers of sampling rate, steps and target epsilon at DELTA, from an independent PLD computation.
GOLDEN = [
    (0.05, 200, 1, 2.840),
    (0.05, 200, 3, 1.288),
    (0.05, 200, 6, 0.895),
    (0.00891, 10000, 3, 1.429),
]


def example(**changes) -> PrivacyConfig:
    return PrivacyConfig.model_validate({"mode": "example", **changes})


def by_google(releases: list[Release], delta: float = DELTA) -> float:
    account = PLDAccountant()
    for release in releases:
        gaussian = dp_event.GaussianDpEvent(release.noise_multiplier)
        sampled = (
            gaussian if release.sample_rate == 1 else dp_event.PoissonSampledDpEvent(release.sample_rate, gaussian)
        )
        account.compose(dp_event.SelfComposedDpEvent(sampled, release.steps))
    return account.get_epsilon(delta)


HISTORIES = [
    [Release(1.292, 0.05, 200)],
    [Release(1.0, 1.0, 1)],
    [Release(4.0, 1.0, 20)],
    [Release(1.1, 0.05, 10)] * 3 + [Release(2.0, 0.01, 50), Release(5.0, 1.0, 2)],
]


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize(("name", "accountant"), [("prv", PRVAccountant), ("rdp", RDPAccountant)])
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_epsilon_is_opacus_own(history, name, accountant):
    account = accountant()
    account.history = [(release.noise_multiplier, release.sample_rate, release.steps) for release in history]
    assert accounting.epsilon(history, DELTA, name) == pytest.approx(account.get_epsilon(DELTA), rel=1e-6)


@pytest.mark.parametrize("history", HISTORIES)
def test_epsilon_agrees_with_googles_accountant_from_above(history):
    google = by_google(history)
    # PRV's figure is an upper bound within 0.01, and 0.01 of its own error; RDP's is an upper bound.
    assert google - 1e-3 <= accounting.epsilon(history, DELTA, "prv") <= google + 0.025
    assert google <= accounting.epsilon(history, DELTA, "rdp") <= 1.8 * google


@pytest.mark.parametrize(("rate", "steps", "target", "golden"), GOLDEN)
def test_the_noise_for_an_epsilon_is_the_published_one_and_enough(rate, steps, target, golden):
    noise = accounting.noise_multiplier(float(target), DELTA, rate, steps, "prv")
    assert noise == pytest.approx(golden, rel=0.02)
    assert by_google([Release(noise, rate, steps)]) <= target


def test_rounds_compose_and_a_fresh_accountant_a_round_would_hide_it():
    a_round = Release(1.1, 0.05, 10)
    whole = accounting.epsilon([a_round] * 20, DELTA, "rdp")
    assert whole == accounting.epsilon([Release(1.1, 0.05, 200)], DELTA, "rdp") == pytest.approx(4.44, abs=0.01)
    # The published bug: an accountant of its own for each round, which reports this.
    assert accounting.epsilon([a_round], DELTA, "rdp") == pytest.approx(1.73, abs=0.01)
    calibrated_per_round = accounting.noise_multiplier(3.0, DELTA, 0.05, 10, "prv")
    assert accounting.epsilon([Release(calibrated_per_round, 0.05, 10)] * 20, DELTA, "prv") > 7


@given(
    noise=st.floats(0.5, 20),
    rate=st.floats(0.001, 1.0),
    steps=st.integers(1, 500),
    factor=st.floats(1.1, 3.0),
)
@settings(max_examples=40, deadline=None)
def test_epsilon_grows_with_steps_and_rate_and_falls_with_noise(noise, rate, steps, factor):
    def cost(*mechanism):
        return accounting.epsilon([Release(*mechanism)], DELTA, "rdp")

    cheap = cost(noise, rate, steps)
    assert cost(noise, rate, math.ceil(steps * factor)) >= cheap
    assert cost(noise, min(1.0, rate * factor), steps) >= cheap - 1e-9
    assert cost(noise * factor, rate, steps) <= cheap


def test_the_plan_spends_epsilon_in_its_rounds_and_no_more_fit():
    release = accounting.plan(example(epsilon=3.0), records=1000, steps_per_round=10, rounds=20)
    assert (release.sample_rate, release.steps) == (0.064, 10)
    assert 2.99 <= accounting.epsilon([release] * 20, DELTA, "prv") <= 3.0
    assert accounting.epsilon([release] * 21, DELTA, "prv") > 3.0


def test_noise_sized_for_the_mean_participation_is_found_too_little():
    """FedSVD's published script: half of the nodes a round, so noise for half of the rounds."""
    release = accounting.plan(example(epsilon=6.0), records=1000, steps_per_round=10, rounds=50)
    assert accounting.epsilon([release] * 100, DELTA, "prv") > 7


def test_a_whole_change_is_one_unsampled_mechanism_a_round():
    release = accounting.plan(PrivacyConfig(mode="update-local"), records=7, steps_per_round=10, rounds=20)
    assert (release.sample_rate, release.steps) == (1.0, 1)
    assert 7.98 <= accounting.epsilon([release] * 20, DELTA, "prv") <= 8.0


def test_a_given_noise_multiplier_is_used_as_it_is():
    release = accounting.plan(example(**{"noise-multiplier": 1.5}), records=1000, steps_per_round=10, rounds=20)
    assert release == Release(1.5, 0.064, 10)


def test_a_batch_larger_than_the_data_is_every_example():
    assert accounting.plan(example(), records=40, steps_per_round=1, rounds=1).sample_rate == 1.0


def test_noise_that_covers_the_scores_too_is_more():
    scored = example(epsilon=3.0, **{"score-noise": 5.0})
    plain, beside = (accounting.plan(scored, 1000, 10, 20, scores) for scores in (0, 6))
    assert beside.noise_multiplier > plain.noise_multiplier
    assert 2.98 <= accounting.epsilon([beside] * 20 + [Release(5.0, 1.0, 1)] * 6, DELTA, "prv") <= 3.0


def test_under_central_noise_a_record_moves_a_node_by_twice_the_norm():
    release = Release(4.0, 1.0, 1)
    assert accounting.by_record(release, "update-central") == Release(2.0, 1.0, 1)
    assert accounting.by_record(release, "example") == accounting.by_record(release, "update-local") == release
    assert accounting.by_node(Release(2.0, 1.0, 1), "update-central") == release


def test_no_noise_is_no_privacy():
    assert accounting.epsilon([Release(2.0, 0.1, 5), Release(0.0, 0.1, 1)], DELTA, "prv") == math.inf
    assert accounting.epsilon([], DELTA, "prv") == 0.0


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
@pytest.mark.parametrize("noise", [0.01, 0.3, 1.0, 30.0, 1e6])
@pytest.mark.parametrize("rate", [1e-9, 1e-3, 1.0])
def test_whatever_a_release_may_be_has_a_finite_epsilon_in_no_time(accountant, noise, rate):
    """A coordinator chooses it: 1e-160 never returned and 1e-200 divided by zero, while the ledger was locked."""
    started = time.monotonic()
    for steps, delta in ((1, 1e-15), (1, 0.1), (1, DELTA), (10**4, DELTA), (10**9, 1e-15), (10**9, 0.1)):
        found = accounting.epsilon([Release(noise, rate, steps)], delta, accountant)
        assert 0 <= found < math.inf
    assert time.monotonic() - started < 60


def test_so_little_noise_that_nothing_is_promised_takes_no_memory():
    """PRV's mesh for this one would take gigabytes: a coordinator could end a node's process by asking."""
    assert accounting.epsilon([Release(0.02, 0.05, 100)], DELTA, "prv") > 1000


def test_an_epsilon_that_no_noise_reaches_is_refused():
    with pytest.raises(BouquetError, match=r"no noise is enough \(privacy.epsilon\).*got 0.001. Raise privacy.epsilon"):
        accounting.noise_multiplier(0.001, DELTA, 0.05, 100, "prv")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((-1.0, 0.1, 1), "noise multiplier"),
        ((math.nan, 0.1, 1), "noise multiplier"),
        ((1e-160, 0.1, 1), "noise multiplier"),
        ((1e-200, 0.1, 1), "noise multiplier"),
        ((0.0099, 0.1, 1), "noise multiplier"),
        ((math.inf, 0.1, 1), "noise multiplier"),
        ((1.0, 0.0, 1), "sample rate"),
        ((1.0, 1e-10, 1), "sample rate"),
        ((1.0, math.nan, 1), "sample rate"),
        ((1.0, 0.1, 10**9 + 1), "steps"),
        ((1.0, 1.1, 1), "sample rate"),
        ((1.0, 0.1, 0), "steps"),
    ],
)
def test_a_release_out_of_range_is_refused(values, message):
    with pytest.raises(BouquetError, match=rf"a release that cannot be accounted for \({message}\): expected"):
        Release(*values)


@pytest.mark.parametrize("delta", [0.0, 1e-16, 0.2, 1.0, math.nan])
def test_a_delta_out_of_range_is_refused(delta):
    with pytest.raises(BouquetError, match=r"cannot be accounted for \(delta\): expected 1e-15 to 0.1, got"):
        accounting.epsilon([Release(1.0, 0.1, 1)], delta, "rdp")
