"""Rules whose nodes send differences, as their server has more than they were sent."""

from dataclasses import dataclass, replace

from common.adapter.values import State, Tensors, Update
from strategies.rules.mean import MeanRule


@dataclass(frozen=True, kw_only=True)
class ChangeRule(MeanRule):
    """A mean of changes, along which the server steps from its own state."""

    relative = True

    def send(self, received: State, local: Tensors) -> Tensors:
        """The differences from what was received."""
        return {key: tensor - received.adapter[key] for key, tensor in super().send(received, local).items()}

    def model(self, state: State, update: Update) -> State:
        """What the node received, and its differences."""
        received = self.received(state, update)
        changed = {key: received.adapter[key] + tensor for key, tensor in update.tensors.items()}
        return replace(received, adapter={**received.adapter, **changed})

    def received(self, state: State, update: Update) -> State:
        """What the node that sent ``update`` started from, of ``state`` or of a view of it."""
        return self.view(state, update.rank or state.rank)

    def joined(self, state: State, mean: Tensors) -> Tensors:
        """The whole state, and not a view of it, moved by the mean difference."""
        return {key: state.adapter[key] + tensor for key, tensor in mean.items()}
