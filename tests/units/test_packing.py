"""Packed batches: what a model makes of them is what it makes of padded ones, and no text sees another."""

import pytest
import torch
import transformers as tf

from common import tasks
from common.config.run import LoraConfig, TaskConfig
from common.models.adapted import LoraModel
from common.models.packing import Layout
from common.tasks import Example
from tests.support.private_steps import EXAMPLES, TEXT, fresh, scattered

WIDTH = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**WIDTH, "intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 16}
CLASSIFY = tasks.build(TaskConfig(name="classify"))

LANGUAGE = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED)),
    "a sliding window": lambda: tf.MistralForCausalLM(tf.MistralConfig(**GROUPED, sliding_window=4)),
    "windows here and there": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**GROUPED, sliding_window=4)),
    "experts": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**GROUPED)),
    "learned positions": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=4)),
}
CLASSIFIERS = {
    "bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**WIDTH, intermediate_size=96)),
    "positions from two": lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**WIDTH, intermediate_size=96)),
    "the last token": lambda: tf.Qwen3ForSequenceClassification(tf.Qwen3Config(**GROUPED, pad_token_id=0)),
}


def adapted(network):
    torch.manual_seed(0)
    return scattered(LoraModel(network(), LoraConfig.model_validate({"targets": "all-linear"})))


def examples(task, lengths=(5, 17, 2, 9)):
    texts = [[(7 * number + place) % 250 + 3 for place in range(length)] for number, length in enumerate(lengths)]
    return [task.made_up(tokens, number) for number, tokens in enumerate(texts)]


def either_way(model, task, chosen):
    """The losses and the gradients of a batch, packed and padded."""
    model.network.eval()
    model.train_only(model.keys)
    found = []
    for padded in (False, True):
        batch = task.collate(chosen, model.pad)
        if padded:
            with model.padded():
                output = model.outputs(batch)
        else:
            output = model.outputs(batch)
        assert (output.rows is None) == padded
        task.loss(output).backward()
        gradients = torch.cat([model.parameters(key)[0].grad.flatten() for key in model.keys])
        model.network.zero_grad(set_to_none=True)
        found.append((task.losses(output).detach(), gradients))
    return found


@pytest.mark.parametrize("kind", [*LANGUAGE, *CLASSIFIERS])
def test_packed_and_padded_are_one(kind):
    task = TEXT if kind in LANGUAGE else CLASSIFY
    packed, padded = either_way(adapted({**LANGUAGE, **CLASSIFIERS}[kind]), task, examples(task))
    torch.testing.assert_close(packed[0], padded[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(packed[1], padded[1], rtol=1e-4, atol=1e-6)


def test_over_four_bits_and_with_checkpoints_packed_and_padded_are_one():
    for checkpointing in (None, "ordinary", "reentrant"):
        model = fresh("nf4", checkpointing=checkpointing)
        model.network.train()
        packed, padded = either_way(model, TEXT, EXAMPLES)
        torch.testing.assert_close(packed[0], padded[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(packed[1], padded[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", LANGUAGE)
def test_no_text_sees_its_neighbours(kind):
    """One token of one text changes: of the others, no bit moves."""
    model, chosen = adapted(LANGUAGE[kind]), examples(TEXT)
    model.network.eval()
    tokens = [*chosen[1].tokens[:-1], 9]
    changed = [chosen[0], Example(tokens, tokens), *chosen[2:]]
    with torch.no_grad():
        one, other = (TEXT.losses(model.outputs(TEXT.collate(each, 0))) for each in (chosen, changed))
    assert one[1] != other[1]
    assert torch.equal(one[[0, 2, 3]], other[[0, 2, 3]])


def test_layers_see_no_padding():
    model = fresh("none")
    seen = []
    layer = next(iter(model.layers.values()))
    handle = layer.register_forward_hook(lambda _, arguments, __: seen.append(arguments[0].shape[:2]))
    with torch.no_grad():
        model.outputs(TEXT.collate(EXAMPLES, 0))
        model.outputs(TEXT.collate(EXAMPLES[:1], 0))
        with model.padded():
            model.outputs(TEXT.collate(EXAMPLES, 0))
    handle.remove()
    assert seen == [(1, sum(len(example.tokens) for example in EXAMPLES)), (1, 30), (7, 30)]


@pytest.mark.parametrize(
    "network",
    [
        lambda: tf.DebertaV2ForSequenceClassification(tf.DebertaV2Config(**WIDTH, intermediate_size=96)),
        lambda: tf.BloomForCausalLM(tf.BloomConfig(vocab_size=256, hidden_size=64, n_layer=2, n_head=4)),
        lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**GROUPED, attn_logit_softcapping=30.0)),
    ],
)
def test_a_model_that_attends_in_a_way_of_its_own_is_padded(network):
    model = adapted(network)
    task = CLASSIFY if model.spec.head else TEXT
    assert model.outputs(task.collate(examples(task), 0)).rows is None


def test_a_layout_goes_there_and_back():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    layout = Layout(mask, torch.device("cpu"))
    values = torch.arange(12.0).view(2, 3, 2)
    assert layout.pack(values).tolist() == [[[0.0, 1.0], [2.0, 3.0], [6.0, 7.0]]]
    assert torch.equal(layout.unpack(layout.pack(values)), values * mask[..., None])
    assert layout.pack(torch.arange(3.0).view(1, 3)).tolist() == [[0.0, 1.0, 0.0]]
    untouched = torch.zeros(2, 4)
    assert layout.unpack(untouched) is untouched
