"""The planner: it says what the run does, and warns of runs that cannot learn or promise nothing."""

import json
import re

import pytest

from common.adapter.spec import Spec
from common.adapter.values import Key, LayerShape
from common.privacy import accounting
from deploy import plan
from deploy.command import main
from strategies import Recipe, read_config
from tests.support import ROOT
from tests.support.grid import run_in_process
from tests.support.outcome import events
from tests.support.private_runs import PRIVATE, spent

PROFILE = str(ROOT / "profiles/private.toml")
SPEC = Spec({"up": LayerShape(48, 16), "down": LayerShape(16, 48)}, {Key("head", "W"): (2, 16)}, rank=4, scale=2.0)


@pytest.mark.slow
def test_the_plan_is_what_the_run_does(settings, tmp_path, capsys):
    flat = settings(**PRIVATE)
    run_in_process(flat, nodes=2)
    capsys.readouterr()
    overrides = [f"{key}={json.dumps(value)}" for key, value in flat.items()]
    assert main(["plan", "--records", "400", *overrides]) == 0
    shown = capsys.readouterr().out
    rows = spent(tmp_path, "node-000")
    assert re.findall(r"epsilon after round \d+ +│ ([\d.]+)", shown) == [f"{row.epsilon:.3f}" for row in rows]
    assert re.findall(r"noise multiplier +│ ([\d.]+)", shown) == [f"{row.noise_multiplier:.4g}" for row in rows[:1]]
    assert re.findall(r"sampling rate +│ ([\d.]+)", shown) == [f"{row.sample_rate:.4g}" for row in rows[:1]]
    up = events(tmp_path, "train")[0]["bytes_up"]
    (planned,) = re.findall(r"ffa-lora \* +│ [\d,]+ +│ ([\d.]+) kB +│", shown)
    assert float(planned) * 1e3 == pytest.approx(up, rel=0.02)


@pytest.mark.slow
def test_every_node_gets_its_own_noise():
    config = read_config({**PRIVATE, "privacy.accountant": "prv", "privacy.expected-batch": 64})
    large, small = plan.releases(config, [5000, 500])
    assert large.noise_multiplier < small.noise_multiplier
    for release in (large, small):
        spent = accounting.epsilon([release] * 3, 1e-5, "prv")
        assert 7.99 <= spent <= 8.0


@pytest.mark.parametrize(
    ("rule", "trained", "up", "down"),
    [
        ("fedit", 2 * 4 * (48 + 16) + 32, 2 * 4 * (48 + 16) + 32, 2 * 4 * (48 + 16) + 32),
        ("ffa-lora", 4 * (48 + 16) + 32, 4 * (48 + 16) + 32, 4 * (48 + 16) + 32),
        ("fedsa-lora", 2 * 4 * (48 + 16) + 32, 4 * (48 + 16) + 32, 2 * 4 * (48 + 16) + 32),
    ],
)
def test_what_a_rule_trains_and_sends(rule, trained, up, down):
    config = read_config({**PRIVATE, "rule.name": rule, "wire.up": "bf16", "wire.down": "bf16"})
    found = plan.rule_plan(Recipe.build(config), SPEC)
    assert (found.trained, found.noised, found.up) == (trained, trained, 2 * up)
    assert found.down <= 2 * down
    whole = config.model_copy(update={"privacy": config.privacy.model_copy(update={"mode": "update-local"})})
    assert plan.rule_plan(Recipe.build(whole), SPEC).noised == up


def test_noise_over_signal_is_the_measured_one():
    """2000 examples, batch 256, 40 steps, epsilon 6: measured for FFA-LoRA of rank 8, r x r matrices, and a head."""
    config = read_config({**PRIVATE, "privacy.epsilon": 6.0, "privacy.expected-batch": 256, "train.steps": 40})
    release = accounting.plan(config.privacy, 2000, 40, 1)
    for values, expected in ((37634, 0.81), (1538, 0.16), (770, 0.12)):
        assert plan.noise_over_signal(config, values, release, 2000, 1) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    ("changes", "sizes", "expected"),
    [
        (
            {"privacy.delta": 0.01},
            [100],
            r"100 records: delta 0.01 is not below 1/100: .*Set privacy.delta to 1e-03 or",
        ),
        ({"privacy.expected-batch": 64}, [40], r"40 records: every record is in every step, so sampling protects none"),
        (
            {"privacy.epsilon": 0.1, "privacy.accountant": "prv"},
            [400],
            r"noise is [\d.]+ times the largest signal. Raise privacy.expected-batch",
        ),
        ({"privacy.epsilon": 20.0}, [400], r"epsilon 20 promises little: odds may change 5e\+08-fold"),
        ({"privacy.mode": "update-local"}, [400], r"largest signal. Use privacy.mode = 'example'"),
        ({"privacy.mode": "update-central"}, [400, 400], r"largest signal. It needs more nodes, or fewer values"),
    ],
)
def test_it_warns(changes, sizes, expected):
    config = read_config({**PRIVATE, **changes})
    own = plan.rule_plan(Recipe.build(config), SPEC)
    found = plan.warnings(config, sizes, plan.releases(config, sizes), own)
    assert any(re.search(expected, warning) for warning in found), found


def test_a_sound_plan_has_no_warning():
    config = read_config({**PRIVATE, "privacy.expected-batch": 512})
    own = plan.rule_plan(Recipe.build(config), SPEC)
    assert plan.warnings(config, [5000], plan.releases(config, [5000]), own) == []


def test_a_plan_is_read_from_a_profile_and_overrides(capsys):
    changes = ["task.name=text", "model.pooling=default", "num-server-rounds=2", "privacy.accountant=rdp"]
    assert main(["plan", "--records", "5000,600", PROFILE, *changes, "fraction-train=0.5"]) == 0
    shown = capsys.readouterr().out
    assert "example, 2 rounds, delta 1e-05, accountant rdp, ffa-lora at learning rate 0.005; for a node" in shown
    assert "a node's mean share of the rounds: 1" in shown
    assert "│ 5000 " in shown or "┃ 5000 " in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--records", "100"], "a run without privacy has no plan (privacy.mode). Set privacy.mode=example"),
        (["--records", "100", "no.toml"], "a settings file cannot be read (no.toml)"),
        (
            ["privacy.mode=example", "train.weighting=uniform"],
            "a plan needs the public number of each node's records (--records, privacy.records): got neither",
        ),
        (["--records", "100", "privacy.mode=example"], "train.weighting: expected 'uniform' or 'declared'"),
    ],
)
def test_mistakes_are_told(arguments, message, capsys):
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err
