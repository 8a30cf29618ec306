"""Adapter folders: which one a path means, and the base model with it."""

from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftModel
from safetensors.torch import load_file
from transformers.utils import logging as transformers_logging

from common import tasks
from common.adapter import structures
from common.adapter.structure import LORA
from common.adapter.values import State
from common.config.node import NodeConfig
from common.config.run import RunConfig
from common.error import BouquetError
from common.models import base, placement
from common.record.directory import ADAPTER, CONFIG, Settings
from common.record.export import ABOUT, read
from common.record.form import answer_as_asked
from strategies import read_config
from strategies.recipe import own_models


class RunDirectory(NamedTuple):
    """A run directory: its config, and the name by which its nodes know it."""

    folder: Path
    config: RunConfig
    name: str


def open_run(folder: Path) -> RunDirectory:
    """Read a run directory. Raises :class:`BouquetError` where ``folder`` is none."""
    found = Settings.read(folder)
    if not found.config:
        raise BouquetError(
            "there is no run or adapter here",
            where=str(folder),
            expected=f"a run directory with {CONFIG}, or an adapter folder with {ABOUT}",
            got=f"a {CONFIG} without a config" if (folder / CONFIG).exists() else f"no {CONFIG}",
            cure="bouquet run writes its runs to runs/, plain flwr run to ~/.bouquet/runs.",
        )
    return RunDirectory(folder, read_config(found.config), found.run or folder.name)


def find(path: Path, node: str = "", state_directory: Path | None = None) -> Path:
    """The adapter folder that is meant: ``path`` itself, the run's, or the one of a node of the run.

    Raises :class:`BouquetError` where there is none, and says where there may be one.
    """
    if (path / ABOUT).is_file():
        demand_run(path, node)
        return path
    run = open_run(path)
    if node:
        return of_node(run, node, state_directory)
    demand_global(run, state_directory)
    if not (path / ADAPTER / ABOUT).is_file():
        raise BouquetError(
            "the run has left no adapter",
            where=str(path / ADAPTER),
            cure=f"It is not finished: bouquet export {path} --to ... exports its newest checkpoint.",
        )
    return path / ADAPTER


def demand_run(folder: Path, node: str) -> None:
    """Raise :class:`BouquetError` where a node is asked for in a folder that holds one adapter."""
    if node:
        raise BouquetError(
            "this is an adapter already",
            where=f"--node {node}",
            expected="a run directory",
            got=str(folder),
            cure="Leave --node out, or name the run.",
        )


def of_node(run: RunDirectory, node: str, state_directory: Path | None) -> Path:
    """The folder of a node's own adapter, in the state directory on the node's machine."""
    state = state_directory or NodeConfig().state
    folder = state / "runs" / run.name / node / "adapter"
    if not (folder / ABOUT).is_file():
        raise BouquetError(
            f"the node '{node}' has no adapter of its own here",
            where=str(folder),
            expected=_nodes(state / "runs" / run.name),
            cure="Nodes have one where the rule or the head is personal, each on its own machine.",
        )
    return folder


def demand_global(run: RunDirectory, state_directory: Path | None) -> None:
    """Raise :class:`BouquetError` where a run has no model but its nodes' own."""
    if own_models(run.config):
        folder = (state_directory or NodeConfig().state) / "runs" / run.name
        raise BouquetError(
            "the run has no global model: every node has its own",
            where=f"rule.name = '{run.config.rule}', task.head = '{run.config.task.head}'",
            expected=f"--node, {_nodes(folder)}",
            cure="On the node's own machine its adapter is <state-directory>/runs/<run>/<node>/adapter; name that.",
        )


def _nodes(folder: Path) -> str:
    names = sorted(own.parent.name for own in folder.glob("*/adapter"))
    return f"one of {', '.join(names)}" if names else f"a node, but none has an adapter in {folder}"


def settings(folder: Path, model: str = "") -> RunConfig:
    """The settings that an adapter was trained with; ``model`` is where its base is now, if it has moved."""
    return moved(read_config(read(folder).settings), model)


def moved(config: RunConfig, model: str) -> RunConfig:
    """The same settings with the base model in another place; none says that it has not moved.

    Raises :class:`BouquetError` where it has.
    """
    name = model or config.model.name
    if Path(name).expanduser().exists():
        name = str(Path(name).expanduser().resolve())
    try:
        base.location(name)
    except BouquetError as error:
        raise BouquetError(
            "the base model is missing", where="model.name", got=name, cure="Say where it is: --model PLACE."
        ) from error
    return config.model_copy(update={"model": config.model.model_copy(update={"name": name})})


def lora(folder: Path) -> State:
    """The LoRA in an adapter folder. Raises :class:`BouquetError` where PEFT keeps something else there."""
    state = read(folder).state
    if (form := structures.of(state.adapter).form) != LORA:
        raise BouquetError(
            "the adapter is no LoRA",
            where=str(folder),
            expected=LORA,
            got=form,
            cure="PEFT and bouquet chat load it as it is; bouquet export --form merged merges what a whole run left.",
        )
    return state


def load(folder: Path, config: RunConfig, device: str = "auto", name: str = "default") -> Any:
    """The base model with the adapter in ``folder``, to be evaluated: ids and a mask in, logits or vectors out."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # which weights are missing, and may be, is checked
    classes = tasks.classes(config.task)
    network: Any = base.load(config.model, classes, placement.find_device(device))
    if base.bare(config.model, classes):
        network.encoder = PeftModel.from_pretrained(network.encoder, str(folder), name)
        if classes:
            head = load_file(folder / "head.safetensors")
            network.classifier.load_state_dict({key.removeprefix("classifier."): head[key] for key in head})
    else:
        network = PeftModel.from_pretrained(network, str(folder), name)
    answer_as_asked(network)
    return network.eval()


def demand_language(name: str, config: RunConfig) -> None:
    """Raise :class:`BouquetError` for an adapter of a model with a head, that gives vectors, or is shown images."""
    if tasks.classes(config.task) is None:
        raise no_words(name)
    if tasks.classes(config.task):
        raise BouquetError(
            "a model with a head does not generate text",
            where=name,
            expected="an adapter of a language model",
            got=f"task.name = '{config.task.name}'",
            cure="Try it with bouquet chat; the README.md of an export has the code that loads it.",
        )
    if tasks.TASKS[config.task.name].sees:
        raise BouquetError(
            "an adapter that takes images is not served here",
            where=name,
            expected="an adapter of a text-only task",
            got=f"task.name = '{config.task.name}'",
            cure="Try it with bouquet chat --image; the README.md of an export has the code that loads it.",
        )


def no_words(where: str) -> BouquetError:
    """What is said to whoever wants an answer of an embedding model."""
    return BouquetError(
        "an embedding model does not generate text: its output is a vector",
        where=where,
        expected="an adapter of a classifier or a language model",
        got="task.name = 'embed'",
        cure="The README.md of bouquet export has the code that makes vectors with it.",
    )
