"""``docs/methods.md``: what can be chosen beside a rule, and what goes with what, found by building the recipes."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from common import readable
from common.adapter.spec import Spec
from common.adapter.structure import LORA
from common.adapter.structures import STRUCTURES
from common.adapter.values import LayerShape
from common.error import BouquetError
from common.method import Registry
from deploy.command import EXAMPLE, rules_table
from deploy.config.catalogue import summary
from docs.generate.text import code, paper, prose, table
from strategies import RULES, Recipe
from strategies.cost import planned_bytes
from strategies.inits import INITS, PublicInit
from strategies.objectives import OBJECTIVES, Objective
from strategies.optimizers import OPTIMIZERS, Optimizer

OTHERS = " and ".join(f"`{name}` ({kind.form})" for name, kind in STRUCTURES.items() if kind.form != LORA)
"""The structures that PEFT keeps as something else."""
NOT_IN_INT8 = " and ".join(f"`{name}`" for name, kind in STRUCTURES.items() if "int8" in kind.unloadable)

OPENING = f"""# Methods

A run chooses one member on each axis: `rule.name=ffa-lora adapter.name=dylora init.name=eva`. Which choices
are compatible is found here by building every pair; where two clash, a run is refused by name before it starts. Every
choice supports a base in NF4 or unquantised, all but {NOT_IN_INT8} one in int8; can be resumed; and exports an adapter
that plain PEFT loads, which is one LoRA for every structure but {OTHERS}. `tests/laws/test_composition.py` runs each
over NF4, private, and resumed. When to choose which is in [choosing.md](choosing.md), every option in
[config.md](config.md). This page is generated from the code, by `make generate`.

