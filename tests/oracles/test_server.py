"""What is around a rule on the server: the kind of mean, the optimizer, the meter."""

import itertools
import math
import statistics

import pytest
import torch

from common.adapter.algebra import weighted_mean
from common.adapter.spec import Spec
from common.adapter.values import Key, LayerShape, State
from strategies.means import Mean, Median, MultiKrum, RankVote, Trimmed
from strategies.means.mean import Updates
from strategies.meter import aggregation_error
from strategies.rules import FedIT, FedRotLora, FedSALora, FedSB, FedSVD, FFALora, Ravan, RoLora
from strategies.server_optimizers import FedAdam, FedAvgM
from tests.support.factors import LAWFUL, dense, initial, started, trained


def test_the_mean_needs_the_memory_of_one_update():
    seen = []

    def stream():
        for value in (1.0, 2.0, 6.0):
            seen.append(value)
            yield 1.0, {Key("l", "B"): torch.full((2,), value)}

    mean = weighted_mean(stream())
    torch.testing.assert_close(mean[Key("l", "B")], torch.full((2,), 3.0))
    assert seen == [1.0, 2.0, 6.0]


@pytest.mark.parametrize(
    "rule", [rule for rule in LAWFUL.values() if rule.keeps == "nothing"], ids=lambda rule: rule.name
)
def test_the_meter_reads_what_the_dense_matrices_say(rule):
    state = started(rule)
    updates = [trained(rule, state, seed, seed + 1.0) for seed in range(3)]
    merged = rule.aggregate(state, updates)
    read = aggregation_error(rule, state, updates, merged)
    parts = [dense(rule.model(state, update)) for update in updates]
    squares = []
    for layer, matrix in dense(merged).items():
        ideal = sum(update.weight / 6 * part[layer] for update, part in zip(updates, parts, strict=True))
        error, size = torch.linalg.norm(matrix - ideal), torch.linalg.norm(ideal)
        squares.append((error.square(), size.square()))
        assert read[layer] == pytest.approx((error / size).item(), abs=1e-5)
    overall = (sum(e for e, _ in squares) / sum(s for _, s in squares)).sqrt().item()
    assert read[""] == pytest.approx(overall, abs=1e-5)
    assert (read[""] < 1e-5) == rule.exact


def test_the_meter_estimates_what_it_cannot_hold():
    rule, state = FedIT(), started(FedIT())
    updates = [trained(rule, state, seed, 1.0) for seed in range(40)]
    merged = rule.aggregate(state, updates)
    models = [dense(rule.model(state, update)) for update in updates]
    for layer, read in list(aggregation_error(rule, state, updates, merged).items())[:-1]:
        ideal = sum(model[layer] for model in models) / 40
        true = (torch.linalg.norm(dense(merged)[layer] - ideal) / torch.linalg.norm(ideal)).item()
        assert read == pytest.approx(true, rel=0.3)


def values(*numbers):
    return [(1.0, {Key("l", "B"): torch.tensor([float(number)])}) for number in numbers]


def taken(mean: Mean, updates: Updates) -> torch.Tensor:
    """The mean of the updates' one tensor."""
    return mean(State({}, 1.0), updates)[0][Key("l", "B")]


def test_robust_means_are_not_moved_by_one_hostile_node():
    honest = [0.9, 1.0, 1.1, 1.2]
    for mean in (Trimmed(share=0.2), Median(), MultiKrum(hostile=1), RankVote()):
        assert min(honest) <= taken(mean, values(*honest, 1e6)).item() <= max(honest), mean
    assert taken(Median(), values(5, 1, 3)).item() == 3
    assert taken(Median(), values(1, 2, 3, 9)).item() == 2.5
    assert taken(Trimmed(share=0.25), values(0, 2, 4, 100)).item() == 3
    assert taken(MultiKrum(hostile=1), values(1, 2, 3, 50)).item() == 2
    for mean in (Trimmed(share=0.1), Median(), MultiKrum(hostile=2), RankVote()):
        assert taken(mean, values(7)).item() == 7
        assert taken(mean, values(7, 7, 7)).item() == 7


def test_a_vote_by_ranks_puts_median_sizes_in_the_order_of_all_ranks():
    key = Key("l", "B")

    def vote(*nodes):
        updates = [(1.0, {key: torch.tensor([list(map(float, node))])}) for node in nodes]
        return RankVote()(State({}, 1.0), updates)[0][key].flatten().tolist()

    # Ranks 1 2 3 4, 2 1 3 4 and 1 3 2 4; the sizes are those in the middle, in order: 1 2 4 8.
    assert vote((1, 2, 3, 4), (2, 1, 4, 8), (1, 5, 3, 9)) == [1, 2, 4, 8]
    assert vote((3, 0, 0, -1), (3, 0, 0, -1)) == [3, 0, 0, -1]
    # A value that is one of many equals is no lower than they are for standing before them.
    assert vote((0, 0, 5), (0, 0, 5), (0, 1, 5))[:2] == [0, 0]
    # What the others agree on is not turned by those who rank the other way, however large they are.
    assert vote((1, 2, 4, 8), (1, 3, 5, 9), (1, 2, 5, 7), (1e6, 2, -1, -1e6), (1e6, 3, -2, -1e6)) == [1, 2, 4, 9]


