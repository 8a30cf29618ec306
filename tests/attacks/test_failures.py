"""Kind 2: success and failure as a question that costs nothing: whether one record is there must not decide it."""

import json
import math
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.attacks.hostile import (
    CLASSIFY,
    INSTRUCT,
    LOCAL,
    PLAIN,
    RECORDS,
    TEXT,
    failure,
    heard,
    neighbours,
    start,
    task,
    turned,
)
from tests.attacks.records import OF_A_CLASS, OF_A_TEXT, OF_AN_ANSWER, nested
from tests.attacks.tools import apart, saved, tiny_llama


def inserted(record, place=4):
    """The usual records with one more among them."""
    return [*RECORDS[:place], record, *RECORDS[place:]]


@pytest.mark.parametrize("record", OF_A_TEXT)
def test_a_record_that_is_no_text_is_no_message(record, tmp_path):
    less, more = neighbours(tmp_path, RECORDS, inserted(OF_A_TEXT[record]))
    assert heard(less) == heard(more)


@pytest.mark.parametrize("depths", [range(600, 1000), [100_000]], ids=["any depth", "a depth that crashes"])
def test_a_record_that_is_too_deep_for_this_or_that_reader_is_no_message(depths, tmp_path):
    """What reads a line and what hashes it go to different depths. In a process of its own: some readers crash."""
    less, more = neighbours(tmp_path, RECORDS, [*RECORDS, *map(nested, depths)])
    assert apart(lambda: heard(less)) == apart(lambda: heard(more))


@pytest.mark.parametrize("place", [0, 8])
@pytest.mark.parametrize("record", ["a number", "a broken line", "no such field", "a field of another kind"])
def test_nor_where_it_comes_first_or_last(record, place, tmp_path):
    less, more = neighbours(tmp_path, RECORDS, inserted(OF_A_TEXT[record], place))
    assert heard(less) == heard(more)


@pytest.mark.parametrize("label", OF_A_CLASS)
def test_a_record_that_cannot_be_encoded_is_no_message(label, tmp_path):
    odd = {**RECORDS[0], "label": OF_A_CLASS[label]}
    less, more = neighbours(tmp_path, RECORDS, inserted(odd), task=CLASSIFY)
    assert heard(less, task(CLASSIFY)) == heard(more, task(CLASSIFY))


@pytest.mark.parametrize("record", OF_AN_ANSWER)
def test_a_question_without_an_answer_is_no_message(record, tmp_path):
    usual = [{"text": f"{n} + {n}?", "answer": f"{2 * n}"} for n in range(8)]
    less, more = neighbours(tmp_path, usual, [*usual[:4], OF_AN_ANSWER[record], *usual[4:]], task=INSTRUCT)
    run = task(INSTRUCT) | {"task.max-length": 32}
    assert heard(less, run) == heard(more, run)


@pytest.mark.parametrize(("field", "classes"), [("age", 36), ("age", 37), ("age", 38), ("label", 40), ("text", 2)])
def test_how_many_classes_a_field_has_cannot_be_asked(field, classes, tmp_path):
    """A coordinator that searches for the oldest person by task.labels, one roll call a question."""
    asked = task({**CLASSIFY, "label": field, "labels": classes})
    less, more = neighbours(tmp_path, RECORDS[:-1], RECORDS, task=CLASSIFY)
    assert heard(less, asked) == heard(more, asked)


@pytest.mark.parametrize("changes", [{"task.max-length": 4}, {"task.max-length": 5}, {"data.holdout": 0.99}], ids=str)
@pytest.mark.parametrize("settings", [TEXT, INSTRUCT, CLASSIFY], ids=lambda settings: settings["name"])
def test_room_for_no_token_is_no_question(settings, changes, tmp_path):
    run = task(settings) | changes
    own = [{**record, "text": "x", "answer": "y"} for record in RECORDS]
    long = {"text": "def long(a, b, c):\n    return a", "label": 1, "answer": "a, b and c"}
    less, more = neighbours(tmp_path, own, [*own, long], task=settings)
    assert heard(less, run) == heard(more, run)


@pytest.mark.parametrize("mode", ["example", "update-local"])
@pytest.mark.parametrize("few", [0, 1, 2])
def test_few_records_are_as_good_as_many(few, mode, tmp_path):
    less, more = neighbours(tmp_path, RECORDS[:few], RECORDS[: few + 1])
    run = {"privacy.mode": mode}
    assert heard(less, run) == heard(more, run)
    assert failure(less.ask("train", run)) == ""


