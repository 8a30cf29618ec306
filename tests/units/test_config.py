"""The configs: defaults, types, and every mistake at once in the user's own words."""

import math
import re
import tomllib

import pytest
from flwr.common.config import parse_config_args

from common.config.node import NodeConfig
from common.config.run import RunConfig
from common.config.section import ConfigError, flatten
from common.error import BouquetError
from common.tasks import TASKS
from deploy.command import main
from strategies import AXES, RULES, Recipe, read_config
from strategies.registries import NAMES
from strategies.rules import FLoRIST
from tests.support import ROOT

PYPROJECT = ROOT / "pyproject.toml"


def test_pyprojects_defaults_are_the_ones_of_the_code():
    """A run that says nothing, and one that Flower starts with pyproject's table, are the same to the last type."""
    written = dict(flatten(tomllib.loads(PYPROJECT.read_text())["tool"]["flwr"]["app"]["config"]))
    defaults = RunConfig.from_flower({}, AXES, NAMES).to_flower()
    assert written == defaults
    assert {key: type(value) for key, value in written.items()} == {key: type(value) for key, value in defaults.items()}


def test_the_flat_form_makes_the_round_trip():
    config = read_config({"lora.rank": 4, "train.learning-rate": 1, "wire.up": "bf16"})
    assert (config.lora.rank, config.train.learning_rate, config.wire.up) == (4, 1.0, "bf16")
    assert read_config(config.to_flower()) == config


def test_every_mistake_is_told_at_once_in_the_users_keys():
    with pytest.raises(ConfigError) as caught:
        read_config(
            {
                "lora.rnak": 4,
                "lora.rank": 0,
                "model.quantization": "nf5",
                "train.batch-size": "8",
                "rule.name": "fedex",
                "task.name": "txt",
            }
        )
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert lines[0] == "6 mistakes in the run config:"
    names = ", ".join(RULES)
    assert f"rule.name: expected one of {names}, got 'fedex'. Did you mean 'fedex-lora'?" in lines
    assert f"task.name: expected one of {', '.join(TASKS)}, got 'txt'. Did you mean 'text'?" in lines
    assert "lora.rank: expected greater than or equal to 1, got 0" in lines
    assert "lora.rnak: unknown key. Did you mean 'lora.rank'?" in lines
    assert (
        "model.quantization: expected 'nf4', 'int8', 'none', 'gptq', 'awq', 'fp8' or 'compressed-tensors', got 'nf5'"
        in lines
    )
    assert "train.batch-size: expected a whole number, got '8'" in lines
    assert lines[-1] == "Correct them in pyproject.toml ([tool.flwr.app.config]) or in --run-config."


def test_hyperparameters_reach_their_rule_and_mistakes_are_told():
    recipe = Recipe.read({"rule.name": "florist", "rule.florist.energy": 0.8})
    assert isinstance(recipe.rule, FLoRIST)
    assert recipe.rule.energy == 0.8
    with pytest.raises(ConfigError, match=r"rule.florist.enrgy: unknown key. Did you mean 'rule.florist.energy'\?"):
        read_config({"rule.florist.enrgy": 0.8})
    with pytest.raises(ConfigError, match=r"rule.florist.energy: expected a number, got 'all'"):
        read_config({"rule.florist.energy": "all"})


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("rule.florist.energy", 2, "more than 0, at most 1, got 2"),
        ("rule.florist.energy", math.nan, "more than 0, at most 1, got nan"),
        ("rule.fedrot-lora.softness", -1, "0 to 1, got -1"),
        ("rule.lora-fair.solver", "sgd", "ridge or cosine, got 'sgd'"),
        ("rule.ravan.scales", 2, "0 or 1, got 2"),
        ("mean.trimmed.share", 0.5, "0 or more, less than 0.5, got 0.5"),
        ("optimizer.lora-pro.weight-decay", 101, "0 to 100, got 101"),
    ],
)
def test_a_value_out_of_range_is_told_with_its_range(key, value, expected):
    """Whether or not the member that it belongs to is the one that is chosen."""
    with pytest.raises(ConfigError, match=re.escape(f"{key}: expected {expected}")):
        read_config({key: value})


def test_what_has_to_be_given_is_asked_for_where_it_is_used():
    with pytest.raises(BouquetError, match=r"a value out of range \(init.lora-ga.source\): expected a file of public"):
        Recipe.read({"init.name": "lora-ga"})


def test_every_default_is_in_its_own_range():
    for kind in (kind for axis in AXES for kind in axis.values()):
        ranges = kind.ranges()
        outside = {key for key, value in kind.options().items() if value not in ranges[key]}
        assert outside <= {"source"}, kind.name  # the one that has to be given


@pytest.mark.parametrize("rule", RULES)
def test_an_open_rate_is_the_rules_own_and_one_that_is_set_wins(rule):
    own = read_config({"rule.name": rule})
    assert own.train.learning_rate == RULES[rule]().rate > 0
    assert read_config(own.to_flower()) == own
    assert read_config({"rule.name": rule, "train.learning-rate": 0.003}).train.learning_rate == 0.003


def test_rules_that_train_one_factor_or_a_core_have_a_larger_rate():
    """One rate for all of them left these at chance in a short run."""
    assert read_config({}).train.learning_rate == 0.005
    for rule, rate in (("ffa-lora", 0.02), ("fedsvd", 0.02), ("fed-sb", 0.02), ("ravan", 0.05)):
        assert read_config({"rule.name": rule}).train.learning_rate == rate


def test_a_nodes_mistakes_point_at_the_node():
    with pytest.raises(
        ConfigError, match=r"1 mistake in the node config:\n  lora-rnk: unknown key. Did you mean 'lora-rank'"
    ):
        NodeConfig.from_flower({"lora-rnk": 4})


