"""Seeded: the factors walk along directions that every side draws from numbered seeds; how far is all that is trained.

Qin et al., *Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication Cost under 18
Kilobytes*, arXiv:2312.06353 (ICML 2024): FedKSeed.

    w = w_0 + sum_s c_s z_s        w  A and B of all layers        c  K scalars        z_s  of 1 and -1, from the seed s

The update that travels is c, K values however large the model and its adapter. A_0 and B_0 are the init's, z_s is drawn
where it is needed and thrown away, so that a node holds no more than w. The paper walks in all weights of the model;
here it is in those of the adapter, so that the base stays as it is, in 4 bits if need be.

Directions are of signs where the paper's are normal: E[z z^T] is the identity for either, a sign costs one bit of an
integer draw, and integers are the same on every machine (Spall, *Multivariate Stochastic Approximation Using a
Simultaneous Perturbation Gradient Approximation*, 1992). The paper keeps sums of slopes, and its lr outside of them;
here c_s is how far w has gone, rate included, so that no schedule, clip or optimizer makes the replay another
walk than the node's. What it cannot tell is a step beside the directions: the weight decay of the published code
shrinks w itself, and the w that is rebuilt then is not the node's.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.adapter.draws import signs
from common.adapter.structure import Shape, Structure
from common.adapter.values import FACTORS, Key, LayerShape, Tensors
from common.method import option

POOL = Key("pool", "c")
AT_ONCE = 2**21
"""So many values of directions are in memory together, unless one direction has more."""


@dataclass(frozen=True, kw_only=True)
class Seeded(Structure):
    """Factors that walk along drawn directions; what is trained is how far along each."""

    seeds: int = option(1024, ge=1, le=4096)
    """K, the directions of the pool: so many values are sent, whatever the model."""

    name = "seeded"
    paper = "arXiv:2312.06353"
    parts = FACTORS | {POOL.part}
    trained = frozenset({POOL.part})
    linear_in = frozenset()
    loose = frozenset({POOL.part})
    cored = False
    gradient = "zeroth"
    optimizer = "sgd"
    own_steps = True

    def layer(self, shape: LayerShape, rank: int) -> Iterator[tuple[str, Shape]]:
        yield "A", (rank, shape.d_in)
        yield "B", (shape.d_out, rank)

    def start(self, b: Tensor, a: Tensor, core: Tensor | None) -> Mapping[str, Tensor]:
        return {"A": a, "B": b}

    def common(self) -> Tensors:
        return {POOL: torch.zeros(self.seeds)}

    def factors(self, tensors: Tensors, layer: str) -> tuple[Tensor, Tensor]:
        b, a = (_arrived(Key(layer, part), tensors) for part in "BA")
        return b, a

    def inject(self, module: Any) -> dict[str, list[nn.Parameter]]:
        down = module.lora_A["default"] = Walking(module.lora_A["default"])
        up = module.lora_B["default"] = Walking(module.lora_B["default"])
        return {"A": [down.weight], "B": [up.weight]}

    def join(self, modules: Mapping[str, Any]) -> dict[Key, list[nn.Parameter]]:
        pool = Pool(self.seeds)
        for layer, module in modules.items():
            module.lora_A["default"].follow(Key(layer, "A"), pool.values)
            module.lora_B["default"].follow(Key(layer, "B"), pool.values)
        next(iter(modules.values())).lora_A["default"].pool = pool
        return {POOL: list(pool.steps)}

    def step(self, module: Any, draw: int) -> None:
        pool = module.lora_A["default"].pool
        if pool is not None:
            pool.turn_to(draw)


class Pool(nn.Module):
    """The scalars: each a parameter, so that all but one may rest, over one tensor of all their values."""

    def __init__(self, seeds: int) -> None:
        super().__init__()
        # On the CPU wherever the model is: to see which have moved waits for no GPU.
        self.values = torch.zeros(seeds, device="cpu")
        self.steps = nn.ParameterList(nn.Parameter(value) for value in torch.split(self.values, 1))

    def turn_to(self, draw: int) -> None:
        """Let one direction be trained, by a random number, and the others rest."""
        for number, step in enumerate(self.steps):
            step.requires_grad_(number == draw % len(self.steps))


class Walking(nn.Module):
    """A linear layer of PEFT's, as far along its directions as the pool says; PEFT reads its ``weight``'s type."""

    _followed: Tensor
    _walked: Tensor

    def __init__(self, start: nn.Linear) -> None:
        super().__init__()
        self.start: Any = start
        self.pool: Pool | None = None

    def follow(self, key: Key, values: Tensor) -> None:
        """From here on, be where ``values`` say; ``key`` is whose directions they are."""
        self._key, self._values = key, values
        self.register_buffer("_followed", torch.zeros_like(values), persistent=False)
        # In float64 a walk there and back ends where it began.
        walked = torch.zeros_like(self.start.weight, dtype=torch.float64)
        self.register_buffer("_walked", walked, persistent=False)

    @property
    def weight(self) -> nn.Parameter:
        """The start's."""
        weight: nn.Parameter = self.start.weight
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """``(w_0 + sum_s c_s z_s) x``."""
        walk(self._walked, self._key, self._values.double() - self._followed.double())
        self._followed.copy_(self._values)
        return nn.functional.linear(x, self.weight + self._walked.to(self.weight.dtype))


@torch.no_grad()
def walk(walked: Tensor, key: Key, steps: Tensor) -> None:
    """Add ``sum_s steps_s z_s`` of one factor to ``walked``."""
    count, device = walked.numel(), walked.device
    for seeds in torch.split(steps.nonzero().flatten(), max(1, AT_ONCE // count)):
        walked += (steps[seeds].to(device) @ signs(seeds.to(device), count, str(key))).view_as(walked)


def _arrived(key: Key, tensors: Tensors) -> Tensor:
    """A factor where its walk has come to."""
    start = tensors[key]
    walked = torch.zeros_like(start, dtype=torch.float64)
    walk(walked, key, tensors[POOL].double())
    return start + walked.to(start.dtype)
