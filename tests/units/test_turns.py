"""Conversations: the assistant's turns are learned with what ends them, whatever the template, and nothing else is."""

import pytest
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer

from common import tasks
from common.config.run import TaskConfig
from common.error import BouquetError
from common.models import embedded
from common.sources.fields import LeftOut
from common.tasks.task import IGNORED

MARKS = "{{ '<|im_start|>' + m.role + '\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TOOLS = "{% if tools %}{{ 'tools: ' + tools[0].name + '\n' }}{% endif %}"
CHATML = f"{TOOLS}{{% for m in messages %}}{MARKS}{{{{ m.content + '<|im_end|>\n' }}}}{{% endfor %}}{PROMPT}"
MARKED = (
    f"{{% for m in messages %}}{MARKS}{{% if m.role == 'assistant' %}}{{%- generation -%}}"
    "{{ m.content + '<|im_end|>' }}{%- endgeneration -%}{{ '\n' }}"
    f"{{% else %}}{{{{ m.content + '<|im_end|>\n' }}}}{{% endif %}}{{% endfor %}}{PROMPT}"
)
# Drops what stands before </think> in every turn but the last.
THINKING = (
    f"{{% for m in messages %}}{MARKS}"
    "{{ (m.content if loop.last else m.content.split('</think>')[-1]) + '<|im_end|>\n' }}{% endfor %}" + PROMPT
)
ALTERNATING = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turn here') }}"
    "{% endif %}{{ ('[INST] ' + m.content + ' [/INST]') if m.role == 'user' else (m.content + eos_token) }}{% endfor %}"
)
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "First."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "Second."},
]


@pytest.fixture
def tokenizer():
    made = AutoTokenizer.from_pretrained(embedded.unpack())
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return made


def examples(tokenizer, record: dict, name: str = "chat", length: int = 256) -> list[tuple[str, str]]:
    """Every example of a record: its text, and what is learned of it."""
    task = tasks.build(TaskConfig.model_validate({"name": name, "max-length": length}))
    found = []
    for example in task.encode(record, tokenizer):
        assert len(example.tokens) <= length
        kept = [token for token, label in zip(example.tokens, example.labels, strict=True) if label != IGNORED]
        found.append((tokenizer.decode(example.tokens), tokenizer.decode(kept)))
    return found


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "marks"])
def test_the_assistants_turns_are_learned_with_the_templates_own_end(tokenizer, template):
    tokenizer.chat_template = template
    ((text, learned),) = examples(tokenizer, {"messages": TURNS})
    assert learned == "First.<|im_end|>Second.<|im_end|>"
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>")
    ((_, answer),) = examples(tokenizer, {"instruction": "One?", "output": "First."}, "instruct")
    assert answer == "First.<|im_end|>"


def test_a_tokenizer_without_a_template_has_a_plain_one(tokenizer):
    ((text, learned),) = examples(tokenizer, {"messages": TURNS})
    assert learned == "First.</s>Second.</s>"
    assert text.count("<s>") == tokenizer("One?")["input_ids"].count(tokenizer.bos_token_id)
    assert "### Instruction:\nTwo?\n\n### Response:\nSecond.</s>" in text


def test_the_first_token_is_not_doubled_and_the_end_is_learned(tokenizer):
    tokenizer.chat_template = ALTERNATING
    ((text, learned),) = examples(tokenizer, {"messages": TURNS[1:]})
    assert text == "<s>[INST] One? [/INST]First.</s>[INST] Two? [/INST]Second.</s>"
    assert learned == "First.</s>Second.</s>"


def test_turns_that_the_template_does_not_take_are_refused_in_its_words(tokenizer):
    tokenizer.chat_template = ALTERNATING
    said = r"chat template rejects a conversation: expected .*, got system, user .*no system turn here"
    with pytest.raises(BouquetError, match=said):
        examples(tokenizer, {"messages": TURNS})


def test_a_template_that_changes_earlier_turns_makes_an_example_of_each(tokenizer):
    tokenizer.chat_template = THINKING
    turns = [{**turn, "content": turn["content"].replace("First", "hm</think>First")} for turn in TURNS]
    (_, one), (text, other) = examples(tokenizer, {"messages": turns})
    assert one == "hm</think>First.<|im_end|>"
    assert other == "Second.<|im_end|>"
    assert "hm" not in text


