"""The local loop of one round: what plain and private training share, and the plain gradient."""

import math
import random
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from client_app import optimizer_state
from client_app.shares import ALONE, Processes, Share, Sums, Work, deal_batches
from common.adapter.draws import layer_seed
from common.adapter.values import HEAD, Key, State, Tensors
from common.config.run import TrainConfig
from common.error import BouquetError
from common.models.adapted import LoraModel
from common.tasks import Batch, Example, Task
from strategies import Recipe
from strategies.objectives import Figures
from strategies.optimizers import Group


@dataclass(frozen=True)
class Training:
    """What a round of local training did.

    ``loss`` is the mean over its steps; ``peak_memory`` is in bytes; ``clip`` is the norm that private training ended
    with; ``remembered`` is what the objective wants to have in the node's next round, and ``optimizer_state`` what the
    optimizer does, if the run keeps it.
    """

    loss: float
    steps: int
    tokens: int
    seconds: float
    peak_memory: int
    clip: float = 0.0
    remembered: Tensors = field(default_factory=dict)
    optimizer_state: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class Turn:
    """One round of local training: its number from 0, what it trains, and what the node has of its own for it.

    Of parts in blocks only ``blocks`` are trained, if some are named. ``seed`` fixes the order of the examples and the
    dropout of a run without privacy. ``offset`` is the state's, ``remembered`` the objective's, from the node's last
    round, and ``optimizer_state`` the optimizer's. ``processes`` have all begun the same turn. ``tell`` hears after
    each step how many are done, of how many, and the tokens of all of them.
    """

    number: int
    keys: Sequence[Key]
    blocks: Sequence[int] = ()
    seed: str = ""
    offset: Tensors = field(default_factory=dict)
    remembered: Tensors = field(default_factory=dict)
    processes: Processes = ALONE
    optimizer_state: Tensors = field(default_factory=dict)
    tell: Callable[[int, int, int], None] = lambda *_: None


def turn_of(
    recipe: Recipe, state: State, keys: Sequence[Key], seed: str = "", remembered: Tensors | None = None
) -> Turn:
    """The turn of the round after ``state``, in a model that has these ``keys``."""
    return Turn(state.round, recipe.trained(state.round, keys), state.slots, seed, state.offset, remembered or {})


def train(model: LoraModel, recipe: Recipe, task: Task, examples: Sequence[Example], turn: Turn) -> Training:
    """Train the model on ``examples``. Raises :class:`BouquetError` if the loss stops being finite."""
    config, processes = recipe.config.train, turn.processes
    order = random.Random(turn.seed)
    torch.manual_seed(order.getrandbits(63))
    batches = _batches(len(examples), config.batch_size, order)
    work = plain_work(model, recipe, task, examples, turn)

    def gradients(step: int) -> Figures:
        # The mean over all that the step learns, not the mean of its batches' means.
        drawn = list(islice(batches, config.accumulation))
        labels = (task.labels([examples[each] for each in batch]) for batch in drawn)
        weight = float(sum(task.weights(each).sum() for each in labels))
        dealt = deal_batches(drawn, processes.number, task.divisible)
        shares = [{"step": step, "batches": own, "weight": weight} for own in dealt]
        found, (total, tokens) = processes.add_up(work, shares)
        if not math.isfinite(total):
            raise BouquetError(
                "the training loss is not finite",
                where=f"round {turn.number + 1}, step {step + 1}",
                got=str(total),
                cure="Lower train.learning-rate, or use model.dtype = 'float32'.",
            )
        for parameter, gradient in work.placed(found).items():
            parameter.grad = gradient.to(parameter.dtype)
        return total, int(tokens)

    return descend(model, recipe, turn, gradients, steps_in_round(config, len(examples)))


def plain_work(model: LoraModel, recipe: Recipe, task: Task, examples: Sequence[Example], turn: Turn) -> Work:
    """The plain gradient: of a share's ``batches`` of ``examples``, by the ``weight`` of the whole step.

    Its figures are the loss, and the tokens.
    """
    model.train_only(turn.keys, turn.blocks)
    trained = list(_trained(model, turn.keys).values())

    def part(batch: Batch, weight: float) -> torch.Tensor:
        return task.sums(model.outputs(batch)).sum() / weight

    def compute(share: Share) -> Sums:
        prepare(model, recipe, turn, share["step"])
        for parameter in trained:
            parameter.grad = None
        batches = [task.collate([examples[each] for each in batch], model.pad) for batch in share["batches"]]
        parts = [recipe.gradient.fill(partial(part, batch, share["weight"]), trained) for batch in batches]
        total = torch.stack(parts).sum().item() if parts else 0.0
        tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        return Sums([parameter.grad for parameter in trained], (total, tokens))

    return Work(trained, compute)


def prepare(model: LoraModel, recipe: Recipe, turn: Turn, step: int) -> None:
    """Let the model compute a step of the round: as its structure draws it, and without what rests."""
    drawn = f"{turn.seed}/{step}" if recipe.structure.own_steps else str(step)
    model.step(layer_seed(recipe.config.seed, turn.number, drawn))
    if not recipe.optimizer.alternates():
        return
    for key in turn.keys:
        for parameter in model.parameters(key):
            parameter.requires_grad_(key.part not in recipe.optimizer.rests(step))


