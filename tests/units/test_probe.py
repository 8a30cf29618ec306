"""The probe before a private round: what it lets pass, what it refuses, and that it leaves no trace."""

from contextlib import nullcontext, suppress
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM as Causal
from transformers import GPT2Config, LlamaConfig, OPTConfig, PreTrainedConfig

from client_app.probe import made_up, probe, probe_scores
from common import tasks
from common.config.run import LoraConfig, RunConfig, TaskConfig
from common.error import BouquetError
from common.models import adapted, base
from common.models.adapted import LoraModel
from common.tasks import TASKS
from strategies.gradients import GRADIENTS
from strategies.rules import FedIT
from tests.support.architectures import tiny_bert
from tests.support.factors import initial
from tests.support.private_steps import TEXT, attach, fresh

SHORT_TEXT = tasks.build(TaskConfig.model_validate({"max-length": 32}))
SIZES = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
FACTORS = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
ROPES = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    "longrope": {"rope_type": "longrope", "factor": 4.0, "rope_theta": 10000.0, **FACTORS},
}


def llama(rope=None, positions=64):
    rope = ROPES[rope] | {"original_max_position_embeddings": positions} if rope else None
    config = LlamaConfig(**SIZES, intermediate_size=128, max_position_embeddings=positions, rope_parameters=rope)
    return Causal.from_config(config)


def with_lora(network, targets="all-linear"):
    """With LoRA as it starts: B is zero."""
    model = LoraModel(network, LoraConfig.model_validate({"targets": targets}))
    state = initial(FedIT(), model.spec)
    model.install(state.adapter, state.scale, {})
    model.train_only(model.keys)
    return model


def look(model, task=SHORT_TEXT, engine="fast", step=0, bound=1.0):
    with (
        nullcontext() if GRADIENTS[engine].packs else model.padded(),
        attach(engine, model.network, bound, "flat", not task.sequence_classification) as attached,
    ):
        probe(attached, model, task, step)
        assert not any(tensor.any() for tensor in attached.take().values())


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("engine", ["fast", "hooks"])
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_the_embedded_model_passes(engine, quantization):
    model = fresh(quantization)
    model.train_only(model.keys)
    look(model, TEXT, engine)


@pytest.mark.parametrize("bound", [1e-6, 1e6])
@pytest.mark.parametrize(
    ("config", "targets"),
    [
        (LlamaConfig(**SIZES, intermediate_size=128, attention_dropout=0.3), "all-linear"),
        (GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=4, n_positions=32), "all-linear"),
        (OPTConfig(**SIZES, ffn_dim=128, max_position_embeddings=32, word_embed_proj_dim=64), "q_proj,v_proj"),
    ],
)
def test_ordinary_language_models_pass_with_their_dropout(config, targets, bound):
    look(with_lora(Causal.from_config(config), targets), bound=bound)


