"""One run of the federation: config, rule, task and strategy; then the rounds; then what the run leaves behind."""

from flwr.app import Context
from flwr.serverapp import Grid

from common import durable, tasks
from common.adapter.algebra import digest
from common.adapter.spec import Spec
from common.adapter.values import State
from common.config import roster
from common.config.roster import Roster
from common.config.run import RunConfig
from common.privacy.accounting import plan
from common.readable import size
from common.record import checkpoint
from common.record.directory import AS_ASKED, TOO_FEW, Summary
from common.record.events import RuleFacts, Stalled, Start
from common.tasks import Task
from server_app.costs import peak_memory
from server_app.nodes import Nodes
from server_app.progress import stalled
from server_app.record import Record
from server_app.rounds import Outcome, Rounds
from server_app.scoring import Central, Scoring
from strategies import Recipe
from strategies.inits import PublicInit
from strategies.private_mean import PrivateMean
from strategies.strategy import LoraStrategy, Weigh


def conduct(grid: Grid, context: Context) -> None:
    """One run, from its config to its adapter. Raises :class:`BouquetError` on what a user can mend."""
    recipe = Recipe.read(context.run_config)
    config, rule, task = recipe.config, recipe.rule, tasks.build(recipe.config.task)
    with Record(config, context.run_id) as record:
        record.say(f"run directory {record.folder}")
        site = roster.of_this_site()
        nodes = Nodes(grid, recipe, record, site)
        nodes.summon()

        # The nodes read their data meanwhile; what knows models takes seconds to import on both sides.
        from common.models import adapted, lengths

        spec = adapted.describe(config.model, config.lora, config.task, recipe.structure)
        lengths.widest(config)
        nodes.admit()
        if config.resume and (saved := checkpoint.latest(record.checkpoints, rule.name)):
            state = saved
            record.say(f"resumed after round {state.round}")
        else:
            state = _start(recipe, spec, record)
        _introduce(config, spec, record)
        strategy = LoraStrategy(recipe, private_mean=_private_mean(recipe), weigh=_weigh(config, site))
        record.event(
            Start(
                round=state.round,
                rule=_told(recipe),
                layers=len(spec.layers),
                nodes=tuple(sorted(nodes.names.values())),
                names="proven" if site is not None else "claimed",
            )
        )
        scoring = Scoring(nodes, strategy, task, record, _central(recipe))
        outcome = Rounds(nodes, strategy, scoring, record, state).run()
        _leave(recipe, outcome.state, record)
        if said := stalled(outcome, recipe, task):
            record.event(Stalled(round=outcome.state.round, said=said))
            record.say(said)
        _report(outcome, task, record)
        if outcome.ended is not None:
            raise outcome.ended


def _introduce(config: RunConfig, spec: Spec, record: Record) -> None:
    """Say what is trained, how much of the model that is, and what leaves a node."""
    from common.models import base
    from common.models.coverage import coverage

    commit = base.commit(config.model)
    named = f"{config.model.name} at {commit}" if commit else config.model.name
    record.say(
        f"{named} ({config.model.quantization}), {len(spec.layers)} layers of rank {spec.rank}, "
        f"rule {config.rule}, {config.num_server_rounds} rounds"
    )
    shares = coverage(base.skeleton(config.model, tasks.classes(config.task)), spec.layers, config.model.quantization)
    record.say(f"of the base's weights {shares.adapted:.0%} are adapted, {shares.quantised:.0%} are quantised")
    if config.privacy.on:
        scores = "noised scores" if config.privacy.score_noise else "no figure"
        record.say(f"private ({config.privacy.mode}): {scores} and no text leave a node")


def _leave(recipe: Recipe, state: State, record: Record) -> None:
    """Export the adapter that the run has come to, where it has one."""
    from common.record.export import export

    if recipe.personal:
        record.say("no global model: each node has its own adapter in its state directory")
        return
    with durable.writing("the adapter", record.adapter):
        final, with_head = recipe.rule.view(state, state.rank), recipe.config.task.head != "local"
        export(final, recipe.config, record.adapter, with_head=with_head)


