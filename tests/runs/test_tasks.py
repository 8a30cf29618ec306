"""Every task that is no plain text in whole runs: it learns in NF4, resumed, in private, and what is left loads."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from common.error import BouquetError
from common.tasks import TASKS
from deploy.command import main
from strategies import Recipe, read_config
from strategies.gradients import GRADIENTS
from tests.support.architectures import save
from tests.support.grid import run_in_process
from tests.support.outcome import failures, lines
from tests.support.private_runs import PRIVATE

THINGS = ["self.name", "the list", "key", "value", "an index", "the file"]
SEVERAL = {"task.name": "multi-label", "task.classes": "set,got"}
NUMBER = {"task.name": "regress", "task.range": "1,5", "task.text-pair": "other"}


def records(task):
    """Two dozen records from which a small model learns something in a few steps."""
    for number in range(24):
        thing, odd = THINGS[number % len(THINGS)], number % 2
        asked = f"{thing} {number}?"
        yield {
            "multi-label": {
                "text": f"{'set ' * (number % 3 > 0)}{'got ' * odd}{thing} {number}",
                "label": [*["set"] * (number % 3 > 0), *["got"] * odd],
            },
            "regress": {"text": asked, "other": asked if odd else "class", "label": 5 if odd else 4},
            "dpo": {"instruction": asked, "chosen": f"return {thing}", "rejected": f"raise {number}"},
            "kto": {
                "instruction": asked,
                "output": f"return {thing}" if odd else f"raise {number}",
                "label": bool(odd),
            },
            "embed": {
                "anchor": f"{asked} self",
                "positive": f"return {thing}",
                "negative": f"return {THINGS[(number + 1 + odd) % len(THINGS)]}",
            },
        }[task]


RUNS = {
    "multi-label": SEVERAL | {"train.learning-rate": 0.02},
    "regress": NUMBER | {"train.learning-rate": 0.003},
    "dpo": {"task.name": "dpo", "train.learning-rate": 0.02},
    "kto": {"task.name": "kto", "train.learning-rate": 0.02},
    "embed": {"task.name": "embed", "train.learning-rate": 0.01, "train.batch-size": 8},
}
ENGINES = [name for name, gradient in GRADIENTS.items() if gradient.engine]
CELLS = [(task, engine) for task in RUNS if TASKS[task].apart for engine in ENGINES]


KEPT = [("dpo", "fast"), ("embed", "fast")]


@pytest.fixture
def of(settings, tmp_path):
    """The config of a run of a task, over its records."""

    def built(task, **changes):
        (tmp_path / f"{task}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records(task)))
        place = str(save("llama", tmp_path / "llama"))
        data = {"data.source": str(tmp_path / f"{task}.jsonl"), "data.partition": "iid", "data.holdout": 0.25}
        few = {"model.name": place, "train.steps": 6, "task.max-length": 48, "run-name": task}
        return settings(**data | few | RUNS[task] | changes)

    return built


def scored(folder):
    return [line for line in lines(folder) if line["phase"] == "heldout"]


@pytest.mark.parametrize(
    "task",
    ["regress", "dpo", "embed", *(pytest.param(task, marks=pytest.mark.exhaustive) for task in ("multi-label", "kto"))],
)
def test_a_task_is_learned_resumed_exported_and_loaded_by_peft(task, of, tmp_path, capsys):
    run_in_process(of(task, **{"num-server-rounds": 1}), nodes=2)
    run_in_process(of(task, resume=True), nodes=2)
    before, *_, after = scored(tmp_path / task)
    assert after["round"] == 2
    assert after["loss"] < 0.95 * before["loss"]
    better = after["score"] - before["score"]
    assert better > 0 if TASKS[task].rises else better < 0
    assert TASKS[task].further in after["further"]
    assert main(["export", str(tmp_path / task), "--to", str(tmp_path / "left")]) == 0
    kind, options = AutoModelForCausalLM, {}
    if (heads := TASKS[task].outputs(read_config(of(task)).task)) is None:
        kind = AutoModel
    elif heads:
        kind, options = AutoModelForSequenceClassification, {"num_labels": heads}
    base = kind.from_pretrained(tmp_path / "llama", **options)
    loaded = PeftModel.from_pretrained(base, tmp_path / "left")
    written = load_file(tmp_path / "left/adapter_model.safetensors")
    held = loaded.state_dict()
    assert any("lora_B" in name and tensor.any() for name, tensor in written.items())
    for name, tensor in written.items():
        (there,) = [held[key] for key in held if key.replace(".default", "").replace(".modules_to_save", "") == name]
        torch.testing.assert_close(there, tensor)


@pytest.mark.parametrize(
    ("task", "gradient"),
    [
        *KEPT,
        *(pytest.param(*cell, marks=pytest.mark.exhaustive) for cell in CELLS if cell not in KEPT),
    ],
)
def test_a_task_is_learned_in_private(task, gradient, of, tmp_path):
    # As little noise as there may be: what is tried here is that the parts go together.
    noise = {"privacy.noise-multiplier": 0.01, "privacy.score-noise": 0.01, "privacy.records": 12, "data.limit": 0}
    # A head starts at random, and who is in a step is drawn by no seed.
    steps = 20 if TASKS[task].sequence_classification else 4
    few = {"num-server-rounds": 1, "train.steps": steps, "model.quantization": "none"}
    changes = PRIVATE | noise | few | {"gradient.name": gradient, "train.learning-rate": 0.003, "task.negatives": "own"}
    run_in_process(of(task, **changes), nodes=2)
    assert failures(tmp_path / task) == []
    before, after = scored(tmp_path / task)
    better = after["score"] - before["score"]
    assert better > 0 if TASKS[task].rises else better < 0
    # No figure but the one that was noised.
    assert (before["metric"], before.get("further")) == (TASKS[task].metric, None)


def test_what_looks_at_its_companions_is_refused_by_name(of):
    said = "in the task 'kto' an example's loss depends on the rest .* expected text, .*embed, got kto. Choose"
    with pytest.raises(BouquetError, match=said):
        Recipe.build(read_config(of("kto", **PRIVATE)))
    whole = {"privacy.mode": "update-local", "train.weighting": "uniform"}
    assert Recipe.build(read_config(of("kto", **whole))).config.task.name == "kto"
