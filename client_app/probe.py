"""A test of the model before a private round: whether every example has a gradient of its own.

Clipping bounds what an example adds to the sum, and that is a bound on what it changes only if it changes nothing of
what the others add. No list foresees how a model may couple them: batch normalisation, rotary embeddings that depend on
the longest text of a batch, experts that fold all tokens into rows. So made-up examples, never the node's, are computed
by themselves and together, and the two clipped sums have to be one.

It is done with what is trained as received, since a state may be made to magnify what rounding leaves of a companion,
and with made-up values in its place: LoRA starts with B = 0, where nothing of A shows. Because the first depends on the
state, nothing is remembered from one round to the next; it costs eight backward passes, none of more than three texts.
And because a learning rate may be chosen so that the steps of a round make such a state, it is done again as they go
on (:data:`OFTEN`); what it says then follows from the noised sums, and tells nothing that they do not.

What it finds is no proof: it sees some of the states of a round, on three texts that a coordinator knows.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from common.error import BouquetError
from common.models.adapted import LoraModel
from common.models.agreement import computing_type
from common.tasks import Example, Task
from strategies.gradients import Engine

TOLERANCES: Mapping[torch.dtype, float] = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
"""How far the two sums may lie apart, in the largest contribution: rounding alone, by the type that is computed in."""

OFTEN = frozenset(4**power for power in range(16))
"""The steps, counted from 0, before which the state is looked at again: as Adam's steps add up, ever more seldom."""

SHORT = 5
"""Tokens of the short text, of which ``task.max-length`` may be as few as four."""

SPREAD = 0.05
"""The deviation of made-up values of what is trained."""

DROPOUTS = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
ATTENTION = "scaled_dot_product_attention"


def probe(engine: Engine, model: LoraModel, task: Task, step: int = 0) -> None:
    """Raise :class:`BouquetError` unless ``engine`` adds up examples as if each were computed by itself.

    Nothing is added to the engine's sum, and parameters, buffers and the state of random generators are left as they
    were. Without a bound nothing is promised, and nothing looked at; nor is it before most ``step``s but the first.
    """
    if math.isinf(engine.bound) or not (step == 0 or step in OFTEN):
        return
    examples = made_up(model, task, min(SHORT, task.length - 1), task.length, task.length)
    tolerance = TOLERANCES[computing_type(model.network, TOLERANCES)]

    def contribution(chosen: Sequence[Example]) -> Tensor:
        output = model.outputs(task.collate(chosen, model.pad))
        whose = torch.arange(len(chosen)).repeat(task.rows) if task.rows > 1 else None
        engine.add(task.losses(output), whose, output.rows)
        return torch.cat([tensor.flatten() for tensor in engine.take().values()])

    with _left_as_it_was(model, engine.parameters.values(), engine.forget), _no_dropout():
        model.network.train()
        _compare(contribution, examples, tolerance, f"the state before step {step + 1}")
        if step:
            return
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in engine.parameters.values():
                parameter.copy_(SPREAD * torch.randn(parameter.shape, generator=generator))
        _compare(contribution, examples, tolerance, "made-up values of what is trained")


def probe_scores(model: LoraModel, task: Task) -> None:
    """Raise :class:`BouquetError` unless a text has the same score whatever was scored before it."""
    short, near, longest = made_up(model, task, min(SHORT, task.length - 1), task.length - 1, task.length)
    with _left_as_it_was(model, ()):
        going = [model.score(task, [example], 1).loss for example in (short, near, longest)]
        coming = [model.score(task, [example], 1).loss for example in (longest, near, short)]
    if going != coming[::-1]:
        raise BouquetError(
            "this model does not keep the examples of a batch apart",
            where="privacy.score-noise",
            expected="the same score for a made-up text, whatever was scored before it",
            got=f"{going} from the shortest on, and {coming[::-1]} from the longest",
            cure="Choose another model, or a task.max-length within what it was trained for.",
        )


def made_up(model: LoraModel, task: Task, *lengths: int) -> list[Example]:
    """A text of each length in tokens, the same ones every time, with valid labels."""
    generator, words = torch.Generator().manual_seed(0), vocabulary(model)
    drawn = [torch.randint(words, (length,), generator=generator).tolist() for length in lengths]
    texts = [[(token + 1) % words if token == model.pad else token for token in tokens] for tokens in drawn]
    return [task.made_up(tokens, number) for number, tokens in enumerate(texts)]


def vocabulary(model: LoraModel) -> int:
    """How many token ids the model knows."""
    size: int = model.network.config.get_text_config().vocab_size
    return size


def _compare(
    contribution: Callable[[Sequence[Example]], Tensor], examples: Sequence[Example], tolerance: float, where: str
) -> None:
    try:
        alone = [contribution([example]) for example in examples]
        apart = float((contribution(examples) - torch.stack(alone).sum(0)).norm())
    except BouquetError:
        raise
    except Exception as error:
        raise BouquetError(
            "the model cannot compute a made-up text",
            where=where,
            expected="a gradient for texts of up to task.max-length tokens",
            got=type(error).__name__,
            cure="Lower task.max-length to what the model can take; the node's log has the rest.",
        ) from error
    largest = max(float(each.norm()) for each in alone)
    if not apart <= tolerance * largest:
        raise BouquetError(
            "this model does not keep the examples of a batch apart",
            where=where,
            expected=f"gradients that do not depend on the batch, to {tolerance:g} of the largest",
            got=f"a difference of {apart / largest if largest else math.inf:.1e}",
            cure="Choose another model, or a task.max-length within what it was trained for.",
        )


@contextmanager
def _left_as_it_was(
    model: LoraModel, parameters: Iterable[Tensor], forget: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Put back what the probe, or a forward pass, changes of the network and of the generators' states.

    Transformers puts hooks on a model that is asked for its hidden states, and remembers it in an attribute: without
    either, or with both. So what a module's dictionaries hold, buffers and hooks among it, is put back too.
    """
    values = [(parameter, parameter.detach().clone()) for parameter in parameters]
    modules = [(module, dict(vars(module))) for module in model.network.modules()]
    held = [(own, dict(own)) for _, attributes in modules for own in attributes.values() if isinstance(own, dict)]
    contents = [(buffer, buffer.clone()) for buffer in model.network.buffers()]
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for module, attributes in modules:
            vars(module).clear()
            vars(module).update(attributes)
        for own, before in held:
            own.clear()
            own.update(before)
        forget()
        with torch.no_grad():
            for tensor, value in [*values, *contents]:
                tensor.copy_(value)


@contextmanager
def _no_dropout() -> Iterator[None]:
    """Training mode without its chance: every dropout hands on what it is given.

    The functions are exchanged, since a :class:`torch.overrides.TorchFunctionMode` is not on in a backward pass, and
    there gradient checkpointing computes again what it has dropped.
    """
    kept = {name: getattr(functional, name) for name in (*DROPOUTS, ATTENTION)}

    def attention(
        query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, *rest: Any, **options: Any
    ) -> Any:
        return kept[ATTENTION](query, key, value, attn_mask, 0.0, *rest, **options)

    try:
        for name in DROPOUTS:
            setattr(functional, name, _identity)
        setattr(functional, ATTENTION, attention)
        yield
    finally:
        for name, function in kept.items():
            setattr(functional, name, function)


def _identity(input: Tensor, *_: Any, **__: Any) -> Tensor:
    return input
