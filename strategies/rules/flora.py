"""FLoRA: the nodes' factors stacked, and a fresh adapter in every round.

Wang et al., *FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations*,
arXiv:2409.05976 (NeurIPS 2024).

    B = [B_1 ... B_K]      A = [p_1 s_1 A_1; ...; p_K s_K A_K]      W_0 <- W_0 + B A      then A fresh, B = 0

The weights p_k stand on A only; on both factors they would count twice. Exact for any ranks. The paper merges B A into
the base weights; here it joins the frozen offset, whose rank grows by the sum of the nodes' ranks in every round.
"""

from dataclasses import dataclass

from torch import Tensor

from strategies.rules.stack import RestartRule, Stack


@dataclass(frozen=True, kw_only=True)
class FLora(RestartRule):
    """Everything that was learnt joins the offset; the nodes start again from A fresh and B = 0."""

    name = "flora"
    paper = "arXiv:2409.05976"

    @property
    def exact(self) -> bool:
        """As long as the offset is never cut."""
        return self.offset_energy == 1

    def kept(self, stack: Stack) -> tuple[Tensor, Tensor]:
        """All of it."""
        return stack.left, stack.right
