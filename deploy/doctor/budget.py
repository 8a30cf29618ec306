"""What a private run would cost this node, beside what its data has cost before."""

from bisect import bisect_right
from collections.abc import Callable

from client_app.policy import Policy
from client_app.spending import Spending
from common.config.node import NodeConfig
from common.config.run import RunConfig
from common.error import BouquetError
from common.privacy import accounting, ledger
from common.privacy.accounting import Release
from common.privacy.ledger import DataSet
from common.sources import stable
from deploy.doctor.check import WarningError


def budget(config: RunConfig, node: NodeConfig) -> str:
    """Epsilon before and after the run, for a node that takes part in every round, against its ``privacy-epsilon``.

    Raises :class:`BouquetError` where the node would refuse the first round, by its budget or by its policy's limits
    for one run, and :class:`WarningError` where it would refuse a later one.
    """
    limit, delta, rounds = node.privacy_epsilon, node.privacy_delta, config.num_server_rounds
    if not config.privacy.on:
        if limit:
            raise BouquetError(
                "a run without privacy on a node with a budget",
                where="privacy.mode",
                got="none",
                cure="Set privacy.mode=example, or privacy-epsilon = 0.0 on this node.",
            )
        return "the run is not private, and the node has no budget"
    policy = Policy.of(node)
    spending = Spending(config, node, policy, config.rule, config.run_name)
    spending.check_places()
    planned = spending.plan()
    policy.check_release(planned)
    if config.privacy.per_example or policy.min_examples:
        policy.check_data(spending.records)
    spent = [entry.release for entry in ledger.related(node.ledger, node.witness, _dataset(config, node))]

    def cost_over(before: list[Release]) -> Callable[[int], float]:
        return lambda done: accounting.epsilon(
            [*before, *_releases(config, planned, done)], delta, config.privacy.accountant
        )

    _check(cost_over([]), policy.privacy.max_epsilon, rounds, "what one run may cost this node", "privacy.max-epsilon")
    after = cost_over(spent)
    _check(after, limit, rounds, "the privacy budget of this node", "privacy-epsilon")
    costs = f"epsilon {after(rounds):.4g} at delta {delta:g} after the run, {after(0):.4g} before"
    return f"{costs}, out of {limit:g}" if limit else f"{costs}; the node has no limit"


def _check(after: Callable[[int], float], limit: float, rounds: int, what: str, where: str) -> None:
    """Raise where ``limit`` is passed in the first round, or in a later one, by what it is ``after`` so many."""
    if not limit or after(rounds) <= limit:
        return
    if after(1) > limit:
        raise BouquetError(
            f"{what} is spent",
            where=where,
            expected=f"at most {limit:g}",
            got=f"{after(1):.4g} with one round",
            cure="bouquet ledger show says what it was spent on; bouquet plan says what a run costs.",
        )
    raise WarningError(
        f"{what} will not last",
        where=where,
        expected=f"at most {limit:g}",
        got=f"{after(rounds):.4g} after the run, {after(0):.4g} before: enough for "
        f"{bisect_right(range(1, rounds), limit, key=after)} of {rounds} rounds",
        cure="Lower num-server-rounds or privacy.epsilon.",
    )


def _releases(config: RunConfig, planned: Release, done: int) -> list[Release]:
    """What ``done`` rounds give away of a node's records, and the scores until then."""
    scored = Release(config.privacy.score_noise, 1.0, 1) if config.privacy.score_noise else None
    a_round = accounting.by_record(planned, config.privacy.mode)
    return [*[a_round] * done, *([scored] * config.scores_after(done) if scored else [])]


def _dataset(config: RunConfig, node: NodeConfig) -> DataSet | None:
    """The data set that has a budget of its own; None where the node has one for all."""
    if not (fields := Policy.of(node).budget.fields) or node.script:
        return None
    return DataSet.of(stable.node_records(config.data, node, config.seed), fields)
