"""Kinds 3 and 4 at the mechanism: whatever one record is, it moves the sum that is noised by the clip at most."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from common.models import embedded
from tests.attacks.hostile import CLASSIFY, INSTRUCT, LOCAL, TEXT, failure, neighbours, start, task, turned
from tests.attacks.records import OF_A_CLASS, OF_A_TEXT, OF_AN_ANSWER
from tests.attacks.taps import sums
from tests.attacks.tools import saved

USUAL = [{"text": f"{n} + {n}", "label": n % 2, "answer": f"{2 * n}", "person": n} for n in range(7)]
# Every record is in the batch, and longer than the clip.
RUN = {"privacy.clip": 1e-4, "privacy.noise-multiplier": 1.0, "task.max-length": 32}
HARD = {
    "a list": ["x", "=", "1"],
    "a list of lists": [["x", "="], ["1"]],
    "a list of pairs": [["x", "1"], ["y", "2"]],
    "an empty list": [],
    "a list of nothing": [""],
    "a list of null": [None],
    "an object": {"input_ids": [1, 2, 3]},
}


def moved(folder, record, run, settings=TEXT, model="", usual=USUAL):
    """How far one record moves the sums of a round, over the clip."""
    tables = {"models": [model]} if model else {}
    run = RUN | ({"model.name": model} if model else {}) | run
    state = turned(start(run), lambda key, tensor: tensor + 0.05)
    totals = []
    for node in neighbours(folder, usual, [*usual[:3], record, *usual[3:]], task=settings, tables=tables):
        with sums() as found:
            assert failure(node.ask("train", run, state=state)) == ""
        totals.append(found)
    assert len(totals[0]) == len(totals[1]) > 0
    pairs = list(zip(*totals, strict=True))
    assert any(float(less.norm()) > 1.5 * mechanism.sensitivity for (mechanism, less), _ in pairs)
    return max(float((more - less).norm()) / mechanism.sensitivity for (mechanism, less), (_, more) in pairs)


@pytest.mark.parametrize("record", OF_A_TEXT)
def test_a_text_of_whatever_form_moves_the_sum_by_the_clip_at_most(record, tmp_path):
    assert moved(tmp_path, OF_A_TEXT[record], {}) <= 1 + 1e-5


@pytest.mark.parametrize("value", HARD)
@pytest.mark.parametrize("settings", [TEXT, CLASSIFY, INSTRUCT], ids=lambda settings: settings["name"])
@pytest.mark.parametrize("field", ["text", "answer"])
def test_so_does_a_field_that_is_no_text(field, settings, value, tmp_path):
    odd = {"text": "1 + 1", "label": 1, "answer": "2"} | {field: HARD[value]}
    assert moved(tmp_path, odd, task(settings) | {"task.max-length": 32}, settings) <= 1 + 1e-5


@pytest.mark.parametrize("label", OF_A_CLASS)
def test_so_does_a_label(label, tmp_path):
    odd = {"text": "1 + 1", "label": OF_A_CLASS[label]}
    assert moved(tmp_path, odd, task(CLASSIFY), CLASSIFY) <= 1 + 1e-5


@pytest.mark.parametrize("record", OF_AN_ANSWER)
def test_so_does_an_answer(record, tmp_path):
    assert moved(tmp_path, OF_AN_ANSWER[record], task(INSTRUCT), INSTRUCT) <= 1 + 1e-5


@pytest.mark.parametrize("size", [1, 3, 16])
def test_so_does_a_long_text_among_short_ones(size, tmp_path):
    assert moved(tmp_path, {"text": "x = 1\n" * 500}, {"train.batch-size": size}) <= 1 + 1e-5


def small(vocabulary):
    """A model that knows fewer tokens than its tokenizer has, as happens where a token was added."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
    )


@pytest.mark.parametrize("mode", ["example", "update-local"])
def test_a_word_that_the_model_does_not_know_does_not_silence_the_others(mode, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(embedded.unpack())
    known = max(max(tokenizer(record["text"])["input_ids"]) for record in USUAL) + 1
    model = saved("small", small(known), AutoModelForCausalLM)
    if mode == "example":
        assert moved(tmp_path, {"text": "import asyncio"}, {}, model=model) <= 1 + 1e-5
    else:  # the whole change is what the noise is for, but not whether there is one
        less, more = neighbours(tmp_path, USUAL, [*USUAL, {"text": "import asyncio"}], tables={"models": [model]})
        said = [failure(node.ask("train", RUN | LOCAL | {"model.name": model})) for node in (less, more)]
        assert said == ["", ""]


@pytest.mark.parametrize("steps", [2, 3])
def test_nor_does_one_record_silence_them_in_a_later_step(steps, tmp_path):
    """What breaks the last step must not undo the first."""
    for number, record in enumerate(({"text": ["x = 1", "y = 2"]}, {"text": "x = 1\n" * 500}, {"text": None})):
        run = {"train.steps": steps, "privacy.noise-multiplier": 0.01, "train.learning-rate": 1e-9}
        less, more = neighbours(tmp_path / str(number), USUAL, [*USUAL, record], privacy_epsilon=None, policy=None)
        lengths = []
        for node in (less, more):
            with sums() as found:
                node.ask("train", RUN | run | {"task.max-length": 32})
            lengths.append([float(total.norm()) / mechanism.sensitivity for mechanism, total in found])
        assert all(abs(a - b) <= 1 + 1e-3 for a, b in zip(*lengths, strict=True))


@pytest.mark.parametrize("cap", [1, 2, 8])
def test_a_person_moves_the_sum_by_the_clip_at_most(cap, tmp_path):
    """Where a person is what is protected: however many records one has, and whatever they are."""
    run = RUN | {"privacy.unit": "person", "privacy.unit-cap": cap}
    state = turned(start(run), lambda key, tensor: tensor + 0.05)
    own = [{"text": f"{n} * {n}", "person": 99} for n in range(10)] + [{"text": ["x"], "person": 99}]
    totals = []
    for node in neighbours(tmp_path, USUAL, [*USUAL, *own], tables={"privacy": {"unit": "person"}}):
        with sums() as found:
            assert failure(node.ask("train", run, state=state)) == ""
        totals.append(found[0])
    (mechanism, less), (_, more) = totals
    assert float(torch.linalg.vector_norm(more - less)) <= mechanism.sensitivity * (1 + 1e-5)
