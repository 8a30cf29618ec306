"""The round loop: when a round counts, and when the run is over."""

import time
from dataclasses import dataclass

from flwr.app import MessageType

from common.adapter.values import State
from common.error import BouquetError, QuorumError
from common.readable import size
from common.record import checkpoint, events
from common.record.run import Run, figures
from server_app.costs import Stopwatch, peak_memory
from server_app.intake import Intake
from server_app.nodes import Nodes
from server_app.record import Record
from server_app.scoring import Evaluation, Scoring
from server_app.spool import Spool
from server_app.transport import state_bytes
from strategies import RULES
from strategies.cost import round_bytes
from strategies.meter import Meter
from strategies.replies import mean_metrics
from strategies.strategy import LoraStrategy

# The share of the ideal update that a rule may lose before it is worth a line.
WORTH_SAYING = 0.1


@dataclass
class Outcome:
    """What the rounds came to."""

    state: State
    before: Evaluation | None = None
    after: Evaluation | None = None
    ended: QuorumError | None = None
    """Why the rounds ended before the last one, where that is not what was asked for."""


class Rounds:
    """Runs a strategy's rounds over the nodes, and has states scored between them."""

    def __init__(self, nodes: Nodes, strategy: LoraStrategy, scoring: Scoring, record: Record) -> None:
        self._nodes = nodes
        self._strategy = strategy
        self._scoring = scoring
        self._recipe = strategy.recipe
        self._config = strategy.recipe.config
        self._record = record
        self._advised = False

    def run(self, state: State) -> Outcome:
        """All rounds that ``state`` has not seen yet, or as many as enough nodes are there for."""
        outcome = Outcome(state)
        try:
            # A private score is paid for, and a run that is resumed had its first one.
            if not (state.round and self._config.privacy.score_noise):
                outcome.before = outcome.after = self._scoring.evaluate(outcome.state)
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
                outcome.after = self._scoring.evaluate(outcome.state)
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
        judged = run.history(events.Judged, lambda event: event.by)
        losses = {turn: loss for turn, loss in judged.items() if turn in there and turn <= done}
        if not losses:
            return None
        turn = min(losses, key=lambda turn: (losses[turn], -turn))
        scores = {
            node: figures(own, lambda event: event.score) for node, own in sorted(run.by_node(events.Evaluate).items())
        }
        told = {node: own[turn] for node, own in scores.items() if turn in own}
        return turn, Evaluation(run.held_out[turn], losses[turn], told, "")

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
        self._record.event(events.Chosen(round=turn, last=last))
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
        self._record.event(events.Asked(round=state.round + 1, nodes=tuple(ranks)))
        messages = self._nodes.address(self._strategy, MessageType.TRAIN, state, nodes)
        down = sum(map(state_bytes, messages))
        with Spool(self._record.folder / "spool") as spool:
            intake = Intake(self._nodes, self._strategy, self._record, state, spool)
            intake.take(messages)
            up = intake.bytes_up
            watch.lap("training")
            meter = self._meter(state, spool)
            merged = intake.merge(len(nodes), meter)
            if merged is None:
                self._tell_void(intake, len(nodes), len(spool), down)
                return False
            outcome.state = merged
            watch.lap("merging")
            if meter is not None:
                self._tell_lost(meter.read(merged), merged.round)
            watch.lap("measuring")
        checkpoint.save(self._record.checkpoints, outcome.state, self._strategy.rule.name)
        watch.lap("saving")
        values = round_bytes(self._recipe, state, ranks, spool.names)
        merge = events.Merge(
            round=outcome.state.round,
            nodes=len(spool),
            asked=len(nodes),
            loss=mean_metrics(intake.told).get("loss"),  # a private run tells none
            bytes_up=up,
            bytes_down=down,
            seconds=watch.total,
            phases=watch.seconds,
            formula_up=values.up,
            formula_down=values.down,
            peak_memory=peak_memory(),
        )
        self._tell_merge(merge)
        return True

    def _tell_void(self, intake: Intake, asked: int, replies: int, down: int) -> None:
        void = events.Void(
            round=intake.round,
            asked=asked,
            replies=replies,
            needed=intake.needed,
            bytes_up=intake.bytes_up,
            bytes_down=down,
        )
        self._record.event(void)
        replied = f"{void.replies} of {void.asked} replied, {void.needed} needed"
        self._record.say(f"round {void.round} does not count: {replied}")

    def _tell_merge(self, merge: events.Merge) -> None:
        self._record.event(merge)
        loss = "" if merge.loss is None else f"loss {merge.loss:.3f}  "
        self._record.say(
            f"round {merge.round}/{self._config.num_server_rounds}  {loss}{merge.nodes}/{merge.asked} nodes  "
            f"up {size(merge.bytes_up)}  down {size(merge.bytes_down)}  {merge.seconds:.1f} s"
        )

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
        self._record.event(events.AggregationError(round=round, overall=lost, layers=errors))
        if lost > WORTH_SAYING and not self._advised:
            exact = ", ".join(name for name, other in RULES.items() if other().exact)
            name = self._strategy.rule.name
            self._record.say(f"    {name} lost {lost:.0%} of the nodes' mean update; exact rules are {exact}")
            self._advised = True
