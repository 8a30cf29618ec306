"""Per-example clipping: equal to a loop over the examples, to Opacus, and bounded by C whatever is added."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from common import tasks
from common.adapter.core import Core
from common.config.run import RunConfig
from common.error import BouquetError
from common.models import adapted
from common.tasks import Example
from tests.support.architectures import tiny_bert
from tests.support.private_steps import (
    ENGINES,
    EXAMPLES,
    LORA,
    TEXT,
    add,
    attach,
    brute_force,
    clipped_sum,
    fresh,
    relative,
    scattered,
)


@pytest.mark.parametrize(
    ("engine", "quantization", "rank", "parts", "checkpointing"),
    [
        ("fast", "none", 8, "AB", None),
        ("fast", "nf4", 8, "AB", None),
        ("fast", "int8", 8, "AB", None),
        ("fast", "nf4", 8, "B", None),
        ("fast", "nf4", 8, "A", None),
        ("fast", "nf4", 64, "AB", None),
        ("fast", "nf4", 8, "AB", "reentrant"),
        ("fast", "nf4", 8, "AB", "non-reentrant"),
        ("fast", "nf4", 8, "R", None),
        ("hooks", "nf4", 8, "R", None),
        ("hooks", "nf4", 8, "AB", None),
    ],
)
def test_the_clipped_sum_is_that_of_a_loop_over_the_examples(engine, quantization, rank, parts, checkpointing):
    model = fresh(quantization, rank, checkpointing, Core(blocks=2) if parts == "R" else LORA)
    parameters = model.train_only([key for key in model.keys if key.part in parts])
    rows = brute_force(model, parameters, EXAMPLES)
    norms = rows.norm(dim=1)
    bound = float(norms.median())
    expected = (rows * (bound / norms).clamp(max=1.0)[:, None]).sum(0)
    assert relative(clipped_sum(model, EXAMPLES, engine, bound), expected) < 1e-5
    expected = (rows * (bound / (norms + 0.01))[:, None]).sum(0)
    assert relative(clipped_sum(model, EXAMPLES, engine, bound, "automatic"), expected) < 1e-5


@pytest.mark.parametrize("pooling", ["default", "mean"])
def test_a_head_and_its_bias_are_clipped_with_the_rest(pooling, tmp_path):
    settings = {"model.name": tiny_bert(tmp_path), "model.pooling": pooling, "task.name": "classify"}
    config = RunConfig.from_flower(settings | {"lora.targets": "query,value"})
    model = scattered(adapted.load(config.model, config.lora, config.task, "cpu"))
    for module in model.network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    task = tasks.build(config.task)
    examples = [Example(list(range(3 + i, 9 + 3 * i)), [i % 2]) for i in range(7)]
    rows = brute_force(model, model.train_only(model.keys), examples, task)
    bound = float(rows.norm(dim=1).median())
    expected = (rows * (bound / rows.norm(dim=1)).clamp(max=1.0)[:, None]).sum(0)
    assert relative(clipped_sum(model, examples, "fast", bound, task=task), expected) < 1e-5


def test_one_more_example_moves_the_sum_by_at_most_c():
    model = fresh()
    model.train_only(model.keys)
    bound, generator = 0.5, torch.Generator().manual_seed(0)
    others = [[], EXAMPLES[:1], EXAMPLES[:3], EXAMPLES]
    for number in range(12):
        tokens = torch.randint(3, 2000, (1 + 5 * number,), generator=generator).tolist()
        one_more = Example([1, *tokens], [1, *tokens])
        data = others[number % len(others)]
        without = clipped_sum(model, data, "fast", bound)
        # In front, so that every physical batch is another.
        moved = clipped_sum(model, [one_more, *data], "fast", bound) - without
        assert float(moved.norm()) <= bound * (1 + 1e-5)
    assert float(moved.norm()) > 0.9 * bound


def test_the_usual_loss_of_a_batch_would_move_it_by_more():
    """The mean over all tokens of a batch: one long example more changes what every other one contributes."""
    model = fresh()
    model.train_only(model.keys)
    bound = 8.0
    short = [Example(example.tokens[:4], example.labels[:4]) for example in EXAMPLES for _ in range(3)]
    long = Example([1, *range(5, 120)], [1, *range(5, 120)])

    def total(examples):
        """As Opacus is used with a model's own loss: the batch's mean times the number of examples."""
        with attach("fast", model.network, bound) as engine:
            counts = torch.tensor([len(example.labels) - 1 for example in examples])
            add(engine, model, examples, factors=counts / counts.sum() * len(examples))
            return torch.cat([tensor.flatten() for tensor in engine.take().values()])

    assert float((total([*short, long]) - total(short)).norm()) > 3 * bound
    ours = clipped_sum(model, [*short, long], "fast", bound) - clipped_sum(model, short, "fast", bound)
    assert float(ours.norm()) <= bound * (1 + 1e-5)


@pytest.mark.parametrize("engine", ["fast", "hooks"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_example_that_is_not_finite_counts_as_zero(engine, value):
    model = fresh()
    model.train_only(model.keys)
    with attach(engine, model.network, 1.0) as attached:
        add(attached, model, EXAMPLES, factors=torch.tensor([1, 1, value, 1, 1, 1, 1]))
        got = torch.cat([tensor.flatten() for tensor in attached.take().values()])
    others = EXAMPLES[:2] + EXAMPLES[3:]
    assert relative(got, clipped_sum(model, others, "fast", 1.0)) < 1e-5


def test_a_layer_that_is_used_twice_has_one_gradient():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(torch.tanh(self.layer(x)))

    torch.manual_seed(0)
    network, x = Twice(), torch.randn(6, 5, 4)
    parameters = list(network.parameters())

    def each(inputs):
        output = network(inputs)
        return mse_loss(output, torch.zeros_like(output), reduction="none").mean((1, 2))

    rows = torch.stack(
        [torch.cat([g.flatten() for g in torch.autograd.grad(each(x[i : i + 1]).sum(), parameters)]) for i in range(6)]
    )
    bound = float(rows.norm(dim=1).median())
    expected = (rows * (bound / rows.norm(dim=1)).clamp(max=1.0)[:, None]).sum(0)
    with attach("fast", network, bound) as engine:
        engine.add(each(x))
        assert relative(torch.cat([t.flatten() for t in engine.take().values()]), expected) < 1e-5


def test_a_layer_that_is_not_linear_is_refused():
    network = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4))
    with pytest.raises(
        BouquetError,
        match=r"not a plain linear layer \(0\): expected torch.nn.Linear, or a structure's diagonal, got .*Embedding",
    ):
        attach("fast", network, 1.0)


def test_int8_chooses_no_columns_over_a_batch():
    model = fresh("int8")
    thresholds = lambda: {m.state.threshold for m in model.network.modules() if hasattr(m, "state")}  # noqa: E731
    assert thresholds() == {6.0}
    model.train_only(model.keys)
    with attach("fast", model.network, 1.0):
        assert thresholds() == {0.0}


def test_a_layer_that_folds_examples_together_is_refused():
    layer = nn.Linear(4, 2)
    with attach("fast", layer, 1.0) as engine:
        output = layer(torch.randn(6, 4))
        with pytest.raises(BouquetError, match=r"does not see one row an example: expected an input of 3 x ... x 4"):
            engine.add(output.view(3, 2, 2).sum((1, 2)))


def test_a_layer_that_folds_examples_together_is_refused_with_opacus_too():
    layer = nn.Linear(4, 2)
    with attach("hooks", layer, 1.0) as engine:
        output = layer(torch.randn(6, 4))
        with pytest.raises(BouquetError, match=r"does not see one row an example: expected gradients of 3 examples"):
            engine.add(output.view(3, 2, 2).sum((1, 2)))


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_are_not_taken_for_the_sequences_that_should_be_there(engine):
    layer = nn.Linear(4, 2)
    message = r"expected an input of N x T x d, got shape \(3, 4\)"
    with attach(engine, layer, 1.0, sequences=True), pytest.raises(BouquetError, match=message):
        layer(torch.randn(3, 4))
    assert layer(torch.randn(3, 4)).shape == (3, 2)


@pytest.mark.parametrize("engine", ENGINES)
def test_freezing_or_unfreezing_after_the_engine_is_attached_is_refused(engine):
    message = r"1 trainable parameters without a per-example gradient, such as .*lora_A.default.weight"
    for start, late in ((False, True), (True, False)):
        model = fresh()
        model.train_only(model.keys)
        parameter = model.parameters(model.keys[0])[0]
        parameter.requires_grad_(start)
        with attach(engine, model.network, 1.0) as attached:
            parameter.requires_grad_(late)
            with pytest.raises(BouquetError, match=message):
                add(attached, model, EXAMPLES[:2])


def test_a_trainable_layer_that_takes_no_part_is_refused():
    network = nn.ModuleDict({"used": nn.Linear(4, 4), "unused": nn.Linear(4, 4)})
    with attach("fast", network, 1.0) as engine, pytest.raises(BouquetError, match=r"2 trainable .*unused.bias"):
        engine.add(network["used"](torch.randn(3, 4)).sum(1))


def test_opacus_with_gradient_checkpointing_is_refused():
    model = fresh(checkpointing="non-reentrant")
    model.train_only(model.keys)
    with pytest.raises(BouquetError, match=r"\(gradient.name\): expected 'fast', or model.gradient-checkpointing"):
        attach("hooks", model.network, 1.0)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_network_is_left_as_it_was(engine):
    model = fresh()
    parameters = model.train_only(model.keys)
    before = [set(vars(module)) for module in model.network.modules()]
    clipped_sum(model, EXAMPLES, engine, 1.0)
    model.network.zero_grad(set_to_none=True)
    assert not [p for p in parameters if hasattr(p, "grad_sample") or p.grad is not None]
    TEXT.loss(model.outputs(TEXT.collate(EXAMPLES, 0))).backward()
    assert all(p.grad is not None for p in parameters)
    if engine == "fast":
        assert [set(vars(module)) for module in model.network.modules()] == before


def test_nothing_added_is_zero_and_a_sum_is_taken_once():
    model = fresh()
    parameters = model.train_only(model.keys)
    with attach("fast", model.network, 1.0) as engine:
        assert not any(tensor.any() for tensor in engine.take().values())
        add(engine, model, EXAMPLES[:2])
        assert all(tensor.dtype == torch.float64 for tensor in engine.take().values())
        assert list(engine.take()) == parameters
        assert not any(tensor.any() for tensor in engine.take().values())


def test_without_a_bound_the_sum_is_the_ordinary_gradient_to_the_bit():
    model = fresh()
    parameters = model.train_only(model.keys)
    examples = [Example([1, *range(10 + i, 42 + i)], [1, *range(10 + i, 42 + i)]) for i in range(8)]
    batch = TEXT.collate(examples, 0)
    TEXT.loss(model.outputs(batch)).backward()
    ordinary = [parameter.grad.clone() for parameter in parameters]
    for bound, exact in ((math.inf, True), (1e9, False)):
        with attach("fast", model.network, bound) as engine:
            add(engine, model, examples)
            got = [(tensor / 8).float() for tensor in engine.take().values()]
        for one, other in zip(got, ordinary, strict=True):
            assert torch.equal(one, other) if exact else relative(one, other) < 1e-6
