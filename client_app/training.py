"""The local loop of one round: what plain and private training share, and the plain gradient."""

import math
import random
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from common.adapter.values import HEAD, Key, Tensors
from common.config.run import TrainConfig
from common.error import BouquetError
from common.models.adapted import LoraModel
from common.tasks import Batch, Example, Task

Penalty = Callable[[Tensors], torch.Tensor | None]


@dataclass(frozen=True)
class Training:
    """What a round of local training did.

    ``loss`` is the mean over its steps; ``peak_memory`` is in bytes; ``clip`` is the norm that private training ended
    with.
    """

    loss: float
    steps: int
    tokens: int
    seconds: float
    peak_memory: int
    clip: float = 0.0


def train(
    model: LoraModel,
    keys: Sequence[Key],
    task: Task,
    examples: Sequence[Example],
    config: TrainConfig,
    *,
    pad: int,
    seed: str,
    round: int,
    rounds: int,
    blocks: Sequence[int] = (),
    penalty: Penalty = lambda _: None,
) -> Training:
    """Train ``keys`` of the model on ``examples``, and of a core only ``blocks`` if some are named.

    ``seed`` fixes the order of the examples and the dropout; ``penalty`` is a further term of the loss, over the
    trained tensors. Raises :class:`BouquetError` if the loss stops being finite.
    """
    model.train_only(keys, blocks)
    order = random.Random(seed)
    torch.manual_seed(order.getrandbits(63))
    batches = _batches(task, examples, config.batch_size, pad, order)

    def gradients(step: int) -> tuple[float, int]:
        total, tokens = 0.0, 0
        for _ in range(config.accumulation):
            batch = next(batches)
            tokens += int(batch["attention_mask"].sum())
            loss = task.loss(*outputs(model, batch)) / config.accumulation
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        if not math.isfinite(total):
            raise BouquetError(
                "the training loss is not finite",
                where=f"round {round + 1}, step {step + 1}",
                got=str(total),
                cure="Lower train.learning-rate, or use model.dtype = 'float32'.",
            )
        return total, tokens

    steps = steps_in_round(config, len(examples))
    return descend(model, keys, gradients, config, steps, round, rounds, penalty)


def descend(
    model: LoraModel,
    keys: Sequence[Key],
    gradients: Callable[[int], tuple[float, int]],
    config: TrainConfig,
    steps: int,
    round: int,
    rounds: int,
    penalty: Penalty = lambda _: None,
) -> Training:
    """AdamW from a fresh optimizer, along the ``gradients`` of what is not frozen of ``keys``.

    One schedule of the rate goes over all rounds.

    ``gradients`` takes the number of the step, leaves its gradients in the parameters, and returns its loss and tokens.
    """
    adapter = _trained(model, [key for key in keys if key.part not in HEAD])
    head = _trained(model, [key for key in keys if key.part in HEAD])
    parameters = [*adapter, *head]
    received = [parameter.detach().clone() for parameter in parameters] if config.proximal else []
    groups: list[dict[str, Any]] = [
        {"params": adapter},
        {"params": head, "lr": config.head_learning_rate or config.learning_rate},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay)
    factor = schedule(config, steps * rounds)
    scheduler = LambdaLR(optimizer, lambda step: factor(round * steps + step))
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)

    model.network.train()
    started = time.monotonic()
    total_loss, tokens = 0.0, 0
    for step in range(steps):
        loss, read = gradients(step)
        total_loss, tokens = total_loss + loss, tokens + read
        if (term := penalty(model.live(keys))) is not None:
            term.backward()  # type: ignore[no-untyped-call]
        if config.proximal:
            _pull_back(parameters, received, config.proximal)
        if config.clip_norm:
            nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)

    return Training(
        loss=total_loss / steps,
        steps=steps,
        tokens=tokens,
        seconds=time.monotonic() - started,
        peak_memory=_peak_memory(model.device),
    )


def outputs(model: LoraModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's logits of a batch, and the batch's labels beside them."""
    logits = model.logits(batch)
    return logits, batch["labels"].to(logits.device)


def steps_in_round(config: TrainConfig, examples: int) -> int:
    """Optimizer steps of one round: ``steps``, or as many as ``epochs`` passes take."""
    return config.steps or config.epochs * math.ceil(examples / (config.batch_size * config.accumulation))


def schedule(config: TrainConfig, total: int) -> Callable[[int], float]:
    """The factor of the learning rate at a step counted over all rounds, ``total`` steps in all."""
    warmup = int(config.warmup * total)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = (step - warmup) / max(1, total - warmup)
        if config.schedule == "constant":
            return 1.0
        return 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))

    return factor


def _trained(model: LoraModel, keys: Sequence[Key]) -> list[nn.Parameter]:
    """The parameters of ``keys`` that are not frozen."""
    return [parameter for key in keys for parameter in model.parameters(key) if parameter.requires_grad]


def _pull_back(parameters: Sequence[nn.Parameter], received: Sequence[torch.Tensor], mu: float) -> None:
    """Add the gradient of FedProx's term, mu / 2 |w - w_received|^2 (Li et al., arXiv:1812.06127, eq. 2)."""
    for parameter, start in zip(parameters, received, strict=True):
        if parameter.grad is not None:
            parameter.grad.add_(parameter.detach() - start, alpha=mu)


def _peak_memory(device: torch.device) -> int:
    """The most that was allocated on a GPU in this round, or that the process has had on a CPU; bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _batches(
    task: Task, examples: Sequence[Example], batch_size: int, pad: int, order: random.Random
) -> Iterator[Batch]:
    """Batches for ever: one shuffled pass after another, a short batch at the end of a pass included."""
    while True:
        shuffled = order.sample(list(examples), len(examples))
        for first in range(0, len(shuffled), batch_size):
            yield task.collate(shuffled[first : first + batch_size], pad)
