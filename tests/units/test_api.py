"""What ``import bouquet`` promises: the names of docs/api.md, and a strategy for every rule that names its mistakes."""

import re
from pathlib import Path

import pytest

import bouquet
from deploy.command import main
from strategies import RULES
from strategies.server_optimizers import FedAdam

PAGE = (Path(__file__).parents[2] / "docs/api.md").read_text()


def test_every_name_of_the_page_is_there_and_every_name_is_on_the_page():
    named = set(re.findall(r"`(\w+)(?:\(\w*\))?`", PAGE.partition("\nA strategy works")[0]))
    assert set(bouquet.NAMES) <= named
    for name in bouquet.NAMES:
        assert getattr(bouquet, name) is not None


@pytest.mark.parametrize("kind", RULES.values(), ids=list(RULES))
def test_every_rule_has_a_strategy_of_its_name(kind):
    strategy = getattr(bouquet, f"{kind.__name__}Strategy")
    assert kind.paper in strategy.__doc__
    assert strategy().rule == kind()


def test_a_strategys_options_are_the_rules_fields_and_flowers():
    strategy = bouquet.FedITStrategy(optimizer=FedAdam(rate=0.1), fraction_train=0.5, seed=3, codec_up="nf4")
    assert strategy.rule.optimizer.rate == 0.1
    assert (strategy.seed, strategy.codec_up) == (3, "nf4")
    with pytest.raises(TypeError, match="FFALoraStrategy has no option energy"):
        bouquet.FFALoraStrategy(energy=0.5)
    with pytest.raises(AttributeError, match="'strategies' has no attribute 'FedNoneStrategy'"):
        _ = bouquet.FedNoneStrategy
    with pytest.raises(AttributeError, match="module 'bouquet' has no attribute 'nothing'"):
        _ = bouquet.nothing


def test_the_version_is_told_by_the_module_and_by_the_command(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"bouquet {bouquet.__version__}\n"
