"""Differential privacy on the node: DP-SGD, and noise on the whole change.

**Example level** (Abadi et al., arXiv:1607.00133). Two data sets are neighbours if one has one unit more, a record or a
person with several. A step draws a Poisson sample (each unit by itself with probability q), clips every unit's gradient
to norm C over all that is trained, head included, sums, adds noise, and divides by the public expected batch. An empty
sample is a step of noise alone. Optimizer, rule, codec and server only see the noised sums; all they do is
post-processing. Not covered is what a unit's companions in a physical batch do to the last bits of its gradient: some
1e-7 of it in float32, which the mechanism's margin absorbs, but more where ``model.dtype`` is a 16-bit one, or where a
state is made to magnify it, which is looked for before the round and during it (:mod:`client_app.probe`).

**A failure is not a message.** Whether a round fails would tell the coordinator something of the data, so nothing that
goes wrong with a unit leaves the step: its physical batch is done again one unit at a time, and a unit that fails alone
counts as zero. What fails on made-up data fails before, and may be told.

**Update level, on the node.** Two data sets are neighbours if they are two data sets of one node, whatever is in them:
the change that leaves has norm at most C, so it can move by 2 C, and that is what the noise is for.

What must be unpredictable, to the server too, comes from the operating system and from no seed: the noise; the Poisson
samples, since who knows them gets no amplification by sampling; and dropout, whose masks go by position in the batch,
so that under a known seed one example more would change the gradient of every one after it.
"""

import math
import secrets
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace

import numpy as np
import torch

from client_app.clipping import Clip
from client_app.probe import probe, vocabulary
from client_app.shares import Share, Sums, Work, deal
from client_app.training import Training, Turn, descend, prepare
from client_app.units import Unit
from common.adapter.values import Key, Tensors
from common.error import BouquetError
from common.models.adapted import LoraModel
from common.privacy.accounting import Release
from common.privacy.gaussian import Gaussian
from common.privacy.gaussian import clip as clipped
from common.tasks import Task
from strategies import Recipe
from strategies.gradients import Engine
from strategies.objectives import Figures


def train_privately(
    model: LoraModel, recipe: Recipe, task: Task, units: Sequence[Unit], turn: Turn, release: Release
) -> Training:
    """Train the model on ``units`` by DP-SGD: ``release.steps`` steps, as noisy as ``release`` says.

    The figures returned are not private: they may not leave the node. Raises :class:`BouquetError` where the model does
    not keep made-up examples apart or cannot compute them, and where something trained has not moved; never because
    of what is in ``units``.
    """
    privacy, processes = recipe.config.privacy, turn.processes
    clip = Clip(privacy, release.noise_multiplier)
    failures = Counter[str]()
    with private_work(model, recipe, task, units, turn) as work:
        before = model.tensors()

        def gradients(step: int) -> Figures:
            mechanism = clip.mechanism
            deviation = mechanism.deviation / privacy.expected_batch
            sample = deal(poisson_sample(len(units), release.sample_rate), processes.number)
            shares = [{"step": step, "bound": mechanism.bound, "units": own} for own in sample]
            sums, (total, examples, tokens, surplus, broken, left_out) = processes.add_up(work, shares)
            for parameter, noised in mechanism.release(work.placed(sums)):
                gradient = recipe.optimizer.denoised(noised.div_(privacy.expected_batch), deviation)
                parameter.grad = gradient.to(parameter.dtype)
            clip.follow(surplus)
            failures.update(broken=int(broken), left_out=int(left_out))
            return total / max(1, examples), int(tokens)

        training = descend(model, recipe, turn, gradients, release.steps)
    _report(failures["broken"], failures["left_out"])
    if release.noise_multiplier:
        steps = range(min(2, release.steps))
        moved = [key for key in turn.keys if any(key.part not in recipe.optimizer.rests(step) for step in steps)]
        _check_moved(before, model.tensors(), moved)
    return replace(training, clip=clip.norm)


@contextmanager
def private_work(model: LoraModel, recipe: Recipe, task: Task, units: Sequence[Unit], turn: Turn) -> Iterator[Work]:
    """The clipped sum over a share's ``units``, each to the ``bound`` of the step, in float64 and without noise.

    Its figures are the loss, examples, tokens and surplus (:meth:`Engine.take_surplus`), and how many physical batches
    failed, and units alone.
    """
    model.train_only(turn.keys, turn.blocks)
    torch.manual_seed(secrets.randbits(63))
    with _engine(model, recipe, task, recipe.config.privacy.clip) as engine:
        batches = _Batches(engine, model, task, recipe.config.train.batch_size)

        def compute(share: Share) -> Sums:
            prepare(model, recipe, turn, share["step"])
            engine.rest(parameter for parameter in engine.parameters.values() if not parameter.requires_grad)
            probe(engine, model, task, share["step"])
            engine.bound = share["bound"]
            engine.take_surplus()
            loss, examples, tokens, broken, left_out = batches.add([units[each] for each in share["units"]])
            figures = loss, examples, tokens, engine.take_surplus(), broken, left_out
            taken = engine.take()
            return Sums([taken.get(parameter) for parameter in engine.parameters.values()], figures)

        yield Work(list(engine.parameters.values()), compute)


def check_apart(model: LoraModel, recipe: Recipe, task: Task, turn: Turn) -> None:
    """Raise :class:`BouquetError` if the model, as it is, cannot be trained privately; it is left as it was."""
    model.train_only(turn.keys, turn.blocks)
    with _engine(model, recipe, task, recipe.config.privacy.clip) as engine:
        probe(engine, model, task)