def test_an_answer_is_learned_after_a_prompt_that_opens_a_thought(tokenizer):
    tokenizer.chat_template = CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif")
    ((text, learned),) = examples(tokenizer, {"messages": TURNS[:3]})
    assert text.endswith("<|im_start|>assistant\n<think>\nFirst.<|im_end|>")
    assert learned == "First.<|im_end|>"


def test_sharegpt_content_in_parts_and_lists_as_json_are_the_same(tokenizer):
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    shared = [{"from": names[turn["role"]], "value": turn["content"]} for turn in TURNS]
    parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in TURNS]
    expected = examples(tokenizer, {"messages": TURNS})
    assert examples(tokenizer, {"conversations": shared}) == expected
    assert examples(tokenizer, {"messages": parts}) == expected
    assert examples(tokenizer, {"messages": str(TURNS).replace("'", '"')}) == expected


def test_tools_are_the_templates_to_show(tokenizer):
    tokenizer.chat_template = CHATML
    ((text, _),) = examples(tokenizer, {"messages": TURNS, "tools": [{"name": "weather"}]})
    assert text.startswith("tools: weather\n<|im_start|>system")


def test_whole_turns_are_kept_as_far_as_they_fit(tokenizer):
    tokenizer.chat_template = CHATML
    task = tasks.build(TaskConfig.model_validate({"name": "chat", "max-length": 256}))
    (whole,) = task.encode({"messages": TURNS}, tokenizer)
    length = len(whole.tokens) - 1
    ((text, learned),) = examples(tokenizer, {"messages": TURNS}, length=length)
    assert learned == "First.<|im_end|>"
    assert text.endswith("First.<|im_end|>")
    shorter = tasks.build(TaskConfig.model_validate({"name": "chat", "max-length": length}))
    assert [example.cut for example in shorter.encode({"messages": TURNS}, tokenizer)] == [True]
    with pytest.raises(LeftOut, match="without room for an answer"):
        examples(tokenizer, {"messages": TURNS}, length=8)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (
            {"messages": [{"role": "narrator", "content": "x"}]},
            r"a turn with an unknown role \(field .*\).* got .narrator.",
        ),
        (
            {"messages": ["x"]},
            r"a turn with an unknown role .*expected one of system, developer, user, human.* got None",
        ),
        ({"messages": {"role": "user"}}, r"not a conversation \(field 'messages'\): expected a list of .*, got dict"),
        ({"messages": "{torn"}, r"not a conversation .*, got str"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, r"not text \(field 'messages'\).*, got an object"),
    ],
)
def test_what_is_no_conversation_is_refused(record, said, tokenizer):
    with pytest.raises(BouquetError, match=said):
        examples(tokenizer, record)


@pytest.mark.parametrize(
    ("record", "reason"),
    [({"messages": []}, "without text"), ({}, "without text"), ({"messages": TURNS[:2]}, "without an answer")],
)
def test_a_conversation_without_an_answer_is_left_out(record, reason, tokenizer):
    with pytest.raises(LeftOut, match=reason):
        examples(tokenizer, record)


def test_an_answer_that_says_nothing_is_not_learned(tokenizer):
    """Its end alone would teach a model to say nothing."""
    tokenizer.chat_template = CHATML
    silent = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": " "}]
    with pytest.raises(LeftOut, match="without an answer"):
        examples(tokenizer, {"messages": silent})
    ((_, learned),) = examples(tokenizer, {"messages": [*silent, *TURNS[1:3]]})
    assert learned == "First.<|im_end|>"


@pytest.mark.parametrize("template", ["{% for i in range(10**9) %}{% endfor %}", "{{ 1 // 0 }}", "{% if %}"])
def test_a_template_that_breaks_down_is_told(template, tokenizer):
    tokenizer.chat_template = template
    with pytest.raises(BouquetError, match="the model's chat template rejects a conversation"):
        examples(tokenizer, {"messages": TURNS})


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "marks"])
def test_a_tokenizer_that_breaks_down_over_a_turn_is_told(template, tokenizer):
    """Its pattern backtracks, and what is written in Rust then raises what is no ``Exception``."""
    tokenizer.chat_template = template
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+b"), "isolated")
    with pytest.raises(BouquetError, match="the tokenizer fails on a text"):
        examples(tokenizer, {"messages": [{"role": "user", "content": "a" * 60}, TURNS[2]]})
