"""The configs: defaults, types, and every mistake at once in the user's own words."""

import re
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
from flwr.common.config import parse_config_args

from common.config.node import NodeConfig
from common.config.run import RunConfig
from common.config.section import ConfigError
from common.error import BouquetError
from strategies import RULES, Recipe, read_config
from strategies.registries import AXES, defaults
from tests.support import ROOT

PYPROJECT = ROOT / "pyproject.toml"


def flatten(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_pyprojects_defaults_are_the_models_defaults():
    written = dict(flatten(tomllib.loads(PYPROJECT.read_text())["tool"]["flwr"]["app"]["config"]))
    models = RunConfig.from_flower({}, AXES).to_flower()
    assert written == models
    assert {key: type(value) for key, value in written.items()} == {key: type(value) for key, value in models.items()}


def test_the_flat_form_makes_the_round_trip():
    config = RunConfig.from_flower({"lora.rank": 4, "train.learning-rate": 1, "wire.up": "bf16"}, AXES)
    assert (config.lora.rank, config.train.learning_rate, config.wire.up) == (4, 1.0, "bf16")
    assert RunConfig.from_flower(config.to_flower(), AXES) == config


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
    assert "task.name: expected one of text, instruct, chat, classify, got 'txt'. Did you mean 'text'?" in lines
    assert "lora.rank: expected greater than or equal to 1, got 0" in lines
    assert "lora.rnak: unknown key. Did you mean 'lora.rank'?" in lines
    assert "model.quantization: expected 'nf4', 'int8' or 'none', got 'nf5'" in lines
    assert "train.batch-size: expected a whole number, got '8'" in lines
    assert lines[-1] == "Correct them in pyproject.toml ([tool.flwr.app.config]) or in --run-config."


def test_hyperparameters_reach_their_rule_and_mistakes_are_told():
    config = read_config({"rule.name": "florist", "rule.florist.energy": 0.8})
    assert Recipe.build(config).rule == RULES["florist"](energy=0.8)
    assert set(config.methods) == set(defaults())
    with pytest.raises(ConfigError, match=r"rule.florist.enrgy: unknown key. Did you mean 'rule.florist.energy'\?"):
        read_config({"rule.florist.enrgy": 0.8})
    with pytest.raises(ConfigError, match=r"rule.florist.energy: expected a number, got 'all'"):
        read_config({"rule.florist.energy": "all"})
    with pytest.raises(
        BouquetError, match=r"out of range \(rule.florist.energy\): expected more than 0, at most 1, got 2.0"
    ):
        Recipe.build(read_config({"rule.name": "florist", "rule.florist.energy": 2}))


@pytest.mark.parametrize("rule", RULES)
def test_an_open_rate_is_the_rules_own_and_one_that_is_set_wins(rule):
    own = read_config({"rule.name": rule})
    assert own.train.learning_rate == RULES[rule].learning_rate > 0
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
