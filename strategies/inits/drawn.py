"""LoRA's own start, as PEFT draws it: A uniform (Kaiming, a = sqrt 5), B zero. Hu et al., arXiv:2106.09685."""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.adapter.draws import kaiming
from common.adapter.values import LayerShape
from strategies.inits.init import Init, Start


@dataclass(frozen=True, kw_only=True)
class Drawn(Init):
    """A drawn, B zero."""

    name = "drawn"
    paper = "arXiv:2106.09685"
    zero = True

    def factors(self, shape: LayerShape, rank: int, generator: torch.Generator, seen: Tensor | None) -> Start:
        return Start(torch.zeros(shape.d_out, rank), kaiming(rank, shape.d_in, generator))
