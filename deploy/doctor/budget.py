"""What a private run would cost this node, beside what its data has cost before."""

from bisect import bisect_right

from client_app.policy import Policy
from common import accounting, ledger, records
from common.accounting import Release
from common.config import RunConfig
from common.error import BouquetError
from common.ledger import DataSet
from common.node_config import NodeConfig
from deploy.doctor.check import WarningError


def budget(config: RunConfig, node: NodeConfig) -> str:
    """Epsilon before and after the run, for a node that takes part in every round, against its ``privacy-epsilon``.

    Raises :class:`BouquetError` where the ledger would refuse the first round, and :class:`WarningError` where it
    would refuse a later one.
    """
    limit, delta, rounds = node.privacy_epsilon, node.privacy_delta, config.num_server_rounds
    if config.privacy.mode == "none":
        if limit:
            raise BouquetError(
                "a run without privacy on a node with a budget",
                where="privacy.mode",
                got="none",
                cure="Set privacy.mode=example, or privacy-epsilon = 0.0 on this node.",
            )
        return "the run is not private, and the node has no budget"
    spent = [entry.release for entry in ledger.related(node.ledger, node.witness, _dataset(config, node))]
    a_round, scored = _releases(config, node)

    def after(done: int) -> float:
        scores = [scored] * config.scores_after(done) if scored else []
        return accounting.epsilon([*spent, *[a_round] * done, *scores], delta, config.privacy.accountant)

    costs = f"epsilon {after(rounds):.4g} at delta {delta:g} after the run, {after(0):.4g} before"
    if not limit:
        return f"{costs}; the node has no limit"
    if after(1) > limit:
        raise BouquetError(
            "the privacy budget of this node is spent",
            where="privacy-epsilon",
            expected=f"at most {limit:g}",
            got=f"{after(1):.4g} with one round",
            cure="bouquet ledger show says what it was spent on.",
        )
    if after(rounds) > limit:
        lasting = bisect_right(range(1, rounds), limit, key=after)
        raise WarningError(
            "the privacy budget of this node will not last",
            where="privacy-epsilon",
            expected=f"at most {limit:g}",
            got=f"{costs}: enough for {lasting} of {rounds} rounds",
            cure="Lower num-server-rounds or privacy.epsilon.",
        )
    return f"{costs}, of {limit:g}"


def _releases(config: RunConfig, node: NodeConfig) -> tuple[Release, Release | None]:
    """What a round of training costs a node, and what a score does."""
    privacy = config.privacy
    if not (number := node.records or privacy.records):
        raise BouquetError(
            "a private run needs the public number of a node's records",
            where=f"{node.label}, records",
            expected="1 or more, as its operator rounds it",
            cure="Set records in --node-config, or privacy.records in the run config for all nodes without.",
        )
    own = config.trained_on(number) if privacy.mode == "example" else 1
    planned = accounting.plan(privacy, own, config.train.steps, config.num_server_rounds, config.scores)
    scored = Release(privacy.score_noise, 1.0, 1) if privacy.score_noise else None
    return accounting.by_record(planned, privacy.mode), scored


def _dataset(config: RunConfig, node: NodeConfig) -> DataSet | None:
    """The data set that has a budget of its own; None where the node has one for all, as without a policy."""
    fields = Policy.of(node).budget.fields
    return DataSet.of(records.node_records(config.data, node, config.seed), fields) if fields else None
