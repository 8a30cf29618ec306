"""Laws that every member of every axis obeys."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.adapter.spec import Spec
from common.adapter.structure import Pair
from common.adapter.structures import STRUCTURES, stacked
from common.adapter.values import HEAD, Key, LayerShape, State
from common.config.section import ConfigError
from common.error import BouquetError, did_you_mean
from common.method import AUTO, GIVEN, Method, Registry
from strategies import AXES, RULES, Recipe, read_config
from strategies.inits import INITS, Init, PublicInit
from strategies.keeps import KEEPS
from strategies.means import MEANS
from strategies.objectives import OBJECTIVES
from strategies.optimizers import OPTIMIZERS, Group
from strategies.registries import defaults
from strategies.server_optimizers import SERVER_OPTIMIZERS
from tests.support.factors import HEAD_SHAPES, LAWFUL, LAYERS

# What a member cannot do without, and has no default that works.
NEEDED = {name: {"source": "/public.jsonl"} for name, init in INITS.items() if issubclass(init, PublicInit)}
# Other values of the hyperparameters that are words.
WORDS = {"start": "nodes", "solver": "cosine", "source": "/other.jsonl"}

MEMBERS = [(axis, name) for axis in AXES for name in axis]
axes = pytest.mark.parametrize("axis", AXES, ids=[axis.section for axis in AXES])
members = pytest.mark.parametrize(("axis", "name"), MEMBERS, ids=[f"{axis.section}, {name}" for axis, name in MEMBERS])


def built(axis: Registry[Any], name: str, **options: Any) -> Any:
    return axis[name](**NEEDED.get(name, {}) | options)


def others(key: str, value: Any) -> list[Any]:
    """Values of a hyperparameter beside its default, of which one at least is in range."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, str):
        return [WORDS[key]]
    return [value + 1, value - 1] if isinstance(value, int) else [value / 2 or 0.125, value + 0.25]


def valid(make: Callable[[Any], Method], values: Iterable[Any]) -> Any:
    for value in values:
        try:
            make(value)
        except BouquetError:
            continue
        return value
    raise AssertionError("no other value is in range")


@members
def test_a_member_says_what_it_is(axis, name):
    member = axis[name]
    assert member.name == name
    assert member.section == axis.section
    assert member.paper == "none" or member.paper.startswith("arXiv:")
    assert (member.__doc__ or "").strip()
    assert axis.default in {*axis, AUTO}


@members
def test_every_field_is_a_config_key_and_comes_back_from_it(axis, name):
    default = built(axis, name)
    own = {field.name for field in fields(default) if GIVEN not in field.metadata}
    options = axis[name].options()
    assert {key.replace("-", "_") for key in options} == own - {"mean", "optimizer"}
    assert {f"{axis.section}.{name}.{key}": value for key, value in options.items()}.items() <= axis.defaults().items()
    for key, value in options.items():
        field = key.replace("-", "_")
        other = valid(lambda value, field=field: built(axis, name, **{field: value}), others(key, value))
        flat = {f"{axis.section}.{name}.{given}": text for given, text in NEEDED.get(name, {}).items()}
        read = read_config(flat | {f"{axis.section}.{name}.{key}": other})
        assert read_config(read.to_flower()) == read
        assert axis.build(read.methods, name) == replace(default, **{field: other}) != default


@members
def test_its_defaults_build_or_it_says_what_it_needs(axis, name):
    if name not in NEEDED:
        assert axis.build(defaults(), name) == axis[name]()
        return
    (key,) = NEEDED[name]
    with pytest.raises(BouquetError, match=rf"out of range \({axis.section}.{name}.{key}\): expected a file"):
        axis.build(defaults(), name)


@members
def test_a_slip_of_the_pen_is_answered_with_the_name(axis, name):
    wrong = f"{name}q"
    (mistake,) = axis.mistakes({f"{axis.section}.name": wrong})
    assert mistake.endswith(did_you_mean(wrong, axis))
    assert f"got {wrong!r}" in mistake
    for key in axis[name].options():
        slip = f"{axis.section}.{name}.{key}q"
        assert axis.mistakes({slip: 1}) == [f"{slip}: unknown key. Did you mean '{axis.section}.{name}.{key}'?"]


