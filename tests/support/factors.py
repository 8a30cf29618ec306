"""Random factors for the tests of the rules: layers, rules, states, updates. Dense products are formed here only."""

import torch

from common.adapter.seeded import Seeded
from common.adapter.spec import Spec
from common.adapter.structures import stacked
from common.adapter.values import Key, LayerShape, State, Update
from common.config.run import RunConfig
from strategies import RULES, Recipe, Rule
from strategies.rules.fedkseed import FedKSeed
from strategies.rules.ravan import Ravan

# Non-square both ways, square, and a layer whose dimension equals the rank.
LAYERS = {"wide": LayerShape(5, 11), "tall": LayerShape(9, 4), "square": LayerShape(6, 6), "small": LayerShape(3, 7)}
HEAD_SHAPES = {Key("classifier", "W"): (2, 6), Key("classifier", "b"): (2,)}


# Every rule at its defaults, but with few enough heads and directions for small layers.
LAWFUL = {name: cls() for name, cls in RULES.items()} | {
    "ravan": Ravan(heads=2),
    "fedkseed": FedKSeed(adapter=Seeded(seeds=8)),
}
WIDE = {"l": LayerShape(320, 224)}


def spec(rule: Rule, rank: int = 3, scale: float = 2.0) -> Spec:
    """Layers of rank ``rank``, or of that rank a head."""
    return Spec(LAYERS, HEAD_SHAPES, rank * getattr(rule.structure, "blocks", 1), scale, rule.structure)


def recipe(rule: Rule, **task: str) -> Recipe:
    """A recipe of this rule; ``task`` are settings of the task, such as ``head="local"``."""
    return Recipe.around(rule, RunConfig.model_validate({"task": {"name": "classify", **task}}))


def initial(rule: Rule, spec: Spec, seed: int = 0) -> State:
    """The state before the first round."""
    return Recipe.around(rule).start(spec, seed)


def dense(state: State) -> dict[str, torch.Tensor]:
    """The whole update of every layer, as matrices."""
    factors = stacked(state)
    return {layer: factors[Key(layer, "B")].double() @ factors[Key(layer, "A")].double() for layer in LAYERS}


def trained(rule: Rule, state: State, seed: int, weight: float) -> Update:
    """What a node sends that started from its view of ``state`` and moved every trained tensor."""
    state = rule.view(state, state.rank)
    generator = torch.Generator().manual_seed(seed)
    local = {
        key: tensor + torch.randn(tensor.shape, generator=generator) if rule.trains(state.round, key) else tensor
        for key, tensor in state.adapter.items()
    }
    return Update(rule.send(state, local), weight, state.scale, state.slots)


def started(rule: Rule, rank: int = 3) -> State:
    """A state after one round, so that B is not zero and an offset may be there."""
    state = initial(rule, spec(rule, rank), seed=0)
    return rule.aggregate(state, [trained(rule, state, seed, 1.0) for seed in (1, 2)])


def after_a_round(rule: Rule, layers: dict[str, LayerShape], rank: int, nodes: int) -> State:
    """The state that the second round begins with."""
    state = initial(rule, Spec(layers, {}, rank, 2.0, rule.structure), seed=0)
    return rule.aggregate(state, [trained(rule, state, seed, 1.0) for seed in range(nodes)])


def matrices(update: Update, layer: str) -> torch.Tensor:
    return update.tensors[Key(layer, "B")].double() @ update.tensors[Key(layer, "A")].double()


def layer_of(rule, shares=(1.0, 2.0, 3.0), rank=3, shape=(20, 16)):
    """One layer, one round: the state, the updates, and the ideal update as a matrix."""
    state = initial(rule, Spec({"l": LayerShape(*shape)}, {}, rank, 0.5), seed=0)
    updates = [trained(rule, state, seed, share) for seed, share in enumerate(shares)]
    models = [{**state.adapter, **update.tensors} for update in updates]
    ideal = sum(
        share / sum(shares) * state.scale * model[Key("l", "B")].double() @ model[Key("l", "A")].double()
        for share, model in zip(shares, models, strict=True)
    )
    return state, updates, ideal


def product(state: State) -> torch.Tensor:
    factors = stacked(state)
    return factors[Key("l", "B")].double() @ factors[Key("l", "A")].double()
