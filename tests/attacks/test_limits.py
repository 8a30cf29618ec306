"""Kind 5: limits that hang on what the limited party says of itself. What left is counted here, by its noise."""

import pytest

from common.privacy import accounting
from common.privacy.accounting import Release
from tests.attacks.hostile import LOCAL, MANY_VALUES, RUN, Node, cost, failure, left, refused, start, update
from tests.attacks.tools import FORK

DELTA = 1e-5


LIMIT = 2.0
AFFORDABLE = next(n for n in range(1, 40) if cost(n + 1) > LIMIT)
MORE = AFFORDABLE + 4


@pytest.mark.parametrize("mode", ["example", "update-local"])
@pytest.mark.parametrize("declared", [1, 2, 3])
def test_a_runs_limit_is_not_per_declared_round(declared, mode, tmp_path):
    """The coordinator says one round, and asks for as many as it likes."""
    node = Node(tmp_path, tables={"privacy": {"max-epsilon": LIMIT}})
    run = {"num-server-rounds": declared, "privacy.mode": mode}
    answers = [node.ask("train", run, round=turn) for turn in range(MORE)]
    assert cost(left(answers)) <= LIMIT
    assert left(answers) >= 1
    assert refused(answers[-1])


SAYS = {
    "the same round again": lambda turn: ({}, {"round": 0}),
    "rounds from far away": lambda turn: ({}, {"round": 100 + turn}),
    "another run id": lambda turn: ({}, {"run_id": 100 + turn}),
    "no name and another id": lambda turn: ({"run-name": ""}, {"run_id": 100 + turn}),
    "another name": lambda turn: ({"run-name": f"run-{turn}"}, {}),
    "another seed": lambda turn: ({"seed": turn}, {}),
    "another rule": lambda turn: ({"rule.name": ["ffa-lora", "fedit", "fedsa-lora"][turn % 3]}, {}),
    "the other mode": lambda turn: (LOCAL if turn % 2 else {}, {}),
    "a resumed run": lambda turn: ({"resume": True}, {}),
    "a larger epsilon": lambda turn: ({"privacy.epsilon": 5000.0}, {}),
    "a larger delta": lambda turn: ({"privacy.delta": 0.1}, {}),
    "the other accountant": lambda turn: ({"privacy.accountant": ["rdp", "prv"][turn % 2]}, {}),
    "other records": lambda turn: ({"data.limit": turn + 1, "seed": turn}, {}),
    "another holdout": lambda turn: ({"data.holdout": 0.05 + 0.05 * turn}, {}),
    "more rounds each time": lambda turn: ({"num-server-rounds": turn + 1}, {"round": turn}),
    "records of its own": lambda turn: ({"privacy.records": 8 + turn}, {}),
}


@pytest.mark.parametrize("says", SAYS)
def test_whatever_the_coordinator_says_the_operators_budget_holds(says, tmp_path):
    node = Node(tmp_path, privacy_epsilon=LIMIT)
    answers = []
    for turn in range(MORE):
        run, message = SAYS[says](turn)
        answers.append(node.ask("train", {"num-server-rounds": 1, **run}, **message))
    assert left(answers) >= 1
    assert cost(left(answers), "prv") <= LIMIT
    assert refused(answers[-1])


@pytest.mark.parametrize("says", ["another seed", "the same round again", "a resumed run", "more rounds each time"])
def test_and_the_operators_limit_for_a_run_too(says, tmp_path):
    node = Node(tmp_path, tables={"privacy": {"max-epsilon": LIMIT}})
    answers = []
    for turn in range(MORE):
        run, message = SAYS[says](turn)
        answers.append(node.ask("train", {"num-server-rounds": 1, **run}, **message))
    assert cost(left(answers)) <= LIMIT


