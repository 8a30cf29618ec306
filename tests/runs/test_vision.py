"""Whole runs of a model that sees images: what it learns is to be seen, and not to be read."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from client_app import children
from common.config.node import NodeConfig
from common.error import BouquetError
from common.models import base
from common.sources import dealing
from deploy.audit.command import Wanted, audit
from deploy.command import main
from deploy.doctor import job
from strategies import read_config
from tests.support.configs import small
from tests.support.grid import run_in_process
from tests.support.outcome import events, failures
from tests.support.private_runs import PRIVATE
from tests.support.vision import COLOURS, PARTS, QUESTION, paint, record, save_llava, save_records

CHOICES = {"task.name": "vision", "data.partition": "iid", "data.holdout": 0.25, "data.limit": 0, "task.max-length": 0}
LEARNING = {"train.steps": 30, "train.learning-rate": 0.01}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model whose template takes parts of what is said, and images of two colours."""
    folder = tmp_path_factory.mktemp("vision")
    save_records(folder / "data", 32)
    save_llava(folder / "llava", PARTS)
    return folder


def config(place: Path, **changes):
    source = str(place / "data/seen.jsonl")
    return small(place, **{"model.name": str(place / "llava"), "data.source": source} | CHOICES | LEARNING | changes)


@pytest.fixture(scope="module")
def learned(place):
    """A run in NF4 over two nodes, scored centrally too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.config.node.STATE_DIRECTORY", place / "state")
        patch.setattr("server_app.nodes.STEADY_SECONDS", 0.0)
        run_in_process(config(place, **{"evaluation.source": str(place / "data/seen.jsonl")}), nodes=2)
    assert failures(place / "run") == []
    return place / "run"


@pytest.mark.slow
def test_the_colour_of_an_image_is_learned_which_no_text_tells(learned, place):
    """All questions are one, and half of the answers the one, half the other: of words alone half are right at most."""
    for phase in ("heldout", "central"):
        before, *_, after = events(place, phase)
        assert before["further"]["exact-match"] <= 0.5
        assert after["further"]["exact-match"] == 1.0
        assert after["loss"] < before["loss"] - math.log(2)


@pytest.mark.slow
def test_plain_peft_scores_what_the_run_has_scored(learned, place):
    """By Transformers' processor and loss, over the base in NF4."""
    quantised = base.quantization("nf4", torch.float32, [])
    network = AutoModelForImageTextToText.from_pretrained(place / "llava", quantization_config=quantised)
    network = PeftModel.from_pretrained(network, str(learned / "adapter")).eval()
    base.keep_trainable(network)  # or a CPU would repack the weights, with loss
    processor = AutoProcessor.from_pretrained(place / "llava")
    losses, tokens, right = 0.0, 0, 0
    found = [placed.found for placed in dealing.read(str(place / "data/seen.jsonl"))]
    for each in found:
        text = [f"<s><|user|><image>\n{QUESTION}</s><|assistant|>", f"{each['output']}</s>"]
        image = Image.open(place / "data" / each["image"])
        whole = processor(text="".join(text), images=[image], add_special_tokens=False, return_tensors="pt")
        answer = len(processor.tokenizer(text[1], add_special_tokens=False)["input_ids"])
        labels = whole["input_ids"].clone()
        labels[:, :-answer] = -100
        with torch.no_grad():
            said = network(**whole, labels=labels)
        losses, tokens = losses + float(said.loss) * answer, tokens + answer
        right += bool((said.logits[0, -answer - 1 : -1].argmax(-1) == labels[0, -answer:]).all())
    told = events(place, "central")[-1]
    assert losses / tokens == pytest.approx(told["loss"], rel=1e-4)
    assert right / len(found) == told["further"]["exact-match"]


@pytest.mark.slow
def test_it_says_what_it_sees(learned, place, capsys):
    paint(place / "new.png", COLOURS["blue"], (90, 20))
    for colour in COLOURS:
        paint(place / "new.png", COLOURS[colour], (90, 20))
        asked = ["--image", str(place / "new.png"), "--prompt", QUESTION, "--device", "cpu"]
        assert main(["chat", str(learned), *asked]) == 0
        assert capsys.readouterr().out.split() == [colour]
    assert main(["chat", str(learned), "--image", str(place / "gone.png"), "--prompt", QUESTION]) != 0
    assert "an image cannot be read" in capsys.readouterr().err