def nodes_of(count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * count + seed)
    return [torch.randn(2, generator=generator) for _ in range(count)]


def merged_by(mean: Mean, nodes: list[torch.Tensor]) -> torch.Tensor:
    return taken(mean, ((1.0 + number, {Key("l", "B"): node}) for number, node in enumerate(nodes)))


@pytest.mark.parametrize("share", [0.1, 0.2, 0.25, 0.3, 0.4, 0.5])
def test_a_trimmed_mean_cuts_the_whole_nodes_that_its_share_holds(share):
    """Yin et al., definition 2: rounded down, and at one half the median."""
    for count in range(1, 13):
        nodes = nodes_of(count)
        cut = math.floor(share * count) if share < 0.5 else (count - 1) // 2
        ideal = [statistics.fmean(sorted(values)[cut : count - cut]) for values in torch.stack(nodes).T.tolist()]
        torch.testing.assert_close(
            merged_by(Trimmed(share=share) if share < 0.5 else Median(), nodes),
            torch.tensor(ideal),
            rtol=1e-5,
            atol=1e-6,
        )


@pytest.mark.parametrize("hostile", [1, 2, 3])
def test_krum_scores_by_as_many_neighbours_as_the_paper(hostile):
    """Blanchard et al.: K - f - 2 of the other nodes; all but f are kept."""
    for count, seed in itertools.product(range(2 * hostile + 3, 13), range(10)):
        nodes = nodes_of(count, seed)
        scores = []
        for node in nodes:
            apart = sorted(float((node - other).double().square().sum()) for other in nodes if other is not node)
            scores.append(sum(apart[: count - hostile - 2]))
        kept = sorted(range(count), key=scores.__getitem__)[: count - hostile]
        ideal = torch.stack([nodes[number] for number in sorted(kept)]).mean(0)
        torch.testing.assert_close(merged_by(MultiKrum(hostile=hostile), nodes), ideal, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", [FedIT, FFALora, RoLora, FedSALora, FedSVD, FedRotLora, FedSB, Ravan])
def test_a_server_optimizer_follows_its_equations(rule):
    """Over three rounds, against the recurrences written out on the products (momentum) and tensors (Adam)."""
    for optimizer in (FedAvgM(rate=0.7, momentum=0.5), FedAdam(rate=0.1, momentum=0.8, beta=0.9, tau=1e-2)):
        built = rule(optimizer=optimizer)
        state = initial(built, Spec({"l": LayerShape(20, 16)}, {}, 4, 1.0, built.structure), seed=0)
        key = Key("l", "R" if built.structure.name == "core" else "A" if rule is FedSALora else "B")
        first, second = torch.zeros_like(state.adapter[key]), torch.full_like(state.adapter[key], 1e-4)
        expected = state.adapter[key].clone()
        for step in range(3):
            update = trained(built, state, step, 1.0)
            before, state = state, built.aggregate(state, [update])
            if key not in update.tensors or rule is FedSVD:
                continue
            change = update.tensors[key] - before.adapter[key]
            if isinstance(optimizer, FedAvgM):
                first = 0.5 * first + change
                expected = before.adapter[key] + 0.7 * first
            else:
                first, second = 0.8 * first + 0.2 * change, 0.9 * second + 0.1 * change.square()
                expected = before.adapter[key] + 0.1 * first / (second.sqrt() + 1e-2)
            torch.testing.assert_close(state.adapter[key], expected, rtol=1e-4, atol=1e-5)
        assert not built.exact


@pytest.mark.parametrize("balance", [0.0, 0.5])
def test_the_momentum_of_fedsvd_is_turned_with_its_frame(balance):
    """B momentum A is a change of the model; the reframing must not alter it."""
    rule = FedSVD(optimizer=FedAvgM(momentum=0.5), balance=balance)
    state = initial(rule, Spec({"l": LayerShape(20, 16)}, {}, 4, 1.0), seed=0)
    a, b = Key("l", "A"), Key("l", "B")
    update = trained(rule, state, 0, 1.0)
    merged = rule.aggregate(state, [update])
    change = (update.tensors[b] - state.adapter[b]) @ state.adapter[a]
    torch.testing.assert_close(merged.memory["momentum"][b] @ merged.adapter[a], change, rtol=1e-4, atol=1e-5)
