"""RandLoRA: trained diagonals before frozen random bases, whose sum has a rank far above their number.

Albert et al., *RandLoRA: Full-Rank Parameter-Efficient Fine-Tuning of Large Models*, arXiv:2502.00987 (ICLR 2025).

    W x + s sum_j B_j A_j diag(G_j) x        A_j  r/n x d_in   B_j  d_out x r/n   G_j  d_in, starts at 0        j = 1..n

A base is a block of slots of the drawn frames A and B, which do not travel. The update has rank r for n d_in values a
layer, where a LoRA whose B is frozen has rank n for as many; with a base for every slot the two are one. Linear in G,
and so exact under a mean.

The paper has a second trained diagonal, between A_j and B_j: r values beside n d_in, left out because with it the
update is linear in neither. It shares the rows of A among the bases, to save memory; here each base has its own, and
the rank is that of all of them. And it puts G on the smaller side of a layer; here it is the input's.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from common.adapter.diagonal import Diagonal
from common.adapter.structure import Shape, Structure
from common.adapter.values import FACTORS, Key, LayerShape, Tensors
from common.method import option


@dataclass(frozen=True, kw_only=True)
class RandLora(Structure):
    """Frozen frames in blocks with a diagonal before each; linear in these."""

    bases: int = option(4, ge=1, le=64)
    """How many blocks of slots have a diagonal of their own; one a slot at most."""

    name = "randlora"
    paper = "arXiv:2502.00987"
    parts = FACTORS | {"G"}
    trained = frozenset({"G"})
    linear_in = frozenset({frozenset({"G"})})
    init = "orthonormal"
    learning_rate = 1e-1

    def layer(self, shape: LayerShape, rank: int) -> Iterator[tuple[str, Shape]]:
        yield "A", (rank, shape.d_in)
        yield "B", (shape.d_out, rank)
        yield "G", (min(self.bases, rank) * shape.d_in,)

    def start(self, b: Tensor, a: Tensor, core: Tensor | None) -> Mapping[str, Tensor]:
        count = min(self.bases, len(a)) * a.shape[1]
        if core is None:
            return {"A": a, "B": b, "G": torch.zeros(count)}
        return {"A": core @ a, "B": b, "G": torch.ones(count)}

    def factors(self, tensors: Tensors, layer: str) -> tuple[Tensor, Tensor]:
        b, a, g = (tensors[Key(layer, part)] for part in "BAG")
        diagonals = g.reshape(-1, a.shape[1])
        blocks = a.tensor_split(len(diagonals))
        return b, torch.cat([block * diagonal for block, diagonal in zip(blocks, diagonals, strict=True)])

    def inject(self, module: Any) -> dict[str, list[nn.Parameter]]:
        down = module.lora_A["default"] = ScaledDown(module.lora_A["default"], self.bases)
        return {
            "A": [down.down.weight],
            "B": [module.lora_B["default"].weight],
            "G": [diagonal.weight for diagonal in down.diagonals],
        }


class ScaledDown(nn.Module):
    """PEFT's ``lora_A``, frozen, with a diagonal before each of at most ``bases`` blocks of its rows."""

    def __init__(self, down: nn.Linear, bases: int) -> None:
        super().__init__()
        self.down = down
        count = min(bases, down.out_features)
        self.diagonals = nn.ModuleList(Diagonal(down.in_features, down.weight.device) for _ in range(count))

    @property
    def weight(self) -> Tensor:
        """A; PEFT reads its type."""
        return self.down.weight

    def forward(self, x: Tensor) -> Tensor:
        """``A_j diag(G_j) x`` for every j, ``... x d_in`` to ``... x r``."""
        blocks = self.down.weight.tensor_split(len(self.diagonals))
        parts = [linear(scaled(x), block) for scaled, block in zip(self.diagonals, blocks, strict=True)]
        return torch.cat(parts, dim=-1)
