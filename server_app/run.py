"""One run of the federation: config, rule, task and strategy; then the rounds; then what the run leaves behind."""

from collections.abc import Callable

from flwr.app import Context
from flwr.serverapp import Grid
from transformers.utils import logging as transformers_logging

from common import models, tasks
from common.adapter import State, digest
from common.config import RunConfig
from common.export import export
from common.tasks import TASKS, Score, Task
from server_app import checkpoint
from server_app.record import Record, megabytes
from server_app.rounds import Outcome, Rounds
from strategies import RULES
from strategies.strategy import LoraStrategy


def conduct(grid: Grid, context: Context) -> None:
    """One run, from its config to its adapter. Raises :class:`BouquetError` on what a user can mend."""
    transformers_logging.disable_progress_bar()
    config = RunConfig.from_flower(context.run_config, {"rule.name": list(RULES), "task.name": list(TASKS)})
    rule = RULES[config.rule.name](head=config.task.head)
    task = tasks.build(config.task)
    spec = models.describe(config.model, config.lora, config.task)
    record = Record(config, context.run_id)
    record.say(
        f"bouquet: {config.model.name} ({config.model.quantization}), {len(spec.layers)} layers, rank {spec.rank}, "
        f"rule {rule.name}, {config.num_server_rounds} rounds\nrun directory {record.folder}"
    )
    strategy = LoraStrategy(rule, codec=config.wire.codec, seed=config.seed)
    state = rule.initial(spec, config.seed)
    if config.resume and (saved := checkpoint.latest(record.checkpoints, rule.name)):
        state = saved
        record.say(f"resumed after round {state.round}")
    outcome = Rounds(grid, strategy, task, config, record, _central(config)).run(state)
    export(outcome.state, config, record.adapter)
    _report(outcome, task, record)
    record.close()


def _central(config: RunConfig) -> Callable[[State], Score] | None:
    if not config.evaluation.source:
        return None
    from server_app.evaluation import central  # what reads data takes seconds to import

    return central(config)


def _report(outcome: Outcome, task: Task, record: Record) -> None:
    """The closing table, and the same figures in ``summary.json``."""
    before, after = outcome.before, outcome.after
    summary: dict[str, object] = {
        "rounds": outcome.state.round,
        "bytes_up": outcome.bytes_up,
        "bytes_down": outcome.bytes_down,
        "adapter": str(record.adapter),
        "adapter_digest": digest(outcome.state.adapter | outcome.state.offset),
    }
    if before and after:
        rows = [
            [name, f"{before.nodes[name]:.4g}" if name in before.nodes else "-", f"{figure:.4g}"]
            for name, figure in after.nodes.items()
        ]
        rows.append(["all nodes", f"{before.overall:.4g}", f"{after.overall:.4g}"])
        record.table(f"held-out {task.metric}", ["", "before", "after"], rows)
        summary |= {
            "metric": task.metric,
            "before": {"all": before.overall, **before.nodes},
            "after": {"all": after.overall, **after.nodes},
        }
        if before.sample:
            record.say(f"before:\n{_indent(before.sample)}\nafter:\n{_indent(after.sample)}")
    record.say(f"bytes that crossed: {megabytes(outcome.bytes_up)} up, {megabytes(outcome.bytes_down)} down")
    record.say(f"adapter: {record.adapter}")
    record.summarise(summary)


def _indent(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
