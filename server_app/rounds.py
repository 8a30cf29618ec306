"""The round loop: when a round counts, and when the run is over."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flwr.app import ConfigRecord, Message, MessageType

from common.adapter.values import State
from common.error import BouquetError, QuorumError, brief
from common.readable import size
from common.record import checkpoint
from common.record.run import Run, number
from common.tasks import Score, Task
from server_app.intake import Intake, known
from server_app.nodes import Nodes, state_bytes
from server_app.record import Record, Stopwatch, peak_memory
from server_app.scores import judged, overall, read_noised, read_score
from server_app.spool import Spool
from strategies import RULES
from strategies.cost import round_bytes
from strategies.meter import Meter
from strategies.replies import explained, mean_metrics, raise_failure
from strategies.strategy import LoraStrategy

# The share of the ideal update that a rule may lose before it is worth a line.
WORTH_SAYING = 0.1
MAX_SAMPLE = 4000

Central = Callable[[State], Score]


@dataclass(frozen=True)
class Evaluation:
    """Held-out figures of one state: the task's metric over all nodes and for each, and the loss to judge it by."""

    overall: float
    judged: float
    nodes: dict[str, float]
    sample: str


@dataclass
class Outcome:
    """What the rounds came to."""

    state: State
    before: Evaluation | None = None
    after: Evaluation | None = None
    ended: QuorumError | None = None
    """Why the rounds ended before the last one, where that is not what was asked for."""