@pytest.mark.parametrize("mode", ["example", "update-local"])
@pytest.mark.parametrize("line", ['{"text": 5}', "not JSON", "", "[]"])
def test_a_file_with_one_record_that_is_none_is_an_empty_file(line, mode, tmp_path):
    less, more = neighbours(tmp_path, [], [line])
    run = {"privacy.mode": mode}
    assert heard(less, run) == heard(more, run)


@pytest.mark.parametrize("minimum", [1, 8, 9])
def test_an_operators_own_least_number_is_no_question(minimum, tmp_path):
    less, more = neighbours(tmp_path, RECORDS, inserted(RECORDS[0]), tables={"min-examples": minimum})
    assert heard(less) == heard(more)


@pytest.mark.parametrize("value", [-math.inf, math.inf, math.nan, -1e38, 3e38])
@pytest.mark.parametrize("mode", ["example", "update-local"])
def test_a_loss_that_is_not_finite_is_no_message(mode, value, bert, tmp_path):
    """A head whose second class is impossible: the loss of a record says which class it has."""
    run = {"model.name": bert, "lora.targets": "query,value", "privacy.mode": mode, **task(CLASSIFY)}
    less, more = neighbours(
        tmp_path,
        [{**record, "label": 0} for record in RECORDS],
        [{**record, "label": int(n == 4)} for n, record in enumerate(RECORDS)],
        task=CLASSIFY,
        tables={"models": [bert]},
    )

    def impossible(key, tensor):
        return torch.tensor([0.0, value]) if key.part == "b" else tensor

    state = turned(start(run), impossible)
    assert heard(less, run, state=state) == heard(more, run, state=state)
    assert failure(less.ask("query", run)) == ""


@pytest.mark.parametrize("mode", ["example", "update-local"])
def test_a_model_without_padding_does_not_tell_one_record_from_two(mode, tmp_path):
    config = LlamaConfig(
        vocab_size=2048, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = saved("unpadded", config, AutoModelForCausalLM)
    run = {"model.name": model, "privacy.mode": mode, **task(CLASSIFY)}
    less, more = neighbours(tmp_path, RECORDS[:2], RECORDS[:4], task=CLASSIFY, tables={"models": [model]})
    assert heard(less, run) == heard(more, run)


def test_a_line_that_breaks_off_is_no_message(tmp_path):
    less, more = neighbours(tmp_path, RECORDS, RECORDS)
    with (more.folder / "data.jsonl").open("a") as file:
        file.write(json.dumps(RECORDS[0])[:20])
    assert heard(less) == heard(more)


@pytest.mark.parametrize("run", [{}, LOCAL], ids=["example", "update-local"])
def test_a_file_that_is_gone_is_refused_in_words_that_are_always_the_same(run, tmp_path):
    less, more = neighbours(tmp_path, RECORDS, RECORDS)
    for node in (less, more):
        (node.folder / "data.jsonl").unlink()
    (more.folder / "data.jsonl").mkdir()
    said = [failure(node.ask("train", run)) for node in (less, more)]
    assert said[0]
    assert str(tmp_path) not in said[0] + said[1]


MARKED = (
    "{% for turn in messages %}{% if turn.role == 'assistant' %}A:{% generation %}{{ turn.content }}{% endgeneration %}"
    "{% else %}Q:{{ turn.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)
"""A chat template that says itself what is learned, so that the tokenizer is called from within it."""


@pytest.mark.parametrize(
    ("settings", "template"),
    [(TEXT, ""), (CLASSIFY, ""), (INSTRUCT, ""), (INSTRUCT, MARKED)],
    ids=["text", "classify", "instruct", "instruct, marked"],
)
@pytest.mark.parametrize("run", [{}, LOCAL, PLAIN], ids=["example", "update-local", "none"])
def test_a_text_over_which_the_tokenizer_breaks_down_ends_nothing(run, settings, template, tmp_path):
    """Its pattern backtracks, and what is written in Rust then raises what is no ``Exception``."""
    model = shutil.copytree(tiny_llama(), tmp_path / "model")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": "(a+)+b"}, "behavior": "Isolated", "invert": False}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, tokenizer["pre_tokenizer"]]}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    if template:
        (model / "chat_template.jinja").write_text(template)
    usual = [{**record, "answer": "yes"} for record in RECORDS]
    breaking = {"text": "a" * 60, "label": 0, "answer": "yes"}
    run = {"model.name": str(model), **run, **task(settings)}
    open_to_all = {"privacy_epsilon": None} if run.get("privacy.mode") == "none" else {}
    less, more = neighbours(
        tmp_path, usual, [*usual, breaking], task=settings, tables={"models": [str(model)]}, **open_to_all
    )
    if open_to_all:
        assert failure(more.ask("train", run)).startswith("records that cannot be used; ")
    else:
        assert heard(less, run) == heard(more, run)
        assert failure(more.ask("train", run)) == ""
