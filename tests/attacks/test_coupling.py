"""Kind 4: models in which one example changes what is computed of another, past what clipping bounds."""

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, FNetConfig, LlamaConfig, Phi3Config
from transformers.models.bert.modeling_bert import BertModel

from tests.attacks.hostile import CLASSIFY, Node, failure, neighbours, start, task, turned
from tests.attacks.taps import sums
from tests.attacks.tools import saved

SHORT = [{"text": f"x{n} = {n}", "label": n % 2} for n in range(7)]
LONG = {"text": "for name, value in sorted(table.items()): print(name, value)", "label": 1}
# Every record is in every batch, and the gradients' directions say how far one of them has moved the others'.
RUN = {
    "lora.targets": "all-linear",
    "task.max-length": 32,
    "train.batch-size": 16,
    "privacy.clip": 1e-3,
    "privacy.noise-multiplier": 1.0,
}

SMALL = {
    "vocab_size": 2048,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.5,
    "pad_token_id": 0,
}


def llama(longest=8, **rope):
    """A causal model of 8 positions, stretched by ``rope``."""
    return LlamaConfig(**SMALL, max_position_embeddings=longest, rope_parameters={"rope_theta": 10_000.0} | rope)


def phi(short, long):
    """Positions that change for the whole batch where its longest text passes 8 tokens."""
    rope = {"rope_type": "longrope", "short_factor": [short] * 8, "long_factor": [long] * 8, "rope_theta": 10_000.0}
    return Phi3Config(
        **SMALL,
        bos_token_id=1,
        eos_token_id=2,
        max_position_embeddings=64,
        original_max_position_embeddings=8,
        rope_parameters=rope,
    )


CAUSAL = {
    "dynamic": llama(rope_type="dynamic", factor=4.0),
    "dynamic from 4": llama(4, rope_type="dynamic", factor=8.0),
    "dynamic from 12": llama(12, rope_type="dynamic", factor=16.0),
    "long": phi(1.0, 8.0),
    "longer": phi(1.0, 64.0),
    "short": phi(0.125, 1.0),
}
STEADY = {
    "linear": llama(64, rope_type="linear", factor=4.0),
    "usual": llama(64, rope_type="default"),
    "yarn": llama(64, rope_type="yarn", factor=4.0, original_max_position_embeddings=8),
}


class NormedConfig(BertConfig):
    """Of a model that this machine's Transformers was taught."""

    model_type = "normed-bert"


class Normed(BertModel):
    """An encoder with batch normalisation after it."""

    config_class = NormedConfig

    def __init__(self, config, **options):
        super().__init__(config, **options)
        self.norm = torch.nn.BatchNorm1d(config.hidden_size)

    def forward(self, *arguments, **named):
        out = super().forward(*arguments, **named)
        out.last_hidden_state = self.norm(out.last_hidden_state.mT).mT
        return out


AutoModel.register(NormedConfig, Normed)


def moved(folder, less, more, run, model, settings=None, state=None):
    """How far one record moves the noiseless sums, at most, over the clip; None where nothing was trained at all."""
    tables = {"models": [model]}
    options = {"task": settings} if settings else {}
    answers, totals = [], []
    for node in neighbours(folder, less, more, tables=tables, **options):
        with sums() as found:
            # Twice from one state: what the model remembers of the first time must not show in the second.
            answers += [failure(node.ask("train", run, state=state)) for _ in range(2)]
        totals.append([(mechanism.sensitivity, total) for mechanism, total in found])
    if not any(totals):
        assert answers[0].replace("/less", "") == answers[-1].replace("/more", "") != ""
        return None
    assert answers == [""] * 4
    return max(float((b - a).norm()) / bound for (bound, a), (_, b) in zip(*totals, strict=True))


def causal(model, **changes):
    """A run over a model of the machine's, from a state in which every layer has a say."""
    run = RUN | {"model.name": model, **changes}
    torch.manual_seed(0)
    return run, turned(start(run), lambda key, tensor: tensor + 0.3 * torch.randn_like(tensor))


@pytest.mark.parametrize("name", CAUSAL)
def test_positions_that_depend_on_the_batch_move_no_other_record(name, tmp_path):
    model = saved(name, CAUSAL[name], AutoModelForCausalLM)
    run, state = causal(model)
    found = moved(tmp_path, SHORT, [*SHORT, LONG], run, model, state=state)
    assert found is None or found <= 1 + 1e-6


@pytest.mark.parametrize("name", ["dynamic", "long"])
@pytest.mark.parametrize("size", [1, 3])
def test_nor_those_of_a_later_batch(name, size, tmp_path):
    """What a model remembers of the longest text so far."""
    model = saved(name, CAUSAL[name], AutoModelForCausalLM)
    run, state = causal(model, **{"train.batch-size": size})
    found = moved(tmp_path, SHORT, [LONG, *SHORT], run, model, state=state)
    assert found is None or found <= 1 + 1e-6


@pytest.mark.parametrize("name", STEADY)
@pytest.mark.parametrize("size", [1, 3, 16])
def test_positions_that_do_not_are_trained(name, size, tmp_path):
    model = saved(name, STEADY[name], AutoModelForCausalLM)
    run, state = causal(model, **{"train.batch-size": size})
    assert moved(tmp_path, SHORT, [*SHORT, LONG], run, model, state=state) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("kind", ["batch normalisation", "a transform over the padded length"])
@pytest.mark.parametrize("size", [3, 16])
def test_layers_that_mix_examples_are_refused_or_move_no_other(kind, size, tmp_path):
    sizes = {key: SMALL[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    if kind == "batch normalisation":
        model = saved("normed", NormedConfig(**sizes, num_attention_heads=2))
    else:
        model = saved("fnet", FNetConfig(**sizes, max_position_embeddings=64))
    run = RUN | {"model.name": model, "train.batch-size": size, "model.pooling": "mean", **task(CLASSIFY)}
    run |= {"lora.targets": "output.dense"}
    found = moved(tmp_path, SHORT, [*SHORT, LONG], run, model, settings=CLASSIFY)
    assert found is None or found <= 1 + 1e-6


@pytest.mark.parametrize("name", ["dynamic", "long"])
def test_what_is_refused_is_refused_whatever_the_data_is(name, tmp_path):
    model = saved(name, CAUSAL[name], AutoModelForCausalLM)
    run, state = causal(model)
    kinds = ([], SHORT, [LONG] * 8, ["{", "[]", '{"text": 5}'])
    nodes = [Node(tmp_path / str(number), kind, tables={"models": [model]}) for number, kind in enumerate(kinds)]
    assert len({failure(node.ask("train", run, state=state)) for node in nodes}) == 1
