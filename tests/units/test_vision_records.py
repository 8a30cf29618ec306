"""Records of images and words: where an image stands, what is learned, what is never cut, and what is refused."""

import re

import pytest

from common import tasks
from common.error import BouquetError
from common.models import base, lengths, sight
from common.sources.fields import LeftOut
from common.tasks.task import IGNORED
from strategies import read_config
from tests.support.architectures import TEMPLATE
from tests.support.vision import MARK, PARTS, QUESTION, paint, record, save_llava

IMAGE = 16
"""Tokens of an image."""


@pytest.fixture(scope="module", params=[TEMPLATE, PARTS], ids=["texts", "parts"])
def read(request, tmp_path_factory):
    """From a record to its examples, for a model whose template takes what is said as a text, or in parts."""
    folder = tmp_path_factory.mktemp("seen")
    for name in ("a.png", "b.png", "c.png"):
        paint(folder / name, (200, 30, 30))
    (folder / "data.jsonl").write_text("")
    place = save_llava(folder / "llava", request.param)

    def reading(record, length=128, **changes):
        config = read_config({"model.name": str(place), "task.name": "vision", "task.max-length": length} | changes)
        task = lengths.widest(config, str(folder / "data.jsonl"))
        return task.encode(record, base.load_tokenizer(config.model))

    reading.words = base.load_tokenizer(read_config({"model.name": str(place)}).model)
    return reading


def shown(read, example):
    """The text of an example, each image once, and what of it is learned."""
    text = re.sub(f"({re.escape(MARK)})+", "[image]", read.words.decode(example.tokens))
    learned = [token for token, label in zip(example.tokens, example.labels, strict=True) if label != IGNORED]
    return text, read.words.decode(learned)


def names(example):
    return [image.file.name for image in example.images]


def test_an_image_stands_before_its_question_and_the_answer_is_learned(read):
    (example,) = read(record("a.png", "red"))
    assert shown(read, example) == (f"<s><|user|>[image]\n{QUESTION}</s><|assistant|>red</s>", "red</s>")
    assert (example.tokens.count(2048), names(example), example.cut) == (IMAGE, ["a.png"], False)


def test_marks_say_where_images_stand(read):
    (example,) = read(record(["a.png", "b.png"], "yes") | {"instruction": "Is <image>\nlike\n<image>\n?"})
    told = {TEMPLATE: "Is [image]\nlike[image]\n?", PARTS: "[image]\n[image]\nIs like?"}
    assert shown(read, example)[0].startswith(f"<s><|user|>{told[read.words.chat_template]}</s>")
    assert (example.tokens.count(2048), names(example)) == (2 * IMAGE, ["a.png", "b.png"])


@pytest.mark.parametrize(
    "turns",
    [
        {"conversations": [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "red"}]},
        {"conversations": [{"from": "human", "value": "Which?\n<image>"}, {"from": "gpt", "value": "red"}]},
        {"messages": [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "red"}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
            ]
        },
    ],
)
def test_conversations_are_read_as_data_sets_have_them(read, turns):
    (example,) = read({"image": "a.png"} | turns)
    text, learned = shown(read, example)
    assert learned == "red</s>"
    assert "Which?" in text
    assert (text.count("[image]"), example.tokens.count(2048)) == (1, IMAGE)


def talk(*said):
    roles = ["user", "assistant"]
    return {"messages": [{"role": roles[place % 2], "content": each} for place, each in enumerate(said)]}


def test_no_image_is_cut_and_one_behind_the_cut_is_not_shown(read):
    whole = {"image": ["a.png", "b.png"]} | talk("<image>First?", "red", "<image>Then?", "blue and red")
    (example,) = read(whole)
    needed = len(example.tokens)
    assert (names(example), example.cut) == (["a.png", "b.png"], False)
    shortest = next(place for place, label in enumerate(example.labels, start=1) if label != IGNORED)
    for length in range(shortest, needed):
        (example,) = read(whole, length)
        assert example.cut
        assert len(example.tokens) <= length
        assert example.tokens.count(2048) == IMAGE * len(example.images)
        assert [token for token in example.labels if token != IGNORED]
    assert names(example) == ["a.png"], "whole turns are kept"
    for length in (shortest - 1, IMAGE + 2, 4):
        with pytest.raises(LeftOut, match="without room for an answer"):
            read(whole, length)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"output": "<image>"},
            "an image placeholder where none is allowed: .* got <image> in a turn of the assistant",
        ),
        ({"instruction": "<image><image>Which?"}, "the numbers of images and placeholders differ: .* got 2 for 1"),
        ({"image": ["a.png", "b.png"], "instruction": "<image>?"}, "placeholders differ: .* got 1 for 2"),
        ({"instruction": ["a"]}, "a field is not text"),
        ({"image": "../a.png"}, "a field does not hold an image|outside the data's folder"),
    ],
)
def test_what_would_take_one_image_for_another_is_refused(read, changes, said):
    with pytest.raises(BouquetError, match=said):
        read(record("a.png", "red") | changes)


