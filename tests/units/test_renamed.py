"""Keys of 0.1.0: each is read as the key of today, and a whole config of then gives the run that it gave."""

import json
from typing import Any

import pytest

from common.config.renamed import RENAMED, renamed
from deploy import settings
from strategies import Recipe, read_config
from strategies.inits import LoraSB
from strategies.means import MultiKrum, Trimmed
from strategies.objectives import FedProx
from strategies.optimizers import AdamW
from strategies.registries import defaults
from strategies.server_optimizers import FedAdam, FedAvgM, ToTheMean
from tests.support import ROOT

RELEASE = ROOT / "tests/runs/release_0_1_0/run/config.json"

# What each old key is set to, what stood beside it, and what stands in a config of today.
SAID: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "merge.mean": ("median", {}, {"mean.name": "median"}),
    "merge.trim": (0.3, {"merge.mean": "trimmed"}, {"mean.name": "trimmed", "mean.trimmed.share": 0.3}),
    "merge.hostile": (2, {"merge.mean": "krum"}, {"mean.name": "krum", "mean.krum.hostile": 2}),
    "merge.optimizer": ("momentum", {}, {"server-optimizer.name": "momentum"}),
    "merge.learning-rate": (
        0.5,
        {"merge.optimizer": "adam"},
        {"server-optimizer.name": "adam", "server-optimizer.adam.rate": 0.5, "server-optimizer.momentum.rate": 0.5},
    ),
    "merge.momentum": (0.8, {}, {"server-optimizer.momentum.momentum": 0.8, "server-optimizer.adam.momentum": 0.8}),
    "merge.second-momentum": (0.9, {}, {"server-optimizer.adam.beta": 0.9}),
    "merge.tau": (0.01, {}, {"server-optimizer.adam.tau": 0.01}),
    "train.weight-decay": (0.1, {}, {"optimizer.adamw.weight-decay": 0.1}),
    "train.proximal": (0.2, {}, {"objective.name": "fedprox", "objective.fedprox.mu": 0.2}),
    "privacy.engine": (
        "hooks",
        {"privacy.mode": "example", "train.weighting": "uniform"},
        {"privacy.mode": "example", "train.weighting": "uniform", "gradient.name": "hooks"},
    ),
    "rule.fed-sb.source": ("/p.jsonl", {}, {"init.lora-sb.source": "/p.jsonl"}),
    "rule.fed-sb.examples": (9, {}, {"init.lora-sb.examples": 9}),
    "rule.fed-sb.step": (0.01, {}, {"init.lora-sb.step": 0.01}),
}


def test_every_old_key_is_tried_here_and_every_new_one_exists():
    assert SAID.keys() == RENAMED.keys()
    assert {new for news in RENAMED.values() for new in news} <= defaults().keys()
    assert not RENAMED.keys() & defaults().keys()


@pytest.mark.parametrize("old", SAID)
def test_an_old_key_is_read_as_the_new_one(old):
    value, beside, today = SAID[old]
    assert renamed({old: value, **beside}) == today
    assert read_config({old: value, **beside}) == read_config(today)


@pytest.mark.parametrize("old", SAID)
def test_who_writes_an_old_key_hears_its_new_name(old, capsys):
    value, _, _ = SAID[old]
    settings.read([f"{old}={value}", "lora.rank=4"])
    said = capsys.readouterr().err
    assert said == f"{old} is called {' and '.join(RENAMED[old])} now. The old name is read for two minor versions.\n"


@pytest.mark.parametrize("old", SAID)
def test_a_new_key_stands_beside_an_old_one(old):
    value, beside, today = SAID[old]
    new = RENAMED[old][0]
    own = defaults()[new]
    assert renamed({old: value, **beside, new: own})[new] == own
    assert own != today[new]


@pytest.mark.parametrize(
    "off",
    [
        {"train.proximal": 0.0},
        {"merge.learning-rate": 0.0},
        {"privacy.engine": "fast"},
        {"merge.optimizer": "auto"},
        {"rule.fed-sb.start": "drawn"},
    ],
)
def test_what_was_off_is_off(off):
    assert read_config(off) == read_config({})


def test_the_starts_of_fed_sb():
    public = {"rule.name": "fed-sb", "rule.fed-sb.start": "public", "rule.fed-sb.source": "/p.jsonl"}
    recipe = Recipe.read(public)
    assert recipe.init == LoraSB(source="/p.jsonl")
    assert recipe.rule.start == "init"
    assert Recipe.read({"rule.name": "fed-sb", "rule.fed-sb.start": "nodes"}).rule.settled == 2
    # A comparison has it for the one rule of several that it is about.
    assert Recipe.read({**public, "rule.name": "fedit"}) == Recipe.read(
        {"rule.name": "fedit", "init.lora-sb.source": "/p.jsonl"}
    )


def test_a_config_as_0_1_0_left_it_gives_the_run_that_it_gave():
    flat = json.loads(RELEASE.read_text())["config"]
    old = [key for key in flat if key in RENAMED]
    assert len(old) >= 10
    recipe = Recipe.read(flat)
    assert recipe == Recipe.read(recipe.config.to_flower())
    assert recipe.optimizer == AdamW(weight_decay=flat["train.weight-decay"])
    assert (recipe.rule.name, recipe.rule.optimizer) == (flat["rule.name"], ToTheMean())
    today = recipe.config.to_flower()
    other = {"rule.fed-sb.start": "init", "train.learning-rate": recipe.rule.rate}
    assert {key: today[key] for key in flat if key not in RENAMED} == {
        key: other.get(key, value) for key, value in flat.items() if key not in RENAMED
    }


def test_an_old_profile_makes_the_members_that_it_named():
    old = {
        "merge.mean": "trimmed",
        "merge.trim": 0.2,
        "merge.hostile": 2,
        "merge.optimizer": "adam",
        "merge.learning-rate": 0.1,
        "merge.momentum": 0.8,
        "merge.second-momentum": 0.95,
        "merge.tau": 0.01,
        "train.proximal": 0.3,
        "train.weight-decay": 0.05,
    }
    recipe = Recipe.read(old)
    assert recipe.rule.mean == Trimmed(share=0.2)
    assert recipe.rule.optimizer == FedAdam(rate=0.1, momentum=0.8, beta=0.95, tau=0.01)
    assert recipe.objective == FedProx(mu=0.3)
    assert recipe.optimizer == AdamW(weight_decay=0.05)
    other = Recipe.read(old | {"merge.mean": "krum", "merge.optimizer": "momentum", "merge.learning-rate": 0.0})
    assert other.rule.mean == MultiKrum(hostile=2)
    assert other.rule.optimizer == FedAvgM(momentum=0.8)
