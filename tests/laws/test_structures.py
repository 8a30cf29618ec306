"""Laws that every structure obeys in a model: PEFT loads what it computes, and every example has its gradient."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from torch import nn

from common.adapter.core import Core
from common.adapter.dylora import NestedDown
from common.adapter.spec import Spec
from common.adapter.structures import STRUCTURES, stacked
from common.adapter.values import HEAD, Key, LayerShape, State
from common.config.run import RunConfig
from common.error import BouquetError
from common.record.export import export
from strategies import Recipe, Rule
from strategies.inits import INITS
from strategies.meter import aggregation_error
from strategies.rules import FedIT, FedSB
from tests.laws.test_axes import NEEDED
from tests.support.factors import LAYERS, trained
from tests.support.private_steps import EXAMPLES, TEXT, brute_force, clipped_sum, embedded, fresh, relative


def fits(flat: dict[str, str], name: str) -> bool:
    """Whether choices go together; where they do not, the refusal names one of them."""
    try:
        Recipe.read(flat)
    except BouquetError as error:
        if name not in str(error):
            raise
        return False
    return True


structures = pytest.mark.parametrize("name", STRUCTURES)
SLOTS = 8


def over(name: str) -> FedIT:
    return FedIT(adapter=STRUCTURES[name]())


def started(rule: Rule, init: str, rank: int = 4) -> State:
    generator = torch.Generator().manual_seed(0)
    seen = {layer: torch.randn(shape, generator=generator) for layer, shape in LAYERS.items()}
    recipe = replace(Recipe.around(rule), init=INITS[init](**NEEDED.get(init, {})))
    return recipe.start(Spec(LAYERS, {}, rank, 2.0, rule.structure), 0, seen.__getitem__)


@structures
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_plain_peft_computes_what_the_model_computes(name, quantization, tmp_path):
    model = fresh(quantization, rank=4, structure=STRUCTURES[name]())
    model.network.eval()
    adapter = {key: tensor for key, tensor in model.tensors().items() if key.part not in HEAD}
    adapter |= {key: torch.ones_like(tensor) for key, tensor in adapter.items() if key.part == "s"}
    state = State(adapter, model.pairs()[0].scale)
    model.install(state.adapter, state.scale, {})
    export(state, RunConfig(), tmp_path, with_head=True)
    batch = TEXT.collate(EXAMPLES[:3], model.pad)
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    bare = deepcopy(embedded(quantization)).eval()
    with torch.no_grad():
        base = bare(**inputs).logits
        expected = PeftModel.from_pretrained(bare, str(tmp_path)).eval()(**inputs).logits
        torch.testing.assert_close(model.logits(batch), expected, rtol=1e-4, atol=3e-4)
    assert float((expected - base).abs().max()) > 3e-3


@pytest.mark.parametrize("name", [name for name, kind in STRUCTURES.items() if kind.trained - kind.loose])
def test_the_clipped_sum_is_that_of_a_loop_over_the_examples(name):
    structure = STRUCTURES[name]()
    model = fresh("none", rank=4, structure=structure)
    model.train_only([key for key in model.keys if key.part in structure.trained - structure.loose])
    parameters = [parameter for parameter in model.network.parameters() if parameter.requires_grad]
    rows = brute_force(model, parameters, EXAMPLES)
    norms = rows.norm(dim=1)
    bound = float(norms.median())
    expected = (rows * (bound / norms).clamp(max=1.0)[:, None]).sum(0)
    assert relative(clipped_sum(model, EXAMPLES, "fast", bound), expected) < 1e-5


@structures
@pytest.mark.parametrize("init", INITS)
def test_it_starts_at_the_base_model_whatever_the_init_or_is_refused(name, init):
    flat = {"adapter.name": name, "init.name": init} | {
        f"init.{init}.{key}": value for key, value in NEEDED.get(init, {}).items()
    }
    if not fits(flat, init):
        return
    recipe = Recipe.read(flat)
    state = started(recipe.rule, init, rank=2)
    factors = stacked(state)
    for layer in LAYERS:
        update = factors[Key(layer, "B")] @ factors[Key(layer, "A")]
        assert bool(update.abs().max() > 1e-5) == recipe.init.moves
        assert any(factor.any() for factor in recipe.structure.factors(state.adapter, layer)), "it would never learn"


@structures
def test_a_mean_is_exact_where_the_update_is_linear_in_what_is_trained(name):
    rule = over(name)
    state = started(rule, rule.start_at)
    updates = [trained(rule, state, seed, 1.0 + seed) for seed in range(3)]
    error = aggregation_error(rule, state, updates, rule.aggregate(state, updates))[""]
    assert rule.exact == (error < 1e-5)
    assert rule.exact == (rule.structure.trained in rule.structure.linear_in)


def test_one_core_under_fedit_is_fed_sb():
    fedit, fed_sb = FedIT(adapter=Core()), FedSB()
    state = started(fedit, "orthonormal")
    updates = [trained(fed_sb, state, seed, 1.0) for seed in range(3)]
    one, other = fedit.aggregate(state, updates), fed_sb.aggregate(state, updates)
    assert all(torch.equal(one.adapter[key], other.adapter[key]) for key in one.adapter)
    assert (fedit.start_at, fedit.rate) == (fed_sb.start_at, fed_sb.rate)


@pytest.mark.parametrize(
    ("name", "values"),
    [("core", 16), ("loldu", 4), ("vera", 4 + 9), ("nlora", 4 * (9 + 4) + 16), ("randlora", 4 * 4), ("ia3", 9)],
)
def test_a_node_sends_the_formulas_number_of_values(name, values):
    rule = over(name)
    state = Recipe.around(rule).start(Spec({"l": LayerShape(9, 4)}, {}, 4, 2.0, rule.structure), 0)
    sent = trained(rule, state, 0, 1.0).tensors
    assert sum(tensor.numel() for tensor in sent.values()) == values


def nested(slots: int) -> NestedDown:
    down = NestedDown(nn.Linear(6, SLOTS, bias=False))
    down.slots.fill_(slots)
    return down


def test_only_the_leading_slots_of_dylora_learn_in_a_step():
    down, up = nested(3), nn.Linear(SLOTS, 5, bias=False)
    up(down(torch.randn(2, 6))).square().sum().backward()
    assert down.down.weight.grad[:3].all()
    assert up.weight.grad[:, :3].all()
    assert not down.down.weight.grad[3:].any()
    assert not up.weight.grad[:, 3:].any()
    down.eval()
    assert down(torch.randn(2, 6)).all()


def test_all_slots_of_dylora_are_drawn():
    structure, layer = STRUCTURES["dylora"](), nn.Module()
    layer.lora_A = {"default": nested(1)}
    drawn = set()
    for draw in range(1000, 1000 + SLOTS):
        structure.step(layer, draw)
        drawn.add(int(layer.lora_A["default"].slots))
    assert drawn == set(range(1, SLOTS + 1))


def test_a_quarter_of_dylora_is_better_than_a_quarter_of_a_lora():
    """Least squares towards a matrix of the whole rank, by the same steps."""
    target = torch.randn(20, 6, generator=torch.Generator().manual_seed(0)) @ torch.diag(0.7 ** torch.arange(6.0))

    @torch.no_grad()
    def missed(down: NestedDown, up: nn.Linear, slots: int) -> float:
        return float((up.weight[:, :slots] @ down.down.weight[:slots] - target).square().sum())

    quarters, wholes = [], []
    for drawn in (True, False):
        torch.manual_seed(1)
        down, up = nested(SLOTS), nn.Linear(SLOTS, 20, bias=False)
        optimizer = torch.optim.Adam([down.down.weight, up.weight], lr=0.02)
        for step in range(600):
            down.slots.fill_(1 + step * 5 % SLOTS if drawn else SLOTS)
            optimizer.zero_grad()
            (up(down(torch.eye(6))).T - target).square().sum().backward()
            optimizer.step()
        quarters.append(missed(down, up, SLOTS // 4))
        wholes.append(missed(down, up, SLOTS))
    assert quarters[0] < 0.5 * quarters[1]
    assert max(wholes) < 0.01 * float(target.square().sum())
