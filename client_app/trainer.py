"""A trainer of the operator's own: handed over by a script, run for a round, and asked for its score.

The script is what its writer would run by itself, with ``bouquet.patch(trainer)`` where it would train. Objective,
optimizer, schedule, batches and callbacks are the trainer's; the adapter comes from the run and goes back to it.
"""

import math
import random
import runpy
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from client_app.training import Training, Turn, peak_memory
from common.config.run import RunConfig
from common.error import BouquetError, RefusalError
from common.models import adapted
from common.models.adapted import LoraModel
from common.models.borrowed import borrow
from common.sources import files
from common.tasks import Score
from common.tasks.task import IGNORED

_handed_over: list[Any] = []


def patch(trainer: Any) -> None:
    """Let a node of Bouquet train with ``trainer``, a Transformers or TRL one over a PEFT model with one plain LoRA.

    A script calls it in the place of ``trainer.train()``, and is named in the node's config: ``script``. A node's
    process runs the script once and then trains with what it has handed over, in every round from the state that
    the coordinator sends, with a fresh optimizer. Without a node, it does nothing.

    Raises :class:`BouquetError` for a trainer that cannot be used again and again.
    """
    if trainer.optimizer is not None or trainer.model_init is not None:
        got = "an optimizer" if trainer.optimizer is not None else "model_init"
        _refuse("a trainer that cannot start afresh in every round", "optimizers, model_init", "none of them", got)
    for name in ("train_dataset", "eval_dataset"):
        found = getattr(trainer, name)
        if found is not None and (isinstance(found, dict) or not hasattr(found, "__len__")):
            _refuse("a data set whose examples cannot be counted", name, "one with a length", type(found).__name__)
    if not trainer.train_dataset:
        _refuse("a trainer without examples", "train_dataset", "at least one", "none")
    if trainer.args.include_num_input_tokens_seen == "no":
        trainer.args.include_num_input_tokens_seen = "non_padding"
    _handed_over[:] = [trainer]


def _refuse(what: str, where: str, expected: str, got: str) -> None:
    raise BouquetError(what, where=where, expected=expected, got=got, cure="Change the script.")


def stamp(script: str) -> files.Stamp:
    """The state of a script. Raises :class:`RefusalError` where there is none."""
    try:
        return files.stamp_of([Path(script).expanduser()])
    except OSError as error:
        raise RefusalError(
            "a node's script cannot be read",
            where="script, of the node's config",
            got=f"{script}: {error.strerror}",
            cure="Name a Python file that the user running the node can read.",
        ) from error


def trainer_of(script: str) -> Any:
    """The trainer that a script hands over; it is run once a process, and again where it has been changed.

    Raises :class:`BouquetError` where it hands none over, and whatever else the script raises.
    """
    return _trainer_of(str(Path(script).expanduser()), stamp(script))


def fitting(script: str, config: RunConfig) -> Any:
    """:func:`trainer_of`; raises :class:`RefusalError` where its model is not what the run trains."""
    trainer = trainer_of(script)
    borrow(trainer.model).check(adapted.describe(config.model, config.lora, config.task), config.model)
    return trainer


@lru_cache(maxsize=1)
def _trainer_of(program: str, _: files.Stamp) -> Any:
    _handed_over.clear()
    with _as_a_program(program):
        try:
            runpy.run_path(program, run_name="__main__")
        except SystemExit as ended:
            raise BouquetError("a node's script exits early", where=program, got=f"exit {ended.code}") from ended
    if not _handed_over:
        raise BouquetError(
            "a node's script does not hand over a trainer",
            where=program,
            cure="Let it call bouquet.patch(trainer) where it would call trainer.train().",
        )
    return _handed_over.pop()


@contextmanager
def _as_a_program(program: str) -> Iterator[None]:
    """While it lasts, the process has the arguments that a program has which was started without any."""
    arguments = sys.argv
    sys.argv = [program]
    try:
        yield
    finally:
        sys.argv = arguments


def train(trainer: Any, model: LoraModel, turn: Turn) -> Training:
    """One ``trainer.train()`` of what the turn trains. Raises :class:`BouquetError` if the loss is not finite."""
    model.train_only(turn.keys, turn.blocks)
    seed = random.Random(turn.seed).getrandbits(31)
    torch.manual_seed(seed)
    # With its own seed a trainer would begin every round with the same examples.
    trainer.args.data_seed = trainer.accelerator.dataloader_config.data_seed = seed
    trainer.optimizer = None
    started = time.monotonic()
    with _told(trainer, turn):
        done = trainer.train()
    if not math.isfinite(done.training_loss):
        raise BouquetError(
            "the training loss is not finite",
            where=f"round {turn.number + 1}",
            got=str(done.training_loss),
            cure="Lower the trainer's learning rate.",
        )
    return Training(
        loss=done.training_loss,
        steps=done.global_step,
        tokens=int(trainer.state.num_input_tokens_seen),
        seconds=time.monotonic() - started,
        peak_memory=peak_memory(model.device),
    )


@contextmanager
def _told(trainer: Any, turn: Turn) -> Iterator[None]:
    """While it lasts, the turn hears of every step of the trainer's."""

    class Teller(TrainerCallback):
        def on_step_end(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
        ) -> None:
            turn.tell(state.global_step, state.max_steps, int(state.num_input_tokens_seen))

    trainer.add_callback(teller := Teller())
    try:
        yield
    finally:
        trainer.remove_callback(teller)


def score(trainer: Any) -> Score:
    """What ``trainer.evaluate()`` says of its ``eval_dataset``, over the tokens that it predicts there."""
    if not trainer.eval_dataset:
        raise RefusalError(
            "a trainer without held-out examples",
            where="eval_dataset",
            cure="Give it some in the script, or let the run score elsewhere: evaluation.every=0.",
        )
    loss = trainer.evaluate()["eval_loss"]
    count = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in trainer.get_eval_dataloader())
    return Score(loss=loss * count, count=count)
