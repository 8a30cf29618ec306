"""A private score: merits and their number, under noise of this node's own.

Two data sets are neighbours if one has one unit more. That unit adds (m, 1) to (sum of merits, number of units), with m
from 0 to 1: a norm of at most sqrt 2. Each unit is scored by itself, so that its companions change nothing; one that
cannot be scored counts as absent.
"""

import math
from collections.abc import Sequence

import torch

from common.models.adapted import LoraModel
from common.privacy.gaussian import Gaussian
from common.tasks import Example, Task


def noised_score(
    model: LoraModel,
    task: Task,
    units: Sequence[Sequence[Example]],
    batch_size: int,
    noise_multiplier: float,
) -> dict[str, float]:
    """The sum of the units' merits and their number, both noised: ``merit`` and ``count``."""
    total = torch.zeros(2, dtype=torch.float64)
    for unit in units:
        total += torch.tensor(_merit(model, task, unit, batch_size), dtype=torch.float64)
    mechanism = Gaussian(math.sqrt(2), noise_multiplier)
    # The rounding to the grid may move the sum by what the mechanism keeps free for it.
    ((_, noised),) = mechanism.release({"score": total * (mechanism.bound / math.sqrt(2))})
    merit, count = noised.tolist()
    return {"merit": merit, "count": count}


def _merit(model: LoraModel, task: Task, unit: Sequence[Example], batch_size: int) -> tuple[float, float]:
    try:
        merit = task.merit(model.score(task, unit, batch_size))
    except Exception:
        return 0.0, 0.0
    return (min(max(merit, 0.0), 1.0), 1.0) if math.isfinite(merit) else (0.0, 0.0)
