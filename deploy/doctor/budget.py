"""What a private run would cost this node, beside what its data has cost before."""

from bisect import bisect_right
from itertools import islice

from common import accounting, base, ledger, sources, tasks
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
    dataset = DataSet.of(sources.own_records(config.data, node, config.seed))
    spent = [entry.release for entry in ledger.related(node.state, dataset)]
    release = accounting.plan(config.privacy, _examples(config, node), config.train.steps, rounds)

    def after(done: int) -> float:
        return accounting.epsilon([*spent, *[release] * done], delta, config.privacy.accountant)

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


def _examples(config: RunConfig, node: NodeConfig) -> int:
    """How many examples the node trains on, one a record."""
    task, tokenizer = tasks.build(config.task), base.load_tokenizer(config.model)
    own, _ = sources.split(sources.node_dataset(config.data, node, config.seed), config.data.holdout, config.seed)
    return sum(1 for record in own for _ in islice(task.encode(record, tokenizer), 1))