def descend(model: LoraModel, recipe: Recipe, turn: Turn, gradients: Callable[[int], Figures], steps: int) -> Training:
    """So many steps of the recipe's optimizer along ``gradients`` of what is not frozen.

    The optimizer is a fresh one in every round, or goes on with the state that is kept. One schedule of the rate goes
    over all rounds. ``gradients`` takes the number of the step, leaves its gradients in the parameters, and returns its
    loss and tokens.
    """
    config, objective = recipe.config.train, recipe.objective
    adapter = _trained(model, [key for key in turn.keys if key.part not in HEAD])
    head = _trained(model, [key for key in turn.keys if key.part in HEAD])
    named = adapter | head
    parameters = list(named.values())
    received = [parameter.detach().clone() for parameter in parameters]
    starts = zip(named, received, strict=True)
    remembered = [_at(turn.remembered, name, objective.first(start)) for name, start in starts]
    earlier = {key: tensor.to(model.device) for key, tensor in objective.earlier(turn.offset).items()}
    optimizer = _optimizer(model, recipe, turn, adapter, head)
    factor = schedule(config, steps * recipe.config.num_server_rounds)
    scheduler = LambdaLR(optimizer, lambda step: factor(turn.number * steps + step))
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)

    model.network.train(recipe.gradient.training)
    started = time.monotonic()
    total_loss, tokens = 0.0, 0
    for step in range(steps):
        loss, read = objective.gradients(partial(gradients, step), parameters)
        total_loss, tokens = total_loss + loss, tokens + read
        _add_penalties(recipe, model.live(turn.keys), earlier)
        objective.add(parameters, received, remembered)
        if config.clip_norm:
            nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        turn.tell(step + 1, steps, tokens)

    kept = objective.remember(parameters, received, remembered) if objective.remembers else []
    return Training(
        loss=total_loss / steps,
        steps=steps,
        tokens=tokens,
        seconds=time.monotonic() - started,
        peak_memory=peak_memory(model.device),
        remembered={name: tensor.cpu() for name, tensor in zip(named, kept, strict=True)} if kept else {},
        optimizer_state=optimizer_state.taken(optimizer, named) if config.keeps_optimizer else {},
    )


Named = Mapping[Key, nn.Parameter]


def _optimizer(model: LoraModel, recipe: Recipe, turn: Turn, adapter: Named, head: Named) -> torch.optim.Optimizer:
    """The recipe's, at the run's rates, with the state that is kept."""
    config = recipe.config.train
    rates = config.learning_rate, config.head_learning_rate or config.learning_rate
    groups = (Group(list(part.values()), rate) for part, rate in zip((adapter, head), rates, strict=True))
    optimizer = recipe.optimizer.build(model.pairs(), *groups)
    optimizer_state.put(optimizer, {**adapter, **head}, turn.optimizer_state)
    return optimizer


def _add_penalties(recipe: Recipe, live: Tensors, earlier: Tensors) -> None:
    """Add the gradients of the terms that look at the trained tensors and at no data."""
    terms = (recipe.rule.penalty(live), recipe.objective.penalty(live, earlier))
    if found := [term for term in terms if term is not None and term.requires_grad]:
        torch.stack(found).sum().backward()  # type: ignore[no-untyped-call]


def recalled(model: LoraModel, key: Key, remembered: Tensors) -> torch.Tensor:
    """What is remembered of one tensor of the model, its blocks one below the other; zero where nothing is."""
    parts = [_at(remembered, name, torch.zeros_like(parameter)) for name, parameter in _named(model, key)]
    return torch.cat(parts).detach().float().cpu()


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


def _trained(model: LoraModel, keys: Sequence[Key]) -> dict[Key, nn.Parameter]:
    """The parameters of ``keys`` that are not frozen, by their names."""
    found = {name: parameter for key in keys for name, parameter in _named(model, key)}
    return {name: parameter for name, parameter in found.items() if parameter.requires_grad}


def _named(model: LoraModel, key: Key) -> list[tuple[Key, nn.Parameter]]:
    """The parameters of one tensor with their names; those of a part in blocks by its layer and block."""
    parameters = model.parameters(key)
    if len(parameters) == 1:
        return [(key, parameters[0])]
    return [(Key(f"{key.layer}/{number}", key.part), parameter) for number, parameter in enumerate(parameters)]


def _at(tensors: Tensors, name: Key, first: torch.Tensor) -> torch.Tensor:
    """What is remembered of a parameter, where ``first`` lies; that where nothing is, or of another shape."""
    kept = tensors.get(name)
    return kept.to(first) if kept is not None and kept.shape == first.shape else first


def peak_memory(device: torch.device) -> int:
    """The most that was allocated on a GPU in this round, or that the process has had on a CPU; bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _batches(examples: int, batch_size: int, order: random.Random) -> Iterator[list[int]]:
    """Batches of so many examples for ever: one shuffled pass after another, a short batch at its end included."""
    while True:
        shuffled = order.sample(range(examples), examples)
        for first in range(0, examples, batch_size):
            yield shuffled[first : first + batch_size]
