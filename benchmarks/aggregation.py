"""How long the server's mathematics takes, beside Flower's own averaging and the textbook dense computation.

    python -m benchmarks.aggregation                  the adapter of Llama-3-8B (all linear layers, r = 16), 10 nodes
    python -m benchmarks.aggregation --layer 4096     one square layer, 10, 50 and 100 nodes, beside a dense SVD

Each row is its own process, so that its peak memory is its own: what the merge adds to the updates it is given.
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

from common.adapter.spec import Spec
from common.adapter.values import Key, LayerShape, State, Tensors, Update
from strategies import RULES, Recipe

LLAMA_3_8B = {
    f"model.layers.{layer}.{name}": LayerShape(*shape)
    for layer in range(32)
    for name, shape in {
        "self_attn.q_proj": (4096, 4096),
        "self_attn.k_proj": (1024, 4096),
        "self_attn.v_proj": (1024, 4096),
        "self_attn.o_proj": (4096, 4096),
        "mlp.gate_proj": (14336, 4096),
        "mlp.up_proj": (14336, 4096),
        "mlp.down_proj": (4096, 14336),
    }.items()
}
RANK = 16
REPEATS = 3


def updates_of(rule: str, layers: dict[str, LayerShape], nodes: int) -> tuple[State, list[Update]]:
    """A state in its second round, and what ``nodes`` nodes send: every trained tensor random."""
    built = RULES[rule]()
    state = Recipe.around(built).start(Spec(layers, {}, RANK, 2.0, built.structure), seed=0)
    state = built.view(state, RANK)
    generator = torch.Generator().manual_seed(1)

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        return tensor + 0.01 * torch.randn(tensor.shape, generator=generator)

    updates = [
        Update(
            built.send(state, {k: moved(t) if built.trains(0, k) else t for k, t in state.adapter.items()}),
            node + 1.0,
            state.scale,
        )
        for node in range(nodes)
    ]
    return state, updates


def time_rule(rule: str, layers: dict[str, LayerShape], nodes: int) -> tuple[float, int]:
    """Seconds (median) and bytes of one merge by a rule, its checks included."""
    state, updates = updates_of(rule, layers, nodes)
    return measure(lambda: RULES[rule]().aggregate(state, updates))


def time_flower(layers: dict[str, LayerShape], nodes: int) -> tuple[float, int]:
    """The same for Flower's FedAvg over the arrays of FedIT; what it deserialises, it deserialises."""
    _, updates = updates_of("fedit", layers, nodes)
    replies = [
        RecordDict(
            {
                "arrays": ArrayRecord({str(key): tensor for key, tensor in update.tensors.items()}),
                "metrics": MetricRecord({"weight": update.weight}),
            }
        )
        for update in updates
    ]
    return measure(lambda: aggregate_arrayrecords(replies, "weight"))


def time_sum(layers: dict[str, LayerShape], nodes: int) -> tuple[float, int]:
    """A plain weighted sum of the same tensors in place: about what the memory allows."""
    _, updates = updates_of("fedit", layers, nodes)

    def add() -> Tensors:
        total = {key: torch.zeros_like(tensor) for key, tensor in updates[0].tensors.items()}
        for update in updates:
            for key, tensor in update.tensors.items():
                total[key].add_(tensor, alpha=update.weight)
        return total

    return measure(add)


def time_dense(layers: dict[str, LayerShape], nodes: int) -> tuple[float, int]:
    """The textbook way to the best rank-r factors: the d_out x d_in mean of the products, and its full SVD."""
    _, updates = updates_of("flexlora", layers, nodes)

    def textbook() -> None:
        for layer in layers:
            dense = sum(u.weight * u.scale * u.tensors[Key(layer, "B")] @ u.tensors[Key(layer, "A")] for u in updates)
            torch.linalg.svd(torch.as_tensor(dense), full_matrices=False)

    return measure(textbook, repeats=1)


def time_grams(layers: dict[str, LayerShape], nodes: int) -> tuple[float, int]:
    """The inner products of the stack's columns and of its rows: the least that an exact decomposition must know."""
    _, updates = updates_of("flexlora", layers, nodes)

    def grams() -> None:
        for layer in layers:
            left = torch.cat([update.tensors[Key(layer, "B")] for update in updates], dim=1)
            right = torch.cat([update.tensors[Key(layer, "A")] for update in updates], dim=0)
            _ = left.T @ left, right @ right.T

    return measure(grams)


def measure(work: Callable[[], object], repeats: int = REPEATS) -> tuple[float, int]:
    """The median time of ``work``, and by how much it raised the peak memory of this process."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def row(name: str, work: Callable[..., tuple[float, int]], *arguments: object) -> None:
    """Measure in a process of its own, and print one line."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        seconds, peak = pool.submit(work, *arguments).result()
    print(f"| {name} | {seconds:.3f} | {peak / 1e6:,.0f} |", flush=True)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", type=int, help="one square layer of this size instead of Llama-3-8B")
    parser.add_argument("--nodes", type=int, nargs="*", help="numbers of nodes (default 10; with --layer 10 50 100)")
    parser.add_argument("--rules", nargs="*", default=list(RULES), choices=list(RULES), help="default: all of them")
    arguments = parser.parse_args()
    one = {"layer": LayerShape(arguments.layer, arguments.layer)} if arguments.layer else None
    layers = one or LLAMA_3_8B
    for nodes in arguments.nodes or ([10, 50, 100] if one else [10]):
        print(f"\n{len(layers)} layers, r = {RANK}, {nodes} nodes\n\n| | seconds | peak MB added |\n|---|---|---|")
        row("plain sum", time_sum, layers, nodes)
        row("Flower's FedAvg", time_flower, layers, nodes)
        for rule in arguments.rules:
            row(rule, time_rule, rule, layers, nodes)
        if one:
            row("the stack's inner products", time_grams, layers, nodes)
            row("dense product and SVD", time_dense, layers, nodes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