def test_the_mistakes_on_all_axes_are_told_at_once():
    flat = {f"{axis.section}.name": "nobody" for axis in AXES} | {f"{axis.section}.nothing": 1 for axis in AXES}
    with pytest.raises(ConfigError) as caught:
        read_config(flat | {"lora.rank": 0})
    assert len(caught.value.mistakes) == 2 * len(AXES) + 1
    for axis in AXES:
        assert sum(mistake.startswith(f"{axis.section}.") for mistake in caught.value.mistakes) == 2


def test_two_members_of_one_name_are_refused():
    class Other(OPTIMIZERS["adamw"]):
        """Of the same name."""

    said = r"two members with the same name .*: expected a unique name for each, got 'adamw' of AdamW and of .*Other"
    with pytest.raises(BouquetError, match=said):
        Registry("optimizer", OPTIMIZERS["adamw"], Other, default="adamw", chooses="")


@axes
def test_no_two_axes_share_a_key(axis):
    assert not axis.defaults().keys() & {key for other in AXES if other is not axis for key in other.defaults()}


def fitting(init: type[Init]) -> Iterator[tuple[str, Recipe]]:
    """The recipes of every rule that this init goes with."""
    for name in RULES:
        flat = {"rule.name": name, "init.name": init.name, "rule.ravan.heads": 2}
        flat |= {f"init.{init.name}.{key}": value for key, value in NEEDED.get(init.name, {}).items()}
        try:
            yield name, Recipe.read(flat)
        except BouquetError:
            continue


@pytest.mark.parametrize("name", INITS)
def test_a_start_is_the_base_model_unless_it_is_meant_to_move(name):
    tried = 0
    for _, recipe in fitting(INITS[name]):
        generator = torch.Generator().manual_seed(0)
        seen = {layer: torch.randn(shape, generator=generator) for layer, shape in LAYERS.items()}
        for rank in (2, 4):
            state = recipe.start(Spec(LAYERS, HEAD_SHAPES, rank, 2.0, recipe.structure), 0, seen.__getitem__)
            factors = stacked(state)
            for layer in LAYERS:
                update = factors[Key(layer, "B")] @ factors[Key(layer, "A")]
                assert bool(update.abs().max() > 1e-6) == recipe.init.moves
        tried += 1
    assert tried


