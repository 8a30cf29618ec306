"""The node's own policy: every mistake in it is told, and what it does not allow is refused before training."""

import json
import re
from contextlib import nullcontext
from pathlib import Path

import pytest

from client_app import simulation
from client_app.policy import Policy
from common.config.node import NodeConfig
from common.config.section import ConfigError
from common.error import BouquetError, RefusalError
from common.tasks import TASKS
from strategies import Recipe, read_config
from tests.support.budgets import policy
from tests.support.grid import NAMED, run_in_process
from tests.support.outcome import events
from tests.support.private_runs import PRIVATE, spent


def test_every_mistake_in_a_policy_is_told_at_once(tmp_path):
    file = policy(tmp_path, 'rules = ["fedex"]\nmax-byte = 5\nmin-examples = "many"\n[privacy]\nmodes = ["exmple"]\n')
    with pytest.raises(ConfigError) as caught:
        Policy.of(NodeConfig(policy=file))
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert lines[0] == f"4 mistakes in the policy {file}:"
    assert re.match(r"rules: expected one of fedit, .*, got 'fedex'. Did you mean 'fedex-lora'\?", lines[1])
    assert "max-byte: unknown key. Did you mean 'max-bytes'?" in lines
    assert "min-examples: expected a whole number, got 'many'" in lines
    assert any(line.startswith("privacy.modes.0: expected 'none', 'example', ") for line in lines)


def test_one_name_in_the_place_of_a_list_is_told_how_a_list_is_written(tmp_path):
    with pytest.raises(ConfigError, match=r"""rules: expected a list, such as \["ffa-lora"\], got 'ffa-lora'"""):
        Policy.of(NodeConfig(policy=policy(tmp_path, 'rules = "ffa-lora"\n')))


def test_only_a_process_that_was_declared_so_is_a_simulations(monkeypatch):
    """Without a file, a node of a deployment keeps what one of a simulation may tell."""
    kept = Policy.of(NodeConfig()).tell
    assert not kept.text
    assert not kept.details
    assert not simulation.simulated()
    monkeypatch.setattr(simulation, "_declared", simulation._declared)  # undone after the test
    simulation.declare()
    told = Policy.of(NodeConfig())
    assert told.tell.text
    assert told.tell.details
    assert told.data.sources == told.models == ("*",)