@pytest.mark.slow
def test_it_is_exported_with_a_card_and_loaded_again(learned, place, capsys):
    assert main(["export", str(learned), "--to", str(place / "left"), "--device", "cpu"]) == 0
    assert "a model that takes images: its README.md has the code that loads it" in capsys.readouterr().out
    card = (place / "left/README.md").read_text()
    assert "| task | vision |" in card
    names: dict = {}
    lines = card.split("```python\n")[1].split("```")[0].replace('"left"', f'"{place / "left"}"')
    exec(lines, names)
    assert isinstance(names["model"], PeftModel)
    assert names["processor"].image_token == "<image>"
    options = ["--form", "merged", "--dtype", "fp16", "--device", "cpu"]
    assert main(["export", str(learned), "--to", str(place / "whole"), *options]) == 0
    names = {}
    lines = (place / "whole/README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(lines.replace('"whole"', f'"{place / "whole"}"'), names)
    assert type(names["model"]).__name__ == "LlavaForConditionalGeneration"
    assert main(["serve", str(place / "left")]) != 0
    assert "an adapter that takes images is not served here" in capsys.readouterr().err


def test_a_check_shows_an_image_once(place, capsys):
    keys = {"data.source": str(place / "data/seen.jsonl"), "model.name": str(place / "llava")} | CHOICES
    assert main(["check", "--nodes", "2", *(f"{key}={value}" for key, value in keys.items())]) == 0
    shown = capsys.readouterr().out
    assert "16 records, 16 examples of at most" in shown
    assert f"<s><|user|><image> (16 times)\n    {QUESTION}</s><|assistant|>«" in shown


def test_a_doctor_looks_at_what_the_node_is_asked_for(place):
    run, node = read_config(config(place)), NodeConfig(data=str(place / "data/seen.jsonl"))
    assert "32 records, 32 examples; this node trains on 32 records" in job.data(run, node)
    assert "GB free on cpu" in job.memory(run, NodeConfig(data=node.data, device="cpu"))


@pytest.mark.parametrize("gradient", ["fast", pytest.param("hooks", marks=pytest.mark.exhaustive)])
@pytest.mark.slow
def test_it_is_learned_in_private(gradient, place, tmp_path):
    # As little noise as there may be: what is tried here is that the parts go together.
    noise = {"privacy.noise-multiplier": 0.01, "privacy.score-noise": 0.01, "privacy.records": 16}
    few = {"num-server-rounds": 1, "train.steps": 6, "run-directory": str(tmp_path), "task.max-length": 64}
    changes = PRIVATE | noise | few | {"gradient.name": gradient, "train.learning-rate": 0.003}
    run_in_process(config(place, **changes), nodes=2)
    assert failures(tmp_path / "run") == []
    before, after = events(tmp_path, "heldout")
    assert after["score"] < before["score"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "private", [pytest.param(False, id="plain", marks=pytest.mark.exhaustive), pytest.param(True, id="private")]
)
def test_two_processes_see_what_one_does(private, place, tmp_path, capfd):
    few = {"num-server-rounds": 1, "train.steps": 3, "run-directory": str(tmp_path), "task.max-length": 64}
    few |= {"min-nodes": 1} | (PRIVATE | {"privacy.noise-multiplier": 1.0, "privacy.records": 32} if private else {})
    with children.on(["cpu", "cpu"]):
        for name, device in (("one", "cpu"), ("two", "cpu,cpu")):
            run_in_process(config(place, **few | {"run-name": name}), nodes=1, node_config={0: {"device": device}})
            assert failures(tmp_path / name) == []
    assert "Traceback" not in capfd.readouterr().err, "a private round that fails with its records leaves without them"
    if not private:
        (one,), (two,) = (events(tmp_path, "train", name) for name in ("one", "two"))
        assert (one["tokens"], one["steps"]) == (two["tokens"], two["steps"])
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)


def test_an_audit_is_refused(place):
    private = read_config(config(place, **PRIVATE))
    wanted = Wanted(method="paired", canaries=1, runs=4, confidence=0.9, nodes=1, policy="")
    with pytest.raises(BouquetError, match=r"an audit makes up its records, and none of them has an image .task.name"):
        next(iter(audit(private, wanted, print)))


@pytest.mark.parametrize("hostile", ["../llava/config.json", "/etc/passwd", "images", "data:image/png;base64,AAAA"])
def test_a_record_that_is_no_image_stops_a_plain_run_and_is_absent_in_a_private_one(hostile, place, tmp_path):
    data = tmp_path / "data"
    save_records(data, 8)
    with (data / "seen.jsonl").open("a") as opened:
        opened.write(json.dumps(record(hostile, "red")) + "\n")
    changes = {"data.source": str(data / "seen.jsonl"), "run-directory": str(tmp_path), "num-server-rounds": 1}
    changes |= {"train.steps": 1, "task.max-length": 64, "data.partition": "none"}
    with pytest.raises(BouquetError):
        run_in_process(config(place, **changes), nodes=2)
    said = "an image outside the data's folder|a field does not hold an image|an image cannot be read"
    (reason, *_) = failures(tmp_path / "run")
    assert len([each for each in said.split("|") if each in reason]) == 1
    assert "seen.jsonl:9" in reason
    private = PRIVATE | {"privacy.records": 8, "privacy.noise-multiplier": 1.0, "run-name": "private"}
    run_in_process(config(place, **private | changes | {"evaluation.every": 0}), nodes=2)
    assert failures(tmp_path / "private") == []
