"""What is exported: the final state of a run, or one node's own adapter."""

from dataclasses import dataclass, replace
from pathlib import Path

from common import tasks
from common.adapter.algebra import digest
from common.adapter.values import State
from common.config.run import RunConfig
from common.error import BouquetError
from common.models import base, lengths
from common.record import checkpoint
from common.record.directory import CHECKPOINTS, SUMMARY, Summary
from common.record.export import ABOUT
from common.sources.records import fields
from deploy import adapters
from deploy.adapters import RunDirectory
from strategies import Recipe
from strategies.recipe import own_models

TEXTS = 8


@dataclass(frozen=True)
class Source:
    """A state, the settings of its run, and the run directory where it is at hand; ``node`` where it is a node's."""

    state: State
    config: RunConfig
    run: Path | None = None
    node: str = ""

    def texts(self, prompts: list[str]) -> list[tasks.Batch]:
        """Real inputs to compare models on: ``prompts``, or the first examples of the run's data; a batch of one each.

        Raises :class:`BouquetError` where there are neither.
        """
        config, tokenizer = self.config, base.load_tokenizer(self.config.model)
        place = config.evaluation.source or config.data.source
        task = lengths.widest(config, "" if prompts or self.run is None else place)
        if prompts:
            asked = [task.ask(prompt, tokenizer) for prompt in prompts]
            return [_batch(task, each._replace(tokens=each.tokens[: task.length])) for each in asked]
        if self.run is None:
            raise BouquetError("there are no texts to compare on", cure="Give some: --prompt '...' --prompt '...'.")
        from common.sources import dealing  # what reads data takes seconds to import

        try:
            found = dealing.read(place)
            task.check(fields(found), where=place)
            encoded, _ = tasks.encoded(task, found[: 4 * TEXTS], tokenizer)
            return [_batch(task, example) for record in encoded for example in record][:TEXTS]
        except BouquetError as error:
            raise BouquetError(
                "there are no texts to compare on",
                where="evaluation.source, data.source",
                got=str(error),
                cure="Give some: --prompt '...' --prompt '...'.",
            ) from error


def _batch(task: tasks.Task, example: tasks.Example) -> tasks.Batch:
    """What a model is given of the first text of one example."""
    batch = task.collate([example._replace(labels=[], against=None)], 0)
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def find(path: Path, node: str = "", state_directory: Path | None = None, model: str = "") -> Source:
    """The model at ``path``: a run directory, or an adapter folder.

    Raises :class:`BouquetError` where the run has none, or none of its own.
    """
    if (path / ABOUT).is_file():
        adapters.demand_run(path, node)
        config = adapters.settings(path, model)
        # <state-directory>/runs/<run>/<node>/adapter
        whose = path.resolve().parent.name if own_models(config) else ""
        return Source(adapters.lora(path), config, node=whose)
    run = adapters.open_run(path)
    config = adapters.moved(run.config, model)
    if node:
        return Source(adapters.lora(adapters.of_node(run, node, state_directory)), config, path, node)
    adapters.demand_global(run, state_directory)
    return Source(_state(run), config, path)


def _state(run: RunDirectory) -> State:
    """The state that the run ended with, or the newest of one that has not ended."""
    rule, folder = Recipe.build(run.config).rule, run.folder / CHECKPOINTS
    if summary := Summary.read(run.folder):
        state = checkpoint.load(checkpoint.file_of(folder, summary.rounds), rule.name)
        if digest(state.adapter | state.offset) != summary.adapter_digest:
            raise BouquetError("a checkpoint belongs to another run", where=str(folder), expected=f"{SUMMARY}'s digest")
    else:
        newest = checkpoint.latest(folder, rule.name)
        if newest is None:
            raise BouquetError(
                "the run has no checkpoint",
                where=str(folder),
                expected="round-0001.safetensors or a later one",
                cure="A run writes the first one after its first round that counts.",
            )
        print(f"the run is not finished: its state after round {newest.round} is exported")
        state = newest
    return replace(rule.view(state, state.rank), memory={})
