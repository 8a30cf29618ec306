"""Who goes against the others: how often hostile nodes are named, and honest ones with them.

    python -m benchmarks.scrutiny

Synthetic updates in the geometry of every rule: an honest node's change of what it trains is a direction that all have
in common and noise of its own, and what it sends is what the rule makes of that. Two honest changes have a cosine of
0.1 with iid data; with skewed data of 0.05, and half of the nodes have another direction in common besides. Real
training is in no row; `tests/runs/test_hostile_replies.py` has a run of four nodes in which one flips.

    flip      turns its change round                 scale   turns it round, ten times as large
    pair      half of them turn round the honest direction, at a tenth of the size, all alike
    labels    learns the opposite of the common direction, and keeps its own noise
"""

import argparse
import statistics
from collections.abc import Iterator

import torch

from common.adapter.spec import Spec
from common.adapter.values import LayerShape, State, Tensors, Update
from server_app.scrutiny import Against, Scrutiny
from strategies import RULES, Recipe, Rule
from strategies.rules import Ravan

KINDS = ("none", "flip", "scale", "pair", "labels")
COSINES = {"iid": 0.1, "skewed": 0.05}
LAYERS = {f"layer-{number}": LayerShape(192, 160) for number in range(8)}


def attackers_of(nodes: int) -> tuple[int, ...]:
    """One, a quarter, three eighths, half, five eighths."""
    return tuple(dict.fromkeys((1, nodes // 4, 3 * nodes // 8, nodes // 2, 5 * nodes // 8)))


def direction(state: State, seed: int) -> Tensors:
    """A random change of unit size in every value."""
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(tensor.shape, generator=generator) for key, tensor in state.adapter.items()}


def change(state: State, kind: str, data: str, node: int, seed: int) -> Tensors:
    """What one node changes, hostile as ``kind`` says, or honest if that is empty."""
    common, own = direction(state, seed), direction(state, seed * 1000 + 1 + node)
    shared = COSINES[data]
    mixed = {key: shared**0.5 * common[key] + (1 - shared) ** 0.5 * own[key] for key in own}
    if data == "skewed" and node % 2:
        besides = direction(state, seed * 1000)
        mixed = {key: 0.95 * tensor + 0.3 * besides[key] for key, tensor in mixed.items()}
    if kind == "labels":
        return {key: tensor - 2 * shared**0.5 * common[key] for key, tensor in mixed.items()}
    if kind == "pair":
        return {key: -0.1 * tensor for key, tensor in common.items()}
    size = {"": 1.0, "flip": -1.0, "scale": -10.0}[kind]
    return {key: size * tensor for key, tensor in mixed.items()}


def sent(rule: Rule, state: State, moved: Tensors) -> Update:
    """What a node sends that has moved every trained tensor so."""
    view = rule.view(state, state.rank)
    local = {
        key: tensor + 0.01 * moved[key] if rule.trains(state.round, key) else tensor
        for key, tensor in view.adapter.items()
    }
    return Update(rule.send(view, local), 1.0, state.scale, view.slots)


def judged(rule: Rule, kind: str, data: str, sizes: tuple[int, int], seed: int) -> Against:
    """What is said of a round of so many nodes, the last of which are hostile."""
    nodes, hostile = sizes
    state = Recipe.around(rule).start(Spec(LAYERS, {}, 8, 2.0, rule.structure), seed=0)
    scrutiny = Scrutiny(rule, state, 0.0)
    for node in range(nodes):
        scrutiny.examine(
            f"{node:02d}", sent(rule, state, change(state, kind if node >= nodes - hostile else "", data, node, seed))
        )
    return scrutiny.against()


def row(kind: str, data: str, sizes: tuple[int, int], seeds: range) -> str:
    """Over all rules and seeds: the share of the hostile named, honest nodes named a round, rounds told of camps."""
    nodes, hostile = sizes
    found, wrong, camps = list[float](), list[int](), list[bool]()
    for rule in rules():
        for seed in seeds:
            against = judged(rule, kind, data, sizes, seed)
            right = sum(int(name) >= nodes - hostile for name in against.named)
            found.append(right / hostile if hostile else 0.0)
            wrong.append(len(against.named) - right)
            camps.append(against.camp > 0)
    named = f"{statistics.fmean(found):.0%}" if hostile else "-"
    said = f"{statistics.fmean(camps):.0%}"
    return f"| {kind} | {data} | {nodes} | {hostile} | {named} | {statistics.fmean(wrong):.2f} | {said} |"


def rules() -> Iterator[Rule]:
    """Every rule whose nodes send something."""
    made = (Ravan(heads=2) if name == "ravan" else rule() for name, rule in RULES.items())
    return (rule for rule in made if rule.plan(0).sent)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[8, 30])
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    print("| kind | data | nodes | hostile | hostile named | honest named a round | rounds told of two camps |")
    print("|---|---|---|---|---|---|---|")
    for kind in KINDS:
        for nodes in options.nodes:
            for hostile in attackers_of(nodes) if kind != "none" else (0,):
                for data in COSINES:
                    print(row(kind, data, (nodes, hostile), range(1, options.seeds + 1)), flush=True)


if __name__ == "__main__":
    main()