class Rounds:
    """Runs a strategy's rounds over the nodes. ``central`` scores a state on the coordinator's own data."""

    def __init__(
        self,
        nodes: Nodes,
        strategy: LoraStrategy,
        task: Task,
        record: Record,
        central: Central | None = None,
    ) -> None:
        self._nodes = nodes
        self._strategy = strategy
        self._task = task
        self._recipe = strategy.recipe
        self._config = strategy.recipe.config
        self._record = record
        self._central = central
        self._advised = False

    def run(self, state: State) -> Outcome:
        """All rounds that ``state`` has not seen yet, or as many as enough nodes are there for."""
        outcome = Outcome(state)
        try:
            # A private score is paid for, and a run that is resumed had its first one.
            if not (state.round and self._config.privacy.score_noise):
                outcome.before = outcome.after = self._evaluate(outcome)
            self._run(outcome)
        except QuorumError as reason:
            self._record.say(f"stopped after round {outcome.state.round}: {reason}")
            outcome.ended = reason
        return outcome

    def _run(self, outcome: Outcome) -> None:
        best, stale = (outcome.state, outcome.after), 0
        chosen = self._remembered(outcome.state.round)
        every, patience = self._config.evaluation.every, self._config.round.patience
        while outcome.state.round < self._config.num_server_rounds:
            self._finish_round(outcome)
            last = outcome.state.round == self._config.num_server_rounds
            if last or (every and outcome.state.round % every == 0):
                outcome.after = self._evaluate(outcome)
                better = best[1] is None or (outcome.after is not None and outcome.after.judged < best[1].judged)
                best, stale = ((outcome.state, outcome.after), 0) if better else (best, stale + 1)
                if outcome.after is not None and (chosen is None or outcome.after.judged <= chosen[1].judged):
                    chosen = outcome.state.round, outcome.after
            kept, also = self._config.checkpoint, {best[0].round, chosen[0] if chosen else 0}
            checkpoint.prune(self._record.checkpoints, kept.newest, kept.every, also=also)
            if patience and stale >= patience:
                self._record.say(f"no better for {stale} evaluations: stopped, round {best[0].round} is kept")
                outcome.state, outcome.after = best
                return
        if chosen is not None and self._config.evaluation.export == "best":
            self._choose(outcome, *chosen)

    def _remembered(self, done: int) -> tuple[int, Evaluation] | None:
        """Of the rounds of earlier sessions, the best one by its scores whose state is still there."""
        if not done:
            return None
        run, there = Run.read(self._record.folder), checkpoint.rounds(self._record.checkpoints)
        losses = {turn: loss for turn, loss in run.history("judged", "by").items() if turn in there and turn <= done}
        if not losses:
            return None
        turn, metric = min(losses, key=lambda turn: (losses[turn], -turn)), self._task.metric
        nodes = {node: number(events.get(turn, {}), metric) for node, events in run.by_node("evaluate").items()}
        told = {node: figure for node, figure in sorted(nodes.items()) if figure is not None}
        return turn, Evaluation(run.history("heldout", metric)[turn], losses[turn], told, "")

    def _choose(self, outcome: Outcome, turn: int, evaluation: Evaluation) -> None:
        """Let the run end with the state of an earlier round, where that is better and one model is all nodes'."""
        rule, last = self._strategy.rule, outcome.state.round
        if turn == last or self._recipe.own_models:
            return
        try:
            outcome.state = checkpoint.load(checkpoint.file_of(self._record.checkpoints, turn), rule.name)
        except BouquetError as error:  # what was trained is worth more than which round of it
            self._record.say(f"round {turn} of {last} was the best, and the last is exported: {error}")
            return
        outcome.after = evaluation
        self._record.event("chosen", turn, last=last)
        self._record.say(
            f"round {turn} of {last} is exported: the least held-out loss (evaluation.export=last takes the last)"
        )

    def _finish_round(self, outcome: Outcome) -> None:
        """One round, tried until it counts. Raises :class:`QuorumError` when it keeps failing."""
        retries, wait = self._config.round.retries, self._config.round.wait
        for tries in range(retries + 1):
            if tries:
                time.sleep(min(2.0 ** (tries - 1), wait))
            if self._train(outcome):
                return
        raise QuorumError(
            f"round {outcome.state.round + 1} failed {retries + 1} times; the reasons are above",
            where=str(self._record.folder),
            cure="Finished rounds are kept: mend the cause and start again with resume = true.",
        )

    def _train(self, outcome: Outcome) -> bool:
        """One round; True if enough nodes replied to count it. Raises :class:`QuorumError` if too few are there."""
        state, config, watch = outcome.state, self._config, Stopwatch()
        self._nodes.gather()
        nodes = self._nodes.sample(config.fraction_train, state.round)
        ranks = {self._nodes.names[node]: self._nodes.ranks[node] for node in nodes}
        self._record.event("asked", state.round + 1, nodes=list(ranks))
        messages = self._messages(MessageType.TRAIN, state, nodes)
        down = sum(map(state_bytes, messages))
        with Spool(self._record.folder / "spool") as spool:
            intake = Intake(self._nodes, self._strategy, self._record, state, spool)
            intake.take(messages)
            up = intake.bytes_up
            watch.lap("training")
            meter = self._meter(state, spool)
            merged = intake.merge(len(nodes), meter)
            if merged is None:
                needed, traffic = intake.needed, {"bytes_up": up, "bytes_down": down}
                self._record.event("void", state.round + 1, replies=len(spool), needed=needed, **traffic)
                self._record.say(
                    f"round {state.round + 1} does not count: {len(spool)} of {len(nodes)} replied, {needed} needed"
                )
                return False
            outcome.state = merged
            watch.lap("merging")
            if meter is not None:
                self._tell_lost(meter.read(merged), merged.round)
            watch.lap("measuring")
        checkpoint.save(self._record.checkpoints, outcome.state, self._strategy.rule.name)
        watch.lap("saving")
        means = mean_metrics(intake.told)
        # A private run tells no loss.
        loss = {"loss": means["loss"]} if "loss" in means else {}
        said = f"loss {means['loss']:.3f}  " if loss else ""
        facts = {**loss, "bytes_up": up, "bytes_down": down, "seconds": watch.total, "phases": watch.seconds}
        values = round_bytes(self._recipe, state, ranks, spool.names)
        facts |= {"formula_up": values.up, "formula_down": values.down, "peak_memory": peak_memory()}
        self._record.event("merge", outcome.state.round, nodes=len(spool), asked=len(nodes), **facts)
        self._record.say(
            f"round {outcome.state.round}/{config.num_server_rounds}  {said}"
            f"{len(spool)}/{len(nodes)} nodes  up {size(up)}  down {size(down)}  {watch.total:.1f} s"
        )
        return True

    def _meter(self, state: State, updates: Spool) -> Meter | None:
        """What measures how much is lost in this round; None for an exact rule, and where nobody may know."""
        rule = self._strategy.rule
        scattered = rule.scattered and any(rank != state.rank for rank in self._nodes.ranks.values())
        if (rule.exact and not scattered) or self._recipe.personal or self._strategy.private_mean is not None:
            return None
        return Meter(rule, state, len(updates))

    def _tell_lost(self, errors: dict[str, float], round: int) -> None:
        """Record what a rule that is not exact has lost; say it once where an exact one would pay."""
        lost = errors.pop("")
        self._record.event("aggregation-error", round, overall=lost, layers=errors)
        if lost > WORTH_SAYING and not self._advised:
            exact = ", ".join(name for name, other in RULES.items() if other().exact)
            name = self._strategy.rule.name
            self._record.say(f"    {name} lost {lost:.0%} of the nodes' mean update; exact rules are {exact}")
            self._advised = True

    def _messages(self, message_type: str, state: State, nodes: list[int]) -> list[Message]:
        roll = self._nodes
        return self._strategy.messages(
            message_type,
            state,
            nodes,
            ranks=roll.ranks,
            names=roll.names,
            equipped=roll.equipped,
            ttl=self._config.round.ttl,
        )

    def _evaluate(self, outcome: Outcome) -> Evaluation | None:
        """Score the state on the nodes' held-out examples, and centrally; None where no node did.

        In a private run a node does under noise, if the run asks for it; those that have models of their own install
        the state all the same.
        """
        state, config, metric = outcome.state, self._config, self._task.metric
        private, noised = config.privacy.on, config.privacy.score_noise > 0
        if self._central is not None:
            self._score_centrally(state, self._central)
        if private and not (noised or self._recipe.own_models):
            return None
        watch = Stopwatch()
        nodes = self._nodes.sample(config.fraction_evaluate, state.round)
        messages = self._messages(MessageType.EVALUATE, state, nodes)
        prompted = bool(config.evaluation.prompt) and not private and not self._task.sequence_classification
        if messages and prompted:
            messages[0].content["config"] = ConfigRecord({"prompt": config.evaluation.prompt})
        teller = self._nodes.names[messages[0].metadata.dst_node_id] if messages and prompted else ""
        down = sum(map(state_bytes, messages))
        scores, figures, sample = dict[str, Score](), dict[str, float](), ""
        for name, message in self._nodes.exchange(messages):
            try:
                raise_failure(message)
                if private and not noised:
                    continue
                score, metrics = (read_noised if private else read_score)(message, self._task)
                told = self._task.figures(score)
            except Exception as reason:  # see above
                self._nodes.failed("evaluate", state.round, name, explained(reason))
                continue
            scores[name], figures[name] = score, told[metric]
            self._record.event("evaluate", state.round, node=name, **told, **known(metrics))
            if name == teller and "sample" in message.content.config_records:
                sample = brief(message.content.config_records["sample"].get("text", ""), MAX_SAMPLE)
        watch.lap("evaluation")
        self._record.event("evaluation", state.round, asked=len(nodes), bytes_down=down, seconds=watch.total)
        if not figures:
            return None
        total, left_out = overall(scores)
        for name in left_out:
            said = f"counts {scores[name].count:,} examples, far more than the others: not in the overall score"
            self._record.note("implausible", state.round, name, said, count=scores[name].count)
        evaluation = Evaluation(self._task.figure(total), judged(scores), dict(sorted(figures.items())), sample)
        together = self._task.figures(total)
        classes = {"classes": by_class} if (by_class := self._task.by_class(total)) else {}
        self._record.event("heldout", state.round, loss=total.loss / total.count, **together, **classes)
        self._record.event("judged", state.round, by=evaluation.judged)
        self._record.say(f"    held-out {_figures(together)} over {len(figures)} nodes{', noised' if private else ''}")
        if prompted and not sample and not state.round:
            self._record.say("    the prompt is not continued: the node's policy lets no generated text leave")
        return evaluation

    def _score_centrally(self, state: State, central: Central) -> None:
        """Score the state on the coordinator's own held-out examples."""
        watch = Stopwatch()
        score = central(state)
        figures = self._task.figures(score)
        watch.lap("central")
        self._record.event("central", state.round, loss=score.loss / score.count, **figures, seconds=watch.total)
        self._record.say(f"    central {_figures(figures)}")


def _figures(figures: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {figure:.4g}" for name, figure in figures.items())