@pytest.mark.parametrize("field", ["instruction", "output", "input"])
def test_the_models_own_mark_is_no_word_of_a_records(field, tmp_path):
    """It would be taken for what was seen, of this record or of its neighbour in a batch."""
    paint(tmp_path / "a.png", (200, 30, 30))
    (tmp_path / "data.jsonl").write_text("")
    place = save_llava(tmp_path / "llava", mark="[IMG]")
    config = read_config({"model.name": str(place), "task.name": "vision"})
    task, words = lengths.widest(config, str(tmp_path / "data.jsonl")), base.load_tokenizer(config.model)
    (example,) = task.encode(record("a.png", "red"), words)
    assert example.tokens.count(2048) == IMAGE
    with pytest.raises(BouquetError, match=re.escape("got [IMG] in a turn of the ")):
        task.encode(record("a.png", "red") | {field: "some [IMG] thing"}, words)


@pytest.mark.parametrize(
    ("changes", "reason"), [({"image": None}, "image"), ({"output": ""}, "answer"), ({"instruction": " "}, "text")]
)
def test_what_is_missing_is_told(read, changes, reason):
    with pytest.raises(LeftOut) as caught:
        read(record("a.png", "red") | changes)
    assert caught.value.reason == reason


def test_the_fields_that_a_record_must_have():
    task = tasks.build(read_config({"task.name": "vision"}).task)
    task.check(["image", "instruction", "output"], "here")
    task.check(["image", "messages"], "here")
    for columns, missing in ((["messages"], "image"), (["image", "output"], "instruction"), (["photo"], "image")):
        with pytest.raises(BouquetError, match=f"the task needs a field that the data lacks.*a field '{missing}'"):
            task.check(columns, "here")


def test_a_model_of_words_is_refused_by_name(tmp_path):
    config = read_config({"task.name": "vision"})
    with pytest.raises(
        BouquetError, match=r"the model does not take images .*embedded.*type 'llama'.*a text-only model"
    ):
        lengths.widest(config)
    place = save_llava(tmp_path)
    (place / "processor_config.json").unlink()
    with pytest.raises(BouquetError, match=r"the model cannot be loaded|the model does not take images"):
        lengths.widest(read_config({"task.name": "vision", "model.name": str(place)}))


def test_text_alone_is_not_lost_in_a_template_of_parts(tmp_path):
    """As an instruction without images: the template writes nothing of what is no part."""
    config = read_config({"model.name": str(save_llava(tmp_path, PARTS)), "task.name": "instruct"})
    words = base.load_tokenizer(config.model)
    (example,) = lengths.widest(config).encode({"instruction": "Say a word", "output": "word"}, words)
    assert words.decode(example.tokens) == "<s><|user|>Say a word</s><|assistant|>word</s>"
    assert sight.of(config.model).mark == MARK


FIRST_ALONE = (
    "{% for message in messages %}{{ '<image>' if loop.first and message['content'] is not string }}"
    "{% for part in message['content'] %}{{ part['text'] if part['type'] == 'text' }}{% endfor %}"
    "{{ eos_token }}{% endfor %}"
)


def test_a_template_that_loses_an_image_is_refused(tmp_path):
    for name in ("a.png", "b.png"):
        paint(tmp_path / name, (200, 30, 30))
    (tmp_path / "data.jsonl").write_text("")
    place = save_llava(tmp_path / "llava", FIRST_ALONE)
    config = read_config({"model.name": str(place), "task.name": "vision"})
    task, words = lengths.widest(config, str(tmp_path / "data.jsonl")), base.load_tokenizer(config.model)
    assert task.encode({"image": "a.png"} | talk("<image>First?", "red", "Then?", "blue"), words)
    with pytest.raises(
        BouquetError, match=r"template does not render the images .*expected <image> for each of 2, got 1"
    ):
        task.encode({"image": ["a.png", "b.png"]} | talk("<image>First?", "red", "<image>Then?", "blue"), words)


def test_a_part_of_another_type_is_not_passed_over(read):
    film = [{"type": "video"}, {"type": "text", "text": "Which?"}]
    turns = [{"role": "user", "content": film}, {"role": "assistant", "content": "red"}]
    with pytest.raises(BouquetError, match=r"a field is not text .*got a list"):
        read({"image": "a.png", "messages": turns})