def test_a_run_that_takes_more_of_the_machine_than_it_may_is_refused(tmp_path):
    heavy = {"lora.rank": 4096, "train.steps": 10**12, "train.accumulation": 2, "train.batch-size": 5000}
    heavy |= {"train.epochs": 2000, "evaluation.batch-size": 5000, "task.max-length": 10**6, "task.labels": 10**9}
    config = read_config(heavy)
    with pytest.raises(RefusalError) as caught:
        Policy().check_run(Recipe.build(config), NodeConfig())
    assert str(caught.value).splitlines()[1:] == [
        "  lora.rank: expected at most 1,024 (cost.rank), got 4,096",
        "  train.steps * train.accumulation: expected at most 100,000 (cost.steps), got 2,000,000,000,000",
        "  train.epochs: expected at most 1,000 (cost.epochs), got 2,000",
        "  train.batch-size: expected at most 4,096 (cost.batch-size), got 5,000",
        "  evaluation.batch-size: expected at most 4,096 (cost.batch-size), got 5,000",
        "  task.max-length: expected at most 131,072 (cost.max-length), got 1,000,000",
        "  task.labels: expected at most 100,000 (cost.labels), got 1,000,000,000",
    ]
    own = "[cost]\nrank = 0\nsteps = 0\nepochs = 0\nbatch-size = 0\nmax-length = 0\nlabels = 0\n"
    node = NodeConfig(policy=policy(tmp_path, own))
    Policy.of(node).check_run(Recipe.build(config), node)


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ('max-bytes = "20 MB"', "max-bytes: expected a whole number, got '20 MB'"),
        ("max-bytes = 20.5", "max-bytes: expected a whole number, got 20.5"),
        ("max_bytes = 20", "max_bytes: unknown key. Did you mean 'max-bytes'?"),
        ('privacy = "example"', "privacy: expected a table, got 'example'"),
        ("[privacy]\nunit = 3", "privacy.unit: expected text, got 3"),
        ('[privacy]\nmode = ["example"]', "privacy.mode: unknown key. Did you mean 'privacy.modes'?"),
        ('[tell]\ntext = "no"', "tell.text: expected true or false, got 'no'"),
        ("[task]\nlables = 12", "task.lables: unknown key. Did you mean 'labels'?"),
        ('[task]\nlabels = "12"', "task.labels: expected a whole number, got '12'"),
        ('[task]\nlabels = [2, "12"]', "task.labels: expected a whole number, got '12'"),
        (
            '[task]\nname = "clasify"',
            f"task.name: expected one of {', '.join(TASKS)}, got 'clasify'. Did you mean 'classify'?",
        ),
        (
            'models = ["./llama"]',
            "models: expected an absolute path, a name or a hub id, got './llama'",
        ),
        (
            '[data]\nsources = ["../public"]',
            "data.sources: expected an absolute path, a name or a hub id, got '../public'",
        ),
    ],
)
def test_a_mistake_in_a_policy_is_told_with_file_key_and_cure(text, mistake, tmp_path):
    file = policy(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        Policy.of(NodeConfig(policy=file))
    assert str(caught.value) == f"1 mistake in the policy {file}:\n  {mistake}\nCorrect them in the file."


@pytest.mark.parametrize(
    ("text", "got"), [(None, "No such file or directory"), ("rules = [", r"Invalid value \(at end of document\)")]
)
def test_a_policy_that_cannot_be_read_allows_nothing(text, got, tmp_path):
    file = policy(tmp_path, text) if text else str(tmp_path / "no.toml")
    match = rf"the node's policy cannot be read \({file}\): expected a TOML file, got {got}\. Correct it, or name"
    with pytest.raises(RefusalError, match=match):
        Policy.of(NodeConfig(policy=file))


def test_a_coordinator_that_asks_for_more_is_told_all_it_may_not_have(settings, tmp_path):
    text = 'rules = ["ffa-lora", "fedsvd"]\nmodels = ["/models/small"]\nparts = ["B"]\ncodecs = ["bf16"]\n'
    privacy = '[privacy]\nmodes = ["example"]\nmin-noise-multiplier = 0.5\n'
    file = policy(tmp_path, text + '[task]\nname = "classify"\n' + privacy)
    wanted = {"num-server-rounds": 1, "min-nodes": 1, "data.source": "/etc/passwd"}
    with pytest.raises(BouquetError, match="no node can take part"):
        run_in_process(settings(**wanted), nodes=1, node_config={0: {"policy": file}})
    (failure,) = events(tmp_path, "failure")
    assert failure["during"] == "roll call"
    assert failure["reason"].splitlines() == [
        "this node's policy does not allow it:",
        "  rule.name: expected ffa-lora or fedsvd, got 'fedit'",
        "  model.name: expected /models/small, got 'embedded'",
        "  what the rule 'fedit' sends: expected B, got 'A'",
        "  wire.up: expected bf16, got 'fp32'",
        "  privacy.mode: expected example, got 'none'",
        "  task.name: expected 'classify', got 'text'",
        "  task.max-length: expected 0, got 32",
        "  data.source: expected stdlib (data.sources), got '/etc/passwd'",
        "  privacy.mode: expected a private run (min-noise-multiplier), got 'none'",
    ]


@pytest.mark.slow
def test_too_few_examples_or_too_little_noise_is_refused_uncharged(settings, tmp_path):
    few = policy(tmp_path, 'min-examples = 401\n[data]\nsources = ["*"]\n')
    noisy = tmp_path / "noisy.toml"
    noisy.write_text('[data]\nsources = ["*"]\n[privacy]\nmin-noise-multiplier = 50.0\n')
    nodes = {1: {"policy": few}, 2: {"policy": str(noisy)}}
    run_in_process(settings(**{**PRIVATE, "num-server-rounds": 1}), nodes=3, node_config=nodes)
    reasons = [failure["reason"] for failure in events(tmp_path, "failure")]
    assert reasons == [
        "this node's policy does not allow it:\n  examples: expected 401 or more (min-examples), got fewer",
        "this node's policy does not allow it:\n"
        "  the noise multiplier: expected 50 or more (min-noise-multiplier), got less",
    ]
    assert [row.node for row in spent(tmp_path, "node-000")] == ["node-000"]
    assert not (tmp_path / "state/node-001").exists()


@pytest.mark.parametrize(
    ("text", "budget", "unit", "allowed"),
    [
        ("", 0.0, "kind", True),
        ("", 8.0, "record", True),
        ("", 8.0, "kind", False),
        ('unit = "patient"\n', 8.0, "patient", True),
        ('unit = "patient"\n', 8.0, "record", False),
        ('unit = "patient"\n', 0.0, "record", False),
    ],
)
def test_what_a_unit_is_is_the_operators_to_say_where_there_is_a_budget(text, budget, unit, allowed, tmp_path):
    file = policy(tmp_path, Path(NAMED).read_text() + text)
    node = NodeConfig.from_flower({"policy": file, "privacy-epsilon": budget, "state-directory": str(tmp_path)})
    config = read_config({**PRIVATE, "privacy.unit": unit, "task.max-length": 32})
    with nullcontext() if allowed else pytest.raises(RefusalError, match=r"privacy\.unit: expected"):
        Policy.of(node).check_run(Recipe.build(config), node)


def test_another_revision_than_the_main_one_has_to_be_named(tmp_path):
    node = NodeConfig(policy=policy(tmp_path, 'models = ["good/model", "good/other@v2"]\n'))
    for name, revision, allowed in (("good/model", "refs/pr/6", False), ("good/other", "v2", True)):
        config = read_config({"model.name": name, "model.revision": revision})
        with nullcontext() if allowed else pytest.raises(RefusalError, match="got 'good/model@refs/pr/6'"):
            Policy.of(node).check_run(Recipe.build(config), node)


def test_a_limit_for_one_run_needs_one_for_all_of_them(tmp_path):
    file = policy(tmp_path, "[privacy]\nmax-epsilon = 8.0\n")
    with pytest.raises(RefusalError, match=r"a limit for one run but none .*max-epsilon\): expected privacy-epsilon"):
        Policy.of(NodeConfig(policy=file))


@pytest.mark.parametrize(
    ("allowed", "source", "covered"),
    [
        (["stdlib"], "stdlib", True),
        (["stdlib"], "/data/public/a.jsonl", False),
        (["/data/public"], "/data/public/a.jsonl", True),
        (["/data/public"], "/data/public/../private/a.jsonl", False),
        (["/data/public"], "/data/publicity.jsonl", False),
        (["/data/public"], "owner/data", False),
    ],
)
def test_a_node_without_data_reads_what_its_policy_lists(allowed, source, covered, tmp_path):
    file = policy(tmp_path, f"[data]\nsources = {json.dumps(allowed)}\n")
    config = read_config({"data.source": source})
    node = NodeConfig(policy=file)
    with nullcontext() if covered else pytest.raises(RefusalError, match=r"data\.source: expected"):
        Policy.of(node).check_run(Recipe.build(config), node)
    # What the coordinator names is not read where the node has its own.
    own = NodeConfig(policy=file, data="/data/own.jsonl")
    Policy.of(own).check_run(Recipe.build(config), own)


@pytest.mark.parametrize("model", ["/models/small", "./small", "~/small"])
def test_a_local_model_is_loaded_where_the_policy_lists_it(model, tmp_path):
    config = read_config({"model.name": model})
    with pytest.raises(RefusalError, match=r"model\.name: expected embedded or a hub id, got"):
        Policy().check_run(Recipe.build(config), NodeConfig())
    if not model.startswith("."):
        listed = NodeConfig(policy=policy(tmp_path, f'models = ["{model}"]\n'))
        Policy.of(listed).check_run(Recipe.build(config), listed)