@pytest.mark.parametrize("pooling", ["default", "mean"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_an_encoder_passes_with_its_dropout_head_and_pooler(pooling, checkpointing, quantization, tmp_path):
    settings = {"model.name": tiny_bert(tmp_path), "model.pooling": pooling, "task.name": "classify"}
    settings |= {"model.gradient-checkpointing": checkpointing, "model.quantization": quantization}
    config = RunConfig.from_flower(settings | {"lora.dropout": 0.2})
    look(with_lora(base.load(config.model, 2, torch.device("cpu"))), tasks.build(config.task))


@pytest.mark.parametrize("engine", ["fast", "hooks"])
def test_a_layer_that_folds_all_tokens_into_rows_is_refused(engine):
    config = OPTConfig(**SIZES, ffn_dim=128, max_position_embeddings=32, word_embed_proj_dim=64)
    with pytest.raises(BouquetError, match=r"does not see one row an example: expected an input of N x T x d"):
        look(with_lora(Causal.from_config(config)), engine=engine)


@pytest.mark.parametrize("rope", ROPES)
def test_rotary_embeddings_that_depend_on_the_longest_text_are_refused(rope):
    look(with_lora(llama(rope, 64)))
    with pytest.raises(BouquetError, match=r"does not keep the examples of a batch apart \(the state before step 1\)"):
        look(with_lora(llama(rope, 16)))


class Small(nn.Module):
    """A classifier of token ids, in the middle of which stands whatever is tried: from N x T x 16 to N x T x 16."""

    def __init__(self, middle):
        super().__init__()
        self.config = PreTrainedConfig(vocab_size=64)
        self.embedding = nn.Embedding(64, 16)
        self.first = nn.Linear(16, 16)
        self.middle = middle
        self.classifier = nn.Linear(16, 2)

    def forward(self, input_ids, attention_mask):
        hidden = self.middle(torch.tanh(self.first(self.embedding(input_ids))))
        mask = attention_mask[:, :, None]
        return SimpleNamespace(logits=self.classifier((hidden * mask).sum(1) / mask.sum(1)))


class Normalised(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x.mT).mT


class Expert(nn.Module):
    """Sees one token of every example, as many rows as there are examples, but each of them from anywhere."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        rows = x.flatten(0, 1)
        chosen = rows.detach().sum(1).topk(len(x)).indices
        return x + torch.zeros_like(rows).index_add(0, chosen, self.linear(rows[chosen])).view_as(x)


CLASSIFY = tasks.build(TaskConfig.model_validate({"name": "classify", "max-length": 32}))


@pytest.mark.parametrize("middle", [nn.Identity, nn.Tanh])
def test_what_computes_every_example_by_itself_passes(middle):
    look(with_lora(Small(middle()), "first"), CLASSIFY)


@pytest.mark.parametrize(("middle", "targets"), [(lambda: Normalised(16), "first"), (Expert, "first,linear")])
def test_what_couples_the_examples_is_refused(middle, targets):
    with pytest.raises(
        BouquetError, match=r"does not keep the examples of a batch apart .*got a difference of [0-9.]+e"
    ):
        look(with_lora(Small(middle()), targets), CLASSIFY)


class Late(nn.Module):
    """Couples the examples only where what is trained in front of it does something: with B = 0 it does not."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, x):
        moved = self.linear(x)
        return x + moved * moved.detach().abs().amax((0, 1))


def test_coupling_that_loras_start_hides_is_found_by_made_up_values():
    model = with_lora(Small(Late()), "linear")
    model.train_only([key for key in model.keys if key.layer != "classifier"])
    with pytest.raises(BouquetError, match=r"apart \(made-up values of what is trained\)"):
        look(model, CLASSIFY)


def test_a_state_that_magnifies_rounding_is_refused_before_and_in_a_round():
    model = fresh("none")
    model.install({key: 300 * tensor for key, tensor in model.tensors().items()}, 2.0, {})
    model.train_only(model.keys)
    for step in (0, 1, 4):
        with pytest.raises(BouquetError, match=rf"apart \(the state before step {step + 1}\)"):
            look(model, TEXT, step=step)
    look(model, TEXT, step=3)


def test_nothing_is_promised_without_a_bound():
    look(with_lora(llama("dynamic", 16)), bound=float("inf"))


def test_a_text_that_the_model_has_no_positions_for_is_refused():
    config = GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=4, n_positions=16)
    with pytest.raises(BouquetError, match=r"cannot compute a made-up text .*got IndexError. Lower task.max-length"):
        look(with_lora(Causal.from_config(config)))


def held(model):
    tensors = [*model.network.parameters(), *model.network.buffers()]
    return (
        [tensor.clone() for tensor in tensors],
        torch.get_rng_state(),
        [set(vars(m)) for m in model.network.modules()],
    )


@pytest.mark.parametrize(
    ("network", "task", "targets"),
    [
        (lambda: llama(), SHORT_TEXT, "all-linear"),
        (lambda: llama("longrope", 16), SHORT_TEXT, "all-linear"),
        (lambda: Small(Normalised(16)), CLASSIFY, "first"),
    ],
)
def test_it_leaves_no_trace_whether_or_not_it_refuses(network, task, targets):
    model = with_lora(network(), targets)
    model.network.eval()
    dropout, before = nn.functional.dropout, held(model)
    with suppress(BouquetError):
        look(model, task)
    for one, other in zip(before[0], held(model)[0], strict=True):
        assert torch.equal(one, other)
    assert torch.equal(before[1], held(model)[1])
    assert before[2] == held(model)[2]
    assert not model.network.training
    assert nn.functional.dropout is dropout


def test_made_up_examples_are_valid_and_always_the_same():
    model = with_lora(llama(), "all-linear")
    for name, kind in TASKS.items():
        task = tasks.build(TaskConfig.model_validate({"name": name, "max-length": 6}))
        examples = made_up(model, task, 5, 6, 6)
        assert examples == made_up(model, task, 5, 6, 6)
        assert [len(example.tokens) for example in examples] == [5, 6, 6]
        assert all(0 <= token < 256 and token != model.pad for example in examples for token in example.tokens)
        assert examples[1] != examples[2]
        batch = task.collate(examples, model.pad)
        assert len(batch["input_ids"]) == kind.rows * len(examples)
        assert (task.weights(batch["labels"]) > 0).all()


def test_the_model_may_be_loaded_as_a_node_does(tmp_path):
    config = RunConfig()
    model = adapted.load(config.model, config.lora, config.task, "cpu")
    model.train_only(model.keys)
    look(model, tasks.build(config.task))


@pytest.mark.parametrize("rope", [None, *ROPES])
def test_a_score_that_depends_on_an_earlier_one_is_refused(rope):
    """Dynamic positions keep the longest text that was seen; those of longrope go by the text itself."""
    model = with_lora(llama(rope, 16 if rope else 64))
    for _ in range(2):
        with nullcontext() if rope != "dynamic" else pytest.raises(BouquetError, match="whatever was scored before it"):
            probe_scores(model, SHORT_TEXT)