@contextmanager
def _engine(model: LoraModel, recipe: Recipe, task: Task, bound: float) -> Iterator[Engine]:
    """The recipe's engine on the model, and the batches as it wants them.

    Raises :class:`BouquetError` where layers are trained whose rows are images, of which an example may have several.
    """
    if model.seeing and not math.isinf(bound):
        raise BouquetError(
            "the vision layers have no gradient for each example",
            where="lora.targets, privacy.mode = 'example'",
            expected="layers of the language model",
            got=f"{model.seeing[0]}, one of {len(model.seeing)}",
            cure="Leave them out of lora.targets, or choose privacy.mode = 'update-local' or 'update-central'.",
        )
    gradient, sequences = recipe.gradient, not task.sequence_classification
    with (
        nullcontext() if gradient.packs else model.padded(),
        gradient.attach(model.network, bound, recipe.config.privacy.clipping, sequences) as engine,
    ):
        yield engine


def poisson_sample(count: int, rate: float) -> list[int]:
    """The indices below ``count`` that are in one step's sample, each by itself with probability ``rate``."""
    # 53 bits, so that comparing with a float64 is exact.
    drawn = np.frombuffer(secrets.token_bytes(8 * count), dtype=np.uint64) >> np.uint64(11)
    return [int(index) for index in np.flatnonzero(drawn < rate * 2.0**53)]


def privatise(start: Tensors | None, sent: Tensors, clip_norm: float, noise_multiplier: float) -> Tensors:
    """What may leave under update-level privacy: ``start`` plus the clipped, noised change to what is ``sent``.

    ``start`` is what the node received, None if what is sent is a change already. The change is one vector over all
    tensors. A change that is not finite counts as none.
    """
    mechanism = Gaussian(2 * clip_norm, noise_multiplier)
    # Not what is sent times zero: what is not finite would be told by the NaN that it leaves.
    zero = {key: torch.zeros_like(tensor) for key, tensor in sent.items()} if start is None else start
    start = {key: zero[key].double() for key in sent}
    change = clipped({key: tensor.double() - start[key] for key, tensor in sent.items()}, mechanism.bound / 2)
    return {key: (start[key] + noised).to(sent[key].dtype) for key, noised in mechanism.release(change)}


class _Batches:
    """Adds the clipped gradients of samples to the engine's sum, and lets nothing that goes wrong with them out."""

    def __init__(self, engine: Engine, model: LoraModel, task: Task, batch_size: int) -> None:
        self._engine = engine
        self._model = model
        self._task = task
        self._batch_size = batch_size

    def add(self, sample: Sequence[Unit]) -> tuple[float, int, int, int, int]:
        """Add a sample; the loss, examples and tokens of what did not fail, and how many batches and units did."""
        total, examples, tokens, broken, left_out = 0.0, 0, 0, 0, 0
        for batch in _physical_batches(sample, self._batch_size):
            computed = [self._try(batch)]
            if computed == [None]:
                broken += 1
                computed = [self._try([unit]) for unit in batch]
                left_out += computed.count(None)
            for loss, count, read in filter(None, computed):
                total, examples, tokens = total + loss, examples + count, tokens + read
        return total, examples, tokens, broken, left_out

    def _try(self, batch: Sequence[Unit]) -> tuple[float, int, int] | None:
        """Add a physical batch: its summed loss, examples and tokens; None, and nothing added, if that failed."""
        with suppress(Exception):
            return self._compute(batch)
        # Not before here has what the exception held been let go of.
        self._engine.forget()
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def _compute(self, batch: Sequence[Unit]) -> tuple[float, int, int]:
        examples = [example for unit in batch for example in unit]
        whose = torch.tensor([number for number, unit in enumerate(batch) for _ in unit]).repeat(self._task.rows)
        collated = self._task.collate(examples, self._model.pad)
        # On a GPU an index beyond the embedding would leave no way to go on.
        if int(collated["input_ids"].max()) >= vocabulary(self._model):
            raise IndexError
        output = self._model.outputs(collated)
        losses = self._task.losses(output)
        figures = float(losses.detach().sum()), len(examples), int(collated["attention_mask"].sum())
        # The last thing that can fail: nothing is added twice.
        self._engine.add(losses, whose if len(whose) > len(batch) else None, output.rows)
        return figures


def _report(broken: int, left_out: int) -> None:
    """Tell the operator, and nobody else, what failed."""
    if broken:
        print(
            f"{broken} physical batches failed and were redone one unit at a time; "
            f"{left_out} times a unit failed by itself and counted as zero; the coordinator is not told",
            file=sys.stderr,
        )


def _physical_batches(sample: Sequence[Unit], size: int) -> Iterator[Sequence[Unit]]:
    """Whole units of like length, together at most ``size`` examples; a unit of more is by itself."""
    batch: list[Unit] = []
    for unit in sorted(filter(None, sample), key=lambda unit: max(example.length for example in unit)):
        if batch and sum(map(len, batch)) + len(unit) > size:
            yield batch
            batch = []
        batch.append(unit)
    if batch:
        yield batch


def _check_moved(before: Tensors, after: Tensors, trained: Sequence[Key]) -> None:
    """Noise moves every tensor: one that stayed was trained somewhere else than in the model that is sent."""
    for key in trained:
        if torch.equal(before[key], after[key]):
            raise BouquetError(
                "a trained tensor has not moved in a private round",
                where=str(key),
                expected="a change in every tensor, if only by noise",
                got="the tensor that was received",
                cure="Raise train.learning-rate if it is tiny; otherwise what is trained is not what is sent.",
            )
