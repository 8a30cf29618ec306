"""A trained core between two frozen factors: LoRA-SB (arXiv:2411.19557), and in blocks RAVAN (arXiv:2506.05568).

    W x + s B R A x        R  r x q    a core of h = r / q square blocks on the diagonal, one above the other
                           s  h        what a node multiplies each block by while it trains

PEFT computes ``s B(A(x))``. Here A is followed by the core, ``s B(R(A(x)))``. The blocks are linear layers, so that
whoever needs gradients of single examples finds a layer that they know, and each can be frozen by itself.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.adapter.algebra import chosen_blocks
from common.adapter.structure import Shape, Structure
from common.adapter.values import FACTORS, Key, LayerShape, Tensors
from common.error import BouquetError
from common.method import given


@dataclass(frozen=True, kw_only=True)
class Core(Structure):
    """A core of ``blocks`` square blocks; linear in it."""

    blocks: int = given(1, ge=1)

    name = "core"
    paper = "arXiv:2411.19557"
    parts = FACTORS | {"R", "s"}
    trained = frozenset({"R"})
    linear_in = frozenset({frozenset({"R"})})
    loose = frozenset({"s"})
    init = "orthonormal"
    learning_rate = 2e-2

    def layer(self, shape: LayerShape, rank: int) -> Iterator[tuple[str, Shape]]:
        if rank % self.blocks:
            raise BouquetError(
                "the rank is not a multiple of the core's blocks",
                where="lora.rank",
                expected=f"a multiple of {self.blocks}",
                got=str(rank),
            )
        yield "A", (rank, shape.d_in)
        yield "B", (shape.d_out, rank)
        yield "R", (rank, rank // self.blocks)
        yield "s", (self.blocks,)

    def start(self, b: Tensor, a: Tensor, core: Tensor | None) -> Mapping[str, Tensor]:
        rank = len(a)
        square = torch.zeros(rank, rank // self.blocks) if core is None else core
        return {"A": a, "B": b, "R": square, "s": torch.ones(self.blocks)}

    def factors(self, tensors: Tensors, layer: str) -> tuple[Tensor, Tensor]:
        a, core = tensors[Key(layer, "A")], tensors[Key(layer, "R")]
        size = core.shape[1]
        right = (core.reshape(-1, size, size) @ a.reshape(-1, size, a.shape[1])).reshape(a.shape)
        return tensors[Key(layer, "B")], right

    def inject(self, module: Any) -> dict[str, list[nn.Parameter]]:
        cored = module.lora_A["default"] = CoredDown(module.lora_A["default"], self.blocks)
        return {
            "A": [cored.down.weight],
            "B": [module.lora_B["default"].weight],
            "R": [block.weight for block in cored.blocks],
            "s": list(cored.scales),
        }

    def chosen(self, key: Key, tensor: Tensor, slots: Sequence[int]) -> Tensor:
        return chosen_blocks(key, tensor, slots)


class CoredDown(nn.Module):
    """PEFT's ``lora_A``, followed by a core of ``blocks`` blocks."""

    def __init__(self, down: nn.Linear, blocks: int) -> None:
        super().__init__()
        size = down.out_features // blocks
        device = down.weight.device
        self.down = down
        self.blocks = nn.ModuleList(nn.Linear(size, size, bias=False, device=device) for _ in range(blocks))
        self.scales = nn.ParameterList(torch.ones(1, device=device) for _ in range(blocks))

    @property
    def weight(self) -> Tensor:
        """A; PEFT reads its type."""
        return self.down.weight

    @property
    def in_features(self) -> int:
        """The layer's inputs."""
        return self.down.in_features

    def forward(self, x: Tensor) -> Tensor:
        """``R(A(x))``, ``N x T x d_in`` to ``N x T x r``."""
        parts = self.down(x).chunk(len(self.blocks), dim=-1)
        return torch.cat(
            [scale * block(part) for scale, block, part in zip(self.scales, self.blocks, parts, strict=True)], dim=-1
        )