@pytest.mark.parametrize("key", ["state-directory", "privacy-witness", "policy"])
def test_a_relative_path_of_a_nodes_is_told_with_its_file(key, tmp_path):
    file = tmp_path / "node.toml"
    file.write_text(f'{key} = "ward-1/it"\n')
    with pytest.raises(ConfigError) as caught:
        NodeConfig.read(file)
    first, mistake, cure = str(caught.value).splitlines()
    assert first == f"1 mistake in the node config {file}:"
    assert re.fullmatch(rf"  {key}: expected an absolute path, since an app does not .*, got 'ward-1/it'", mistake)
    assert cure == f"Correct them in {file}."


def test_a_value_where_a_table_belongs_is_a_mistake():
    with pytest.raises(ConfigError, match="lora: expected"):
        RunConfig.from_flower({"lora": 8, "lora.rank": 8})


def test_a_nodes_label_is_its_name_or_its_partition():
    assert NodeConfig.from_flower({"partition-id": 7, "num-partitions": 9}).label == "node-007"
    assert NodeConfig.from_flower({"name": "ward-3"}).label == "ward-3"


def test_rank_stabilised_scaling():
    assert RunConfig.from_flower({"lora.rank": 4, "lora.alpha": 8.0}).lora.scale == 2.0
    assert RunConfig.from_flower({"lora.rank": 4, "lora.alpha": 8.0, "lora.rslora": True}).lora.scale == 4.0
    # SFed-LoRA's alpha sqrt(N / r), arXiv:2603.08058, of alpha 16, ten nodes and rank 8.
    sfed = {"lora.rank": 8, "lora.alpha": 16 * 10**0.5, "lora.rslora": True}
    assert RunConfig.from_flower(sfed).lora.scale == pytest.approx(17.889, abs=5e-4)


@pytest.mark.parametrize(("profile", "rule"), [("private", "ffa-lora"), ("dp-lora", "fedit")])
def test_a_profile_is_a_run_config_as_flower_reads_it(profile, rule):
    flat = parse_config_args([str(ROOT / f"profiles/{profile}.toml")])
    config = read_config(flat)
    assert (config.rule, config.privacy.mode, config.train.weighting) == (rule, "example", "uniform")
    assert Recipe.build(config).rule.name == rule


def test_noise_on_the_mean_is_refused_for_a_rule_that_needs_more():
    private = {"rule.name": "flora", "train.weighting": "uniform"}
    config = read_config({**private, "privacy.mode": "update-central"})
    expected = (
        r"the rule 'flora' needs more .*\(privacy.mode = 'update-central'\): expected one of fedit, ffa-lora, "
        r"rolora, .*, got flora\. Choose another rule, or privacy.mode = 'example' or 'update-local'"
    )
    with pytest.raises(BouquetError, match=expected):
        Recipe.build(config)
    assert Recipe.build(read_config({**private, "privacy.mode": "update-local"})).rule.name == "flora"


def test_a_private_run_is_refused_where_a_setting_would_let_a_count_out():
    with pytest.raises(ConfigError) as caught:
        read_config({"privacy.mode": "example", "train.steps": 0, "data.pooled": True})
    assert str(caught.value).splitlines() == [
        "3 mistakes in the run config:",
        "  train.weighting: expected 'uniform' or 'declared' in a private run, got 'examples'",
        "  train.steps: expected 1 or more in a private run, got 0, which counts a node's examples",
        "  data.pooled: expected false in a private run, got true, which no node's budget covers",
        "A private run lets no un-noised number leave a node.",
    ]
    read_config({"privacy.mode": "update-local", "train.weighting": "declared", "train.steps": 0})


def test_a_run_with_settings_is_printed_as_toml_that_is_read_again(capsys, tmp_path):
    assert main(["config", "rule.name=ffa-lora", "lora.rank=4"]) == 0
    said = capsys.readouterr().out
    assert 'rule.name = "ffa-lora"  # default "fedit"\n' in said
    assert "train.learning-rate = 0.02  # default 0.0\n" in said  # the rule's own
    assert "\ntrain.steps = 32\n" in said
    file = tmp_path / "run.toml"
    file.write_text(said)
    assert main(["config", str(file)]) == 0
    assert capsys.readouterr().out == said


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train.steps", r"train.steps = 32\n    Optimizer steps .*\n    Expected: 0 or more, whole.\n"),
        ("rule.florist", r"rule.florist.energy = 0.95\n(    .*\n)+"),
        ("mean", r"mean.name = \"weighted\"\n(.*\n)+    rank-vote +The median sizes, .* arXiv:2110.04350\n"),
        ("warm", r"warm = 0.0    \(of a node, in --node-config\)\n(    .*\n)+"),
        ("merge.trim", r"merge.trim is called mean.trimmed.share now.\nmean.trimmed.share = 0.1\n(    .*\n)+"),
    ],
)
def test_a_key_a_method_or_a_section_is_explained(name, expected, capsys):
    assert main(["config", "--explain", name]) == 0
    assert re.fullmatch(expected, capsys.readouterr().out)


def test_without_a_name_every_key_is_explained(capsys):
    assert main(["config", "--explain"]) == 0
    said = capsys.readouterr().out
    assert all(f"{key} = " in said for key in read_config({}).to_flower())


def test_an_unknown_key_is_not_explained(capsys):
    assert main(["config", "--explain", "train.stesp"]) == 2
    expected = "bouquet: there is no such key: got train.stesp. Did you mean 'train.steps'?\n"
    assert capsys.readouterr().err == expected