@pytest.mark.parametrize("name", INITS)
def test_a_start_fits_its_layer_and_is_the_seeds_alone(name):
    init, layer = built(INITS, name), LayerShape(7, 5)
    seen = torch.randn(layer, generator=torch.Generator().manual_seed(0)) if init.sees != "nothing" else None
    one, two = (init.factors(layer, 3, torch.Generator().manual_seed(1), seen) for _ in range(2))
    assert (one.b.shape, one.a.shape) == ((7, 3), (3, 5))
    assert one.core is None or one.core.shape == (3, 3)
    assert all(torch.equal(*pair) for pair in zip(one, two, strict=True) if pair[0] is not None)
    if init.orthonormal:
        torch.testing.assert_close(one.a @ one.a.T, torch.eye(3), rtol=0, atol=1e-5)
        torch.testing.assert_close(one.b.T @ one.b, torch.eye(3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_layers_update_is_linear_in_what_is_said_to_be(name):
    structure = built(STRUCTURES, name)
    generator = torch.Generator().manual_seed(0)
    shape, rank = LayerShape(7, 5), 4

    def draw() -> dict[Key, Tensor]:
        sizes = Spec({"l": shape}, {}, rank, 1.0, structure).factor_shapes()
        return {
            key: torch.ones(size) if key.part == "s" else torch.randn(size, generator=generator)
            for key, size in sizes.items()
        }

    def update(tensors: dict[Key, Tensor]) -> Tensor:
        factors = stacked(State(tensors, 2.0))
        return factors[Key("l", "B")] @ factors[Key("l", "A")]

    one, two = draw(), draw()
    assert {key.part for key in one} == structure.parts
    for parts in structure.linear_in:
        both = {key: (one[key] + 3 * two[key]) / 4 if key.part in parts else one[key] for key in one}
        other = {key: two[key] if key.part in parts else one[key] for key in one}
        torch.testing.assert_close(update(both), (update(one) + 3 * update(other)) / 4, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("frozen", ["", "A", "B"])
def test_an_optimizer_lowers_a_quadratic(name, frozen):
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(8, 6, generator=generator)
    b, a, head = (nn.Parameter(torch.randn(size, generator=generator)) for size in ((8, 3), (3, 6), (4,)))
    for part, factor in (("A", a), ("B", b)):
        factor.requires_grad_(part != frozen)
    trained = [factor for factor in (b, a) if factor.requires_grad]
    optimizer = built(OPTIMIZERS, name).build([Pair(b, a, 2.0)], Group(trained, 0.01), Group([head], 0.02))
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = (2.0 * b @ a - target).square().sum() + head.square().sum()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < losses[50] < losses[0]
    assert losses[-1] < 0.9 * losses[0]
    # The head has its own rate, and a step of Adam's is as long as that at first.
    assert [group["lr"] for group in optimizer.param_groups][-1] == 0.02


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_leaves_where_it_stands_and_pulls_to_where_it_came_from(name):
    objective = built(OBJECTIVES, name)
    w = nn.Parameter(torch.tensor([3.0, -1.0]))

    def compute() -> tuple[float, int]:
        w.grad = w.detach().clone()
        return 1.0, 2

    _, tokens = objective.gradients(compute, [w])
    assert tokens == 2 * objective.passes
    assert torch.equal(w.detach(), torch.tensor([3.0, -1.0]))
    before, start = w.grad.clone(), torch.zeros(2)
    objective.add([w], [start], [objective.first(start)])
    assert ((w.grad - before) * w.detach()).sum() >= 0
    again = w.grad.clone()
    here = w.detach().clone()
    objective.add([w], [here], [objective.first(here)])
    torch.testing.assert_close(w.grad, again)
    kept = objective.remember([w], [start], [objective.first(start)])
    assert bool(kept[0].any()) == objective.remembers
    assert torch.equal(objective.sent(w.detach(), torch.zeros(2)), w.detach())


@pytest.mark.parametrize("rule", LAWFUL.values(), ids=list(LAWFUL))
@pytest.mark.parametrize("name", KEEPS)
@pytest.mark.parametrize("head", ["shared", "local", "frozen"])
def test_what_is_kept_is_never_sent(rule, name, head):
    config = read_config({"rule.name": rule.name, "task.name": "classify", "task.head": head})
    recipe = replace(Recipe.around(rule, config), keeps=(KEEPS[name](),))
    state = recipe.start(Spec(LAYERS, HEAD_SHAPES, 4, 2.0, rule.structure), 0)
    local = {key: tensor + 1 for key, tensor in state.adapter.items()}
    kept = recipe.kept(state, local)
    sent = {key for key in state.adapter if recipe.sends(state.round, key)}
    assert not kept.keys() & sent
    assert not kept.keys() & recipe.send(state, local).keys()
    assert all(recipe.trains(state.round, key) and KEEPS[name]().keeps(key) for key in kept)
    # And it is where the node starts from next time, over whatever comes.
    installed = recipe.install(state, kept)
    for key in state.adapter:
        assert torch.equal(installed[key], kept.get(key, state.adapter[key]))
    assert head != "frozen" or not any(key.part in HEAD for key in kept)


@pytest.mark.parametrize("name", MEANS)
def test_a_mean_of_equals_is_what_they_are_and_the_order_does_not_matter(name):
    mean, key, state = built(MEANS, name), Key("l", "B"), State({}, 1.0)
    generator = torch.Generator().manual_seed(0)
    nodes = [(1.0 + number, {key: torch.randn(3, 2, generator=generator)}) for number in range(6)]
    same, _ = mean(state, [(weight, nodes[0][1]) for weight, _ in nodes])
    assert torch.equal(same[key], nodes[0][1][key])
    one, two = (mean(state, iter(order))[0][key] for order in (nodes, nodes[::-1]))
    torch.testing.assert_close(one, two)
    stack = torch.stack([tensors[key] for _, tensors in nodes])
    assert ((stack.min(0).values <= one) & (one <= stack.max(0).values)).all()


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_a_server_optimizer_comes_to_a_mean_that_stays_and_stays_there(name):
    optimizer, key = built(SERVER_OPTIMIZERS, name), Key("l", "B")
    state = State({key: torch.zeros(2), Key("l", "A"): torch.ones(2)}, 1.0)
    goal = {key: torch.tensor([0.05, -0.02])}
    for _ in range(400):
        state = optimizer.step(state, goal)
    torch.testing.assert_close(state.adapter[key], goal[key], rtol=0, atol=2e-3)
    assert torch.equal(state.adapter[Key("l", "A")], torch.ones(2))
