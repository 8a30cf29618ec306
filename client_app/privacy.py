"""Differential privacy on the node: DP-SGD, and noise on the whole change.

**Example level** (Abadi et al., arXiv:1607.00133). Two data sets are neighbours if one has one example more. A step
draws a Poisson sample (each example by itself with probability q), clips every example's gradient to norm C over all
that is trained, head included, sums, adds noise, and divides by the public expected batch. An empty sample is a step of
noise alone. Optimizer, rule, codec and server only see the noised sums; all they do is post-processing. Not covered is
what an example's companions in a physical batch do to the last bits of its gradient: some 1e-7 of it in float32, which
the mechanism's margin absorbs, but more where ``model.dtype`` is a 16-bit one.

**Update level, on the node.** Two data sets are neighbours if they are two data sets of one node, whatever is in them:
the change that leaves has norm at most C, so it can move by 2 C, and that is what the noise is for.

What must be unpredictable, to the server too, comes from the operating system and from no seed: the noise; the Poisson
samples, since who knows them gets no amplification by sampling; and dropout, whose masks go by position in the batch,
so that under a known seed one example more would change the gradient of every one after it.
"""

import secrets
from collections.abc import Sequence

import numpy as np
import torch

from client_app.per_example import Engine, attach
from client_app.training import Penalty, Training, descend, outputs
from common.accounting import Release
from common.adapter import Key, Tensors
from common.config import PrivacyConfig, TrainConfig
from common.error import BouquetError
from common.gaussian import Gaussian, clip
from common.models import LoraModel
from common.tasks import Example, Task


def train_privately(
    model: LoraModel,
    keys: Sequence[Key],
    task: Task,
    examples: Sequence[Example],
    config: TrainConfig,
    privacy: PrivacyConfig,
    release: Release,
    *,
    pad: int,
    round: int,
    rounds: int,
    blocks: Sequence[int] = (),
    penalty: Penalty = lambda _: None,
) -> Training:
    """Train ``keys`` of the model on ``examples`` by DP-SGD: ``release.steps`` steps, as noisy as ``release`` says.

    Of a core only ``blocks`` are trained, if some are named.

    The figures returned are not private: they may not leave the node. Raises :class:`BouquetError` where something
    trained has no per-example gradient, and where something trained has not moved.
    """
    model.train_only(keys, blocks)
    before = model.tensors()
    torch.manual_seed(secrets.randbits(63))
    mechanism = Gaussian(privacy.clip, release.noise_multiplier)
    with attach(privacy.engine, model.network, mechanism.bound, privacy.clipping) as engine:

        def gradients(_: int) -> tuple[float, int]:
            sample = [examples[index] for index in poisson_sample(len(examples), release.sample_rate)]
            figures = _accumulate(engine, model, task, sample, config.batch_size, pad)
            for parameter, noised in mechanism.release(engine.take()):
                parameter.grad = noised.div_(privacy.expected_batch).to(parameter.dtype)
            return figures

        training = descend(model, keys, gradients, config, release.steps, round, rounds, penalty)
    if release.noise_multiplier:
        _check_moved(before, model.tensors(), keys)
    return training


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
    start = {key: tensor.double() * 0 if start is None else start[key].double() for key, tensor in sent.items()}
    change = clip({key: tensor.double() - start[key] for key, tensor in sent.items()}, mechanism.bound / 2)
    return {key: (start[key] + noised).to(sent[key].dtype) for key, noised in mechanism.release(change)}


def _accumulate(
    engine: Engine, model: LoraModel, task: Task, sample: Sequence[Example], batch_size: int, pad: int
) -> tuple[float, int]:
    """Add the sample's clipped gradients, in physical batches of like length; the mean loss, and the tokens."""
    by_length = sorted(sample, key=lambda example: len(example.tokens))
    total, tokens = 0.0, 0
    for first in range(0, len(by_length), batch_size):
        batch = task.collate(by_length[first : first + batch_size], pad)
        losses = task.losses(*outputs(model, batch))
        engine.add(losses)
        total += float(losses.detach().sum())
        tokens += int(batch["attention_mask"].sum())
    return total / max(1, len(sample)), tokens


def _check_moved(before: Tensors, after: Tensors, trained: Sequence[Key]) -> None:
    """Noise moves every tensor: one that stayed was trained somewhere else than in the model that is sent."""
    for key in trained:
        if torch.equal(before[key], after[key]):
            raise BouquetError(
                "a trained tensor has not moved in a private round",
                where=str(key),
                expected="a change in every tensor, if only by noise",
                got="the tensor that was received",
                cure="Raise train.learning-rate if it is tiny; else what is trained is not what is sent.",
            )