def _start(recipe: Recipe, spec: Spec, record: Record) -> State:
    """The state before the first round; of the inits, some have to see the base model for it."""
    from common.record import peft_folder
    from server_app.start import seen, told

    init, config = recipe.init, recipe.config
    given, sight = peft_folder.given(config, spec), None
    if recipe.sees != "nothing":
        examples = f" and {init.examples} examples of {init.source}" if isinstance(init, PublicInit) else ""
        record.say(f"the adapter is initialised from the base model{examples}")
        sight = seen(recipe, given)
    state = recipe.start(spec, config.seed, sight, given)
    if given is not None:
        record.say(told(recipe, given, state))
    return state


def _private_mean(recipe: Recipe) -> PrivateMean | None:
    """The coordinator's own part in privacy, where it has one; its noise is for a node that is in every round."""
    config, rule = recipe.config, recipe.rule
    if not config.privacy.central:
        return None
    release = plan(config.privacy, records=1, steps_per_round=1, rounds=config.num_server_rounds)
    return PrivateMean(config.privacy.clip, release.noise_multiplier, rule.relative)


def _weigh(config: RunConfig, site: Roster | None) -> Weigh | None:
    """The nodes' weights; None where each has the one that it claims, since nobody else knows it."""
    if config.train.weighting == "uniform":
        return lambda name: 1.0
    if config.train.weighting == "declared" and site is not None:
        declared = {node.name: node.weight for node in site.values()}
        return lambda name: declared.get(name, 1.0)
    return None


def _central(recipe: Recipe) -> Central | None:
    if not recipe.config.evaluation.source:
        return None
    from server_app.evaluation import central  # what reads data takes seconds to import

    return central(recipe)


def _told(recipe: Recipe) -> RuleFacts:
    """What a report has to know of a rule, and finds nowhere else."""
    return RuleFacts(
        paper=recipe.rule.paper,
        exact=recipe.rule.exact,
        personal=recipe.personal,
        learning_rate=recipe.rule.rate,
    )


def _report(outcome: Outcome, task: Task, record: Record) -> None:
    """The closing table, and the same figures in ``summary.json``."""
    before, after, crossed = outcome.before, outcome.after, record.tally.crossed
    if before and after:
        rows = [
            [name, f"{before.nodes[name]:.4g}" if name in before.nodes else "-", f"{figure:.4g}"]
            for name, figure in after.nodes.items()
        ]
        rows.append(["all nodes", f"{before.overall:.4g}", f"{after.overall:.4g}"])
        record.table(f"held-out {task.metric}", ["", "before", "after"], rows)
        if before.sample:
            record.say(f"before:\n{_indent(before.sample)}\nafter:\n{_indent(after.sample)}")
    record.say(f"bytes transferred: {size(crossed['up'])} up, {size(crossed['down'])} down")
    if record.adapter.exists():
        record.say(f"adapter: {record.adapter}")
    record.summarise(_summary(outcome, task, record))


def _summary(outcome: Outcome, task: Task, record: Record) -> Summary:
    before, after, tally = outcome.before, outcome.after, record.tally
    scored = before is not None and after is not None
    return Summary(
        rounds=outcome.state.round,
        ended=AS_ASKED if outcome.ended is None else TOO_FEW,
        bytes_up=tally.crossed["up"],
        bytes_down=tally.crossed["down"],
        failures=dict(sorted(tally.failures.items())),
        late=dict(sorted(tally.late.items())),
        peak_memory=peak_memory(),
        adapter=str(record.adapter),
        adapter_digest=digest(outcome.state.adapter | outcome.state.offset),
        metric=task.metric if scored else None,
        before=before.with_all if before and scored else None,
        after=after.with_all if after and scored else None,
    )


def _indent(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
