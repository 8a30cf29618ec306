"""A training script of the operator's own as a node: its trainer learns, and Bouquet exchanges its adapter."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from flwr.app import Context, RecordDict

import bouquet
from client_app import trainer as trainers
from client_app.scripted import ScriptSession, mistakes
from client_app.training import Turn
from common import wire
from common.config.node import NodeConfig
from common.config.section import ConfigError
from common.error import BouquetError, RefusalError
from common.models.adapted import LoraModel
from common.models.borrowed import borrow
from common.privacy import ledger
from deploy.doctor import job
from deploy.doctor.budget import budget
from strategies import Recipe, read_config
from strategies.gradients import Fast
from tests.support import ROOT
from tests.support.grid import OPEN, run_in_process
from tests.support.outcome import events, failures
from tests.support.private_runs import spent

# TRL about Transformers.
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")

PAGE = (ROOT / "docs/extending.md").read_text()
SCRIPT = re.search(r"<!-- script -->\n```python\n(.*?)```", PAGE, re.DOTALL).group(1)
RUN = {"model.quantization": "none", "train.learning-rate": 0.01}
PRIVATE = {"privacy.mode": "update-local", "train.weighting": "uniform", "evaluation.every": 0}


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """The script of the page, which the tests' process runs once."""
    file = tmp_path_factory.mktemp("script") / "notes.py"
    file.write_text(SCRIPT)
    return file


def broken(tmp_path, text: str) -> dict[str, str]:
    """The node config of a node with another script."""
    file = tmp_path / "broken.py"
    file.write_text(text)
    return {"script": str(file)}


def test_a_trl_script_and_an_ordinary_node_learn_together(settings, tmp_path, script):
    sent = []

    def look(content: RecordDict) -> RecordDict:
        _, update = wire.unpack_update(content["update"], rule="ffa-lora", round=len(sent))
        own = borrow(trainers.trainer_of(str(script)).model).tensors()
        assert {key.part for key in update.tensors} == {"B"}
        for key, tensor in update.tensors.items():
            torch.testing.assert_close(tensor, own[key], rtol=0, atol=0)
        sent.append(own)
        return content

    run = settings(**RUN, **{"rule.name": "ffa-lora"})
    run_in_process(run, nodes=2, node_config={1: {"script": str(script)}}, tamper={1: look})
    assert failures(tmp_path / "run") == []
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    for name in ("all", "node-000", "node-001"):
        assert summary["after"][name] < 0.8 * summary["before"][name]
    first, second = sent
    for key in first:  # what the rule freezes, the trainer leaves alone
        assert torch.equal(first[key], second[key]) == (key.part == "A")
    trained = [event for event in events(tmp_path, "train") if event["node"] == "node-001"]
    assert [(event["steps"], event["examples"]) for event in trained] == [(6, 32)] * 2
    assert all(event["tokens"] > 100 for event in trained)


def test_every_round_begins_anew_and_sees_the_examples_in_an_order_of_its_own(script):
    trainer = trainers.trainer_of(str(script))
    model = borrow(trainer.model)
    start, ends = model.tensors(), []
    heard = []
    for seed in ("0/ward-3/0", "0/ward-3/0", "0/ward-3/1"):
        model.install(start, model.spec.scale, {})
        trainers.train(trainer, model, Turn(0, model.keys, seed=seed, tell=lambda *told: heard.append(told)))
        ends.append(model.tensors())
    assert [(done, total) for done, total, _ in heard] == [(step, 6) for step in range(1, 7)] * 3
    assert heard[5][2] > heard[0][2] > 0
    once, again, other = ends
    assert all(torch.equal(once[key], again[key]) for key in once)
    assert any(not torch.equal(once[key], other[key]) for key in once)


def test_a_script_that_fails_in_a_private_run_is_noise_alone(settings, tmp_path, script, capsys):
    nodes = {0: {"script": str(script)}, 1: broken(tmp_path, "raise ValueError('record 7')")}
    # As on real machines, where the roll call runs nobody's script.
    run = settings(**RUN, **PRIVATE, **{"num-server-rounds": 1, "privacy.noise-multiplier": 0.5})
    grid = run_in_process(run, nodes=2, node_config=nodes)
    assert failures(tmp_path / "run") == []
    assert "record 7" in capsys.readouterr().err
    updates = [content["update"] for kind, content in grid.returned if kind == "train"]
    changes = [wire.unpack_update(update, rule="fedit", round=0)[1].tensors for update in updates]
    for change in changes:
        flat = torch.cat([tensor.flatten() for key, tensor in change.items() if key.part == "B"])
        assert 0.9 < flat.std() < 1.1  # 2 C z, where a node learns far less than C
    assert [row.mechanism for row in spent(tmp_path)] == ["update-local"] * 2


def test_a_private_run_that_does_not_fit_is_not_told_that_the_script_has_worked(settings, script, capsys):
    """Else a coordinator would learn by it, at no cost, that the records let the script come to its end."""
    node, flat = {"script": str(script), "policy": OPEN}, settings(**RUN, **PRIVATE, **{"lora.rank": 4})
    assert type(ScriptSession(Context(1, 1, node, RecordDict(), flat)).load()) is LoraModel
    assert "a rank other than the run's (lora.rank): expected 4, got 8" in capsys.readouterr().err


