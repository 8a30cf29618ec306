"""Rules whose server only averages what is sent."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from common.adapter.values import State, Tensors, Update
from common.error import BouquetError
from strategies.means import Mean, Weighted
from strategies.rules.rule import CHANGE_RANK, Rule
from strategies.server_optimizers import ServerOptimizer, ToTheMean


@dataclass(frozen=True, kw_only=True)
class MeanRule(Rule):
    """A mean of what is sent, and a step of the server towards it."""

    mean: Mean = field(default_factory=Weighted)
    optimizer: ServerOptimizer = field(default_factory=ToTheMean)

    linear = True

    def check_rank(self, rank: int, whole: int, where: str = "lora-rank", cure: str = CHANGE_RANK) -> None:
        """Nodes that have different slots have a mean of each slot, and no order."""
        super().check_rank(rank, whole, where, cure)
        if rank != whole and self.mean != Weighted():
            raise BouquetError(
                "a robust mean over nodes that train different slots",
                where=where,
                expected=f"{whole} on every node, or mean.name = 'weighted'",
                got=str(rank),
                cure=cure,
            )

    @property
    def exact(self) -> bool:
        """By the structure's linearity: what every round trains is averaged, and the update is linear in it."""
        plain = self.mean == Weighted() and self.optimizer == ToTheMean()
        return plain and all(self._averages_models(turn) for turn in (0, 1))

    def _averages_models(self, round: int) -> bool:
        plan = self.plan(round)
        return plan.trained == plan.sent and any(plan.trained <= parts for parts in self.structure.linear_in)

    def merge(self, state: State, updates: Iterable[Update]) -> State:
        """Every sent tensor becomes ``sum_k p_k x_k`` with ``p_k = weight_k / sum_j weight_j``, or goes towards it."""
        mean, memory = self.mean(state, self.collected(state, updates))
        return self.optimizer.step(replace(state, memory={**state.memory, **memory}), self.joined(state, mean))

    def collected(self, state: State, updates: Iterable[Update]) -> Iterator[tuple[float, Tensors]]:
        """What the mean is taken of, with its weights."""
        return ((update.weight, update.tensors) for update in updates)

    def joined(self, state: State, mean: Tensors) -> Tensors:
        """Whole tensors of the state again, from a mean of what :meth:`collected` gave."""
        return mean