@pytest.mark.parametrize("records", [10**6, 10**9])
def test_the_coordinator_does_not_say_how_many_records_a_node_has(records, tmp_path):
    """More records would be less noise for the same epsilon, and a smaller bill."""
    node = Node(tmp_path, privacy_epsilon=LIMIT)
    run = {"privacy.records": records, "num-server-rounds": 1}
    answers = [node.ask("train", run, round=turn) for turn in range(MORE)]
    assert cost(left(answers)) <= LIMIT


def test_a_limit_for_a_run_needs_a_budget_to_be_counted_in(tmp_path):
    node = Node(tmp_path, tables={"privacy": {"max-epsilon": LIMIT}}, privacy_epsilon=None)
    assert refused(node.ask("query"))
    assert refused(node.ask("train"))


def test_a_budget_needs_a_folder_of_its_own(tmp_path):
    node = Node(tmp_path, state_directory=None)
    assert refused(node.ask("train"))


def test_a_refusal_costs_nothing_and_lasts(tmp_path):
    node = Node(tmp_path, privacy_epsilon=LIMIT)
    for turn in range(MORE):
        node.ask("train", round=turn)
    rows = len(node.rows())
    said = {failure(node.ask("train", round=turn)) for turn in range(3)}
    assert len(said) == 1
    assert len(node.rows()) == rows == AFFORDABLE


@pytest.mark.parametrize(
    "run",
    [
        {"privacy.clip-quantile": 0.5},  # a batch too small to noise its count beside the sum
        {"lora.targets": "no_such_layer"},
        {"gradient.name": "hooks", "model.gradient-checkpointing": True},
    ],
    ids=lambda run: next(iter(run)),
)
def test_what_cannot_be_done_whatever_the_data_is_is_not_charged(run, tmp_path):
    node = Node(tmp_path / "node")
    assert all(failure(node.ask("train", run, round=turn, state=start())) for turn in range(2))
    assert failure(node.ask("train", round=2)) == ""
    assert len(node.rows()) == 1


def test_noise_that_is_planned_for_one_round_is_not_used_in_six(tmp_path):
    """Without a noise multiplier, epsilon 2 over one round: what six such rounds cost is known from the ledger."""
    node = Node(tmp_path, tables={"privacy": {"max-epsilon": LIMIT}})
    run = {"privacy.noise-multiplier": 0.0, "privacy.epsilon": LIMIT, "num-server-rounds": 1}
    answers = [node.ask("train", run, round=turn) for turn in range(6)]
    releases = [Release(row.noise_multiplier, row.sample_rate, row.steps) for row in node.rows()]
    assert left(answers) <= len(releases)
    assert accounting.epsilon(releases, DELTA, "rdp") <= LIMIT + 0.01


@pytest.mark.exhaustive
def test_two_runs_at_once_do_not_both_spend_the_last_of_it(tmp_path):
    """Two processes, as Flower starts them, of one node in two runs."""
    node = Node(tmp_path, privacy_epsilon=LIMIT)

    def all_of_it(number, out):
        out.send(left([node.ask("train", {"run-name": f"run-{number}"}, round=turn) for turn in range(MORE)]))

    pipes = [FORK.Pipe(duplex=False) for _ in range(2)]
    processes = [FORK.Process(target=all_of_it, args=(n, out)) for n, (_, out) in enumerate(pipes)]
    for process in processes:
        process.start()
    found = [mine.recv() if mine.poll(60) else None for mine, _ in pipes]
    for process in processes:
        process.join()
    assert sum(found) == AFFORDABLE


def test_what_is_counted_here_is_what_left(tmp_path):
    """The noise of an update has the deviation that the run config says, so that counting updates is counting it."""
    node = Node(tmp_path)
    run = LOCAL | MANY_VALUES | {"privacy.clip": 1e-2}
    change = update(node.ask("train", run), run)
    values = [value for tensor in change.values() for value in tensor.flatten().tolist()]
    deviation = (sum(value**2 for value in values) / len(values)) ** 0.5
    assert deviation == pytest.approx(2 * 1e-2 * RUN["privacy.noise-multiplier"], rel=0.08)
