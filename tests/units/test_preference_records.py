"""What a preference is read from: texts, turns, and whole conversations."""

import pytest

from common import tasks
from common.config.run import ModelConfig, TaskConfig
from common.error import BouquetError
from common.models import base
from common.sources.fields import LeftOut
from common.tasks.kto import DESIRABLE, UNDESIRABLE
from common.tasks.task import IGNORED

ASKED, SAID, WORSE = (
    {"role": role, "content": text} for role, text in (("user", "Add"), ("assistant", "Two"), ("assistant", "Three"))
)
SYSTEM, EARLIER, AGAIN = (
    {"role": role, "content": text} for role, text in (("system", "Short."), ("assistant", "Yes?"), ("user", "Now"))
)


def encoded(name, record, **settings):
    task = tasks.build(TaskConfig.model_validate({"name": name, "max-length": 64, **settings}))
    (example,) = task.encode(record, base.load_tokenizer(ModelConfig()))
    return example


def read(example):
    """What is learned of a text, and the whole of it."""
    tokenizer = base.load_tokenizer(ModelConfig())
    learned = [token for token, label in zip(example.tokens, example.labels, strict=True) if label >= 0]
    return tokenizer.decode(learned), tokenizer.decode(example.tokens)


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "Add", "chosen": "Two", "rejected": "Three"},
        {"instruction": [ASKED], "chosen": [SAID], "rejected": [WORSE]},
        {"chosen": [ASKED, SAID], "rejected": [ASKED, WORSE]},
        # The prompt stands beside the conversations that begin with it.
        {"instruction": "Add", "chosen": [ASKED, SAID], "rejected": [ASKED, WORSE]},
    ],
    ids=["texts", "turns", "conversations", "both"],
)
def test_a_pair_is_the_same_in_every_form(record):
    example = encoded("dpo", record)
    assert example == encoded("dpo", {"instruction": "Add", "chosen": "Two", "rejected": "Three"})
    assert read(example) == ("Two</s>", "### Instruction:\nAdd\n\n### Response:\nTwo</s>")
    assert read(example.against) == ("Three</s>", "### Instruction:\nAdd\n\n### Response:\nThree</s>")
    assert example.length == max(len(example.tokens), len(example.against.tokens))


def test_of_a_conversation_the_reply_alone_is_learned():
    earlier = [SYSTEM, ASKED, EARLIER, AGAIN]
    example = encoded("dpo", {"chosen": [*earlier, SAID], "rejected": [*earlier, WORSE]})
    assert read(example)[0] == "Two</s>"
    assert "Yes?" in read(example)[1]
    alone = encoded("kto", {"output": [*earlier, SAID], "label": 1})
    assert read(alone) == read(example)


def test_a_context_goes_with_the_prompt():
    record = {"instruction": "Add", "input": "1 and 1", "chosen": "Two", "rejected": "Three"}
    assert "Add\n\n1 and 1\n\n### Response" in read(encoded("dpo", record))[1]


@pytest.mark.parametrize(
    ("label", "side"), [(True, DESIRABLE), ("1", DESIRABLE), (0.0, UNDESIRABLE), ("False", UNDESIRABLE)]
)
def test_a_reply_is_desirable_or_not(label, side):
    example = encoded("kto", {"instruction": "Add", "output": "Two", "label": label})
    assert example.labels[0] == side
    assert example.labels[1] == IGNORED
    assert read(example)[0] == "Two</s>"


@pytest.mark.parametrize(
    ("name", "record", "reason"),
    [
        ("dpo", {"instruction": "", "chosen": "Two", "rejected": "Three"}, "without text"),
        ("dpo", {"instruction": "Add", "chosen": " ", "rejected": "Three"}, "without an answer"),
        ("dpo", {"instruction": "Add", "chosen": [], "rejected": [WORSE]}, "without an answer"),
        ("dpo", {"instruction": "Add " * 80, "chosen": "Two", "rejected": "Three"}, "without room for an answer"),
        ("kto", {"instruction": "Add", "output": "Two", "label": None}, "without a label"),
    ],
)
def test_what_holds_nothing_is_left_out(name, record, reason):
    with pytest.raises(LeftOut, match=reason):
        encoded(name, record)


@pytest.mark.parametrize(
    ("name", "record", "said"),
    [
        (
            "dpo",
            {"prompt": "Add", "chosen": "Two", "rejected": "Three"},
            "a reply without a prompt .field 'instruction'.: expected a prompt, or conversations in chosen and "
            "rejected that begin with the same one, got neither. Name the field of the prompt with task.prompt",
        ),
        ("dpo", {"chosen": [ASKED, SAID], "rejected": [AGAIN, WORSE]}, "a reply without a prompt"),
        ("dpo", {"instruction": "Add", "chosen": {"a": 1}, "rejected": "Three"}, "a field is not text"),
        (
            "kto",
            {"instruction": "Add", "output": "Two", "label": "good"},
            "a label that is neither true nor false .*got 'good'",
        ),
    ],
)
def test_what_is_no_preference_is_told_with_its_field(name, record, said):
    with pytest.raises(BouquetError, match=said):
        encoded(name, record)