Bytes are for a layer of {EXAMPLE[0]} x {EXAMPLE[0]} at rank {EXAMPLE[1]}, in float32, from one node in one round."""

PRIVACY: Mapping[str, str] = {"example": "example", "local": "update-local", "central": "update-central"}
SEEN: Mapping[str, str] = {
    "nothing": "",
    "weights": "the base's weights",
    "inputs": "public examples, forward",
    "gradients": "public examples, forward and backward",
}
"""What an init has to see, in words."""
NOT_BUILT: Mapping[str, tuple[str, str]] = {
    "FLoRG": (
        "arXiv:2602.17095",
        "An update A^T A has no negative direction, so that none can be taken back; of a mean with more directions "
        "than slots nodes get those next to the old A, not the largest; and noise on A, squared, is a bias.",
    ),
    "FLoRA-NA": (
        "arXiv:2509.26399",
        "The nearest factors are those of an SVD of all nodes' factors together, which is `flexlora`, and the cheaper "
        "thing to compute: no combination of the nodes' own comes nearer.",
    ),
    "FedSmoothLoRA": (
        "arXiv:2605.29460",
        "With zeta = 1 a node starts a round where it ended its last one, and every node trains alone for ever. Below "
        "that it still looks at a gradient of private data before each round, which no privacy counts.",
    ),
    "Bristle": (
        "arXiv:2110.11006",
        "Known to us by its summary alone. It weighs nodes by how well each does on test examples of every class, such "
        "as the server of a language model seldom has; `mean.name` has what bounds a hostile node without them.",
    ),
    "PreLort": (
        "arXiv:2606.15963",
        "Known to us by its summary alone, of which `rule.name=raflora adapter.name=dylora` has both halves.",
    ),
    "FedPower": (
        "arXiv:2605.08443",
        "Known to us by its summary alone. It factors a mean and puts noise on one factor; the other is data, too, and "
        "whether it is noised decides about the privacy.",
    ),
}
"""Rules that are left out: the paper, and why."""


def methods(_: str) -> str:
    """The whole page."""
    rules = ["## Rules: `rule.name`", rules_table()]
    return "\n\n".join([OPENING, *rules, *_structures(), *_inits(), *_nodes(), *_not_built()]) + "\n"


def _structures() -> Iterator[str]:
    yield "## Structures: `adapter.name`"
    yield prose(STRUCTURES.chooses)
    rows = [
        [*_about(STRUCTURES, name), _bytes(name), _rules(STRUCTURES, name), _privacy(STRUCTURES, name)]
        for name in STRUCTURES
    ]
    yield table(["", "what it is", "paper", "bytes up", "rules", "privacy"], rows)


def _inits() -> Iterator[str]:
    yield "## Starts: `init.name`"
    yield (
        "A start that has to see something is computed by the coordinator, and sent to each node once. Whatever it "
        "adds to the base model is subtracted again by the offset, except for `lora-sb`, which is a first step."
    )
    rows = [
        [*_about(INITS, name), SEEN[kind.sees], _rules(INITS, name), _among(INITS, name, STRUCTURES)]
        for name, kind in INITS.items()
    ]
    yield table(["", "where it starts", "paper", "sees", "rules", "structures under `fedit`"], rows)


def _nodes() -> Iterator[str]:
    for title, axis in (("Optimizers: `optimizer.name`", OPTIMIZERS), ("Objectives: `objective.name`", OBJECTIVES)):
        yield f"## {title}"
        yield prose(axis.chooses)
        rows = [
            [*_about(axis, name), _rules(axis, name), _among(axis, name, STRUCTURES), _privacy(axis, name)]
            for name in axis
        ]
        yield table(["", "what it does", "paper", "rules", "structures under `fedit`", "privacy"], rows)


def _not_built() -> Iterator[str]:
    yield "## Not built"
    yield "Rules that are left out, and why. `tests/oracles/test_counter_examples.py` has those of the first three."
    yield table(["", "paper", "why not"], [[name, paper(number), why] for name, (number, why) in NOT_BUILT.items()])


def _about(axis: Registry[Any], name: str) -> list[str]:
    kind = axis[name]
    return [code(name), prose(summary(kind)), paper(kind.paper)]


def _choice(axis: Registry[Any], name: str) -> dict[str, Any]:
    """The settings that choose a member, with a file, an adapter or noise where it cannot do without."""
    kind, beside = axis[name], dict[str, Any]()
    if issubclass(kind, PublicInit):
        beside = {f"init.{name}.source": "public.jsonl"}
    if issubclass(kind, Objective) and kind.over:
        beside = {"model.adapter": "/adapters/earlier"}
    if issubclass(kind, Optimizer) and kind.denoises:
        beside = {"privacy.mode": PRIVACY["example"], "train.weighting": "uniform"}
    return {f"{axis.section}.name": name, **beside}


def _fits(*settings: Mapping[str, Any]) -> bool:
    try:
        Recipe.read({key: value for part in settings for key, value in part.items()})
    except BouquetError:
        return False
    return True


def _rules(axis: Registry[Any], name: str) -> str:
    return _named([rule for rule in RULES if _fits(_choice(axis, name), {"rule.name": rule})], RULES)


def _among(axis: Registry[Any], name: str, others: Registry[Any]) -> str:
    return _named([other for other in others if _fits(_choice(axis, name), _choice(others, other))], others)


def _privacy(axis: Registry[Any], name: str) -> str:
    private = {"train.weighting": "uniform"}
    fitting = [word for word, mode in PRIVACY.items() if _fits(_choice(axis, name), private, {"privacy.mode": mode})]
    return ", ".join(fitting) or "none"


def _named(fitting: Collection[str], whole: Collection[str]) -> str:
    """Those that fit; or those that do not, where they are fewer."""
    others = [name for name in whole if name not in fitting]
    if not others:
        return "all"
    if len(others) < len(fitting):
        return f"all but {', '.join(map(code, others))}"
    return ", ".join(map(code, fitting))


def _bytes(name: str) -> str:
    recipe = Recipe.read(_choice(STRUCTURES, name))
    width, rank, nodes = EXAMPLE
    spec = Spec({"": LayerShape(width, width)}, {}, rank, 1.0, recipe.structure)
    return readable.size(planned_bytes(recipe, spec, nodes).up)