REFUSED = {
    "optimizer": ({"optimizer.name": "lora-pro"}, "optimizer.name: expected 'adamw' with its defaults, got LoraPro"),
    "decay": ({"optimizer.adamw.weight-decay": 0.1}, r"got AdamW\(weight_decay=0.1\)"),
    "objective": ({"objective.name": "fedprox"}, "objective.name: expected 'none' with its defaults, got FedProx"),
    "rule": (
        {"rule.name": "hetlora"},
        "rule.name: expected one that averages LoRA's factors and adds no term to the loss",
    ),
    "structure": ({"rule.name": "fed-sb"}, "rule.name: expected one that averages LoRA's factors"),
    "privacy": ({**PRIVATE, "privacy.mode": "example"}, "privacy.mode: expected none, update-local or update-central"),
    "head": ({"task.name": "classify"}, "task.name: expected a language model's, got 'classify', which has a head"),
    "vectors": ({"task.name": "embed"}, "a language model's, got 'embed', which needs the vectors of texts"),
    "rank": ({"lora.rank": 4}, r"a rank other than the run's \(lora.rank\): expected 4, got 8"),
    "scale": ({"lora.alpha": 8.0}, r"a scale other than the run's \(lora.alpha\): expected 1 \(alpha / rank\), got 2"),
    "layers": ({"lora.targets": "q_proj"}, r"expected 6 layers, got also \S+, \S+, \S+ and 33 more"),
    "base": (
        {"model.quantization": "nf4"},
        r"quantised differently from the run's \(model.quantization\): expected nf4",
    ),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=list(REFUSED))
def test_a_run_that_the_trainer_cannot_take_part_in_is_refused_by_name(changes, message, settings, script):
    flat = settings(**RUN | changes)
    context = Context(1, 1, {"script": str(script), "policy": OPEN}, RecordDict(), flat)
    with pytest.raises(RefusalError, match=message):
        ScriptSession(context).load()


def test_another_gradient_than_the_trainers_is_refused_by_name():
    (mistake,) = mistakes(replace(Recipe.read(read_config(RUN).to_flower()), gradient=Fast()))
    assert mistake == "gradient.name: expected 'backward' with its defaults, got Fast()"


def test_a_script_is_refused_that_hands_nothing_over(tmp_path):
    for text, message in {
        "import json": "does not hand over a trainer .*Let it call bouquet.patch.trainer. where it would call "
        "trainer.train",
        "import sys; sys.exit(3)": r"a node's script exits early \(\S+broken.py\): got exit 3",
        "import sys; assert len(sys.argv) == 1 and __name__ == '__main__'; exit()": "exits early",
    }.items():
        file = broken(tmp_path, text)["script"]
        with pytest.raises(BouquetError, match=message):
            trainers.trainer_of(file)


def test_a_script_that_is_not_there_is_named(settings, tmp_path):
    missing = {"script": str(tmp_path / "none.py"), "policy": OPEN}
    with pytest.raises(RefusalError, match=r"cannot be read \(script, of the node's config\): got \S+none.py: No such"):
        ScriptSession(Context(1, 1, missing, RecordDict(), settings(**RUN))).examples()
    with pytest.raises(ConfigError, match=r"data: expected none with a script, which has its own, got '/notes.jsonl'"):
        NodeConfig.from_flower({"script": "/notes.py", "data": "/notes.jsonl"})
    for several in ("cuda:0,cuda:1", "cuda:0+cuda:1"):
        with pytest.raises(ConfigError, match=r"device: expected one with a script, .* got 'cuda:0.cuda:1'"):
            NodeConfig.from_flower({"script": "/notes.py", "device": several})


def test_a_release_of_a_script_is_not_charged_to_a_data_set_that_the_coordinator_names(settings, tmp_path, script):
    file = tmp_path / "policy.toml"  # which lets in no source of the run's
    file.write_text('models = ["*"]\n[budget]\nfields = ["text"]\n')
    node = {"script": str(script), "policy": str(file), "state-directory": str(tmp_path / "own")}
    spending = ScriptSession(Context(1, 1, node, RecordDict(), settings(**RUN, **PRIVATE))).spending
    spending.charge(spending.plan(), 1)
    (row,) = ledger.read(spending.node.ledger, spending.node.witness)
    assert row.dataset == ""
    assert re.match("epsilon .* after the run", budget(spending.config, spending.node))


def test_doctor_says_whether_a_script_works_and_fits(tmp_path, script):
    node = NodeConfig(script=str(script))
    assert job.data(read_config(RUN), node) == f"{script}: a SFTTrainer that fits the run, with 32 examples"
    with pytest.raises(RefusalError, match="a rank other than the run's"):
        job.data(read_config({**RUN, "lora.rank": 4}), node)
    with pytest.raises(BouquetError, match=r"the node's script fails \(\S+broken.py\): got ValueError: no"):
        job.data(read_config(RUN), NodeConfig(**broken(tmp_path, "raise ValueError('no')")))


def trainer(**changes: object) -> SimpleNamespace:
    args = SimpleNamespace(include_num_input_tokens_seen="no")
    whole = {"optimizer": None, "model_init": None, "train_dataset": [1], "eval_dataset": None, "args": args}
    return SimpleNamespace(**whole | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": object()}, "cannot start afresh in every round .*expected none of them, got an optimizer"),
        ({"model_init": object()}, "got model_init"),
        ({"train_dataset": iter([1])}, r"cannot be counted \(train_dataset\): expected one with a length"),
        ({"eval_dataset": {"a": [1]}}, r"cannot be counted \(eval_dataset\): .*got dict"),
        ({"train_dataset": None}, r"a trainer without examples \(train_dataset\)"),
        ({"train_dataset": []}, "a trainer without examples"),
    ],
)
def test_a_trainer_that_cannot_be_used_again_and_again_is_refused(changes, message):
    with pytest.raises(BouquetError, match=message):
        bouquet.patch(trainer(**changes))


def test_a_trainer_without_held_out_examples_is_not_scored():
    with pytest.raises(RefusalError, match=r"without held-out examples \(eval_dataset\)"):
        trainers.score(trainer())
