"""The round loop: when a round counts, and when the run is over."""

import time
from dataclasses import dataclass

from flwr.app import Message, MessageType

from common.adapter.values import State
from common.error import BouquetError, QuorumError
from common.readable import size
from common.record import checkpoint, events
from server_app.costs import Stopwatch, peak_memory
from server_app.intake import Intake
from server_app.nodes import Nodes
from server_app.record import Record
from server_app.scoring import Evaluation, Scoring
from server_app.spool import Spool
from server_app.standing import Standing
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
    """Runs a strategy's rounds over the nodes: all that ``state`` has not seen yet.

    A round brings the score of the state that it starts from; the last state is scored by itself. A long class, so that
    the whole of a round can be read at a stretch.
    """

    def __init__(self, nodes: Nodes, strategy: LoraStrategy, scoring: Scoring, record: Record, state: State) -> None:
        self._nodes = nodes
        self._strategy = strategy
        self._scoring = scoring
        self._recipe = strategy.recipe
        self._config = strategy.recipe.config
        self._record = record
        self._advised = False
        self._start = state
        self._standing = Standing.at_start(state, record.folder, record.checkpoints)

    def run(self) -> Outcome:
        """The rounds, or as many as enough nodes are there for."""
        state = self._start
        outcome = Outcome(state)
        try:
            # A private score is paid for, and a run that is resumed had its first one.
            if not (state.round and self._config.privacy.score_noise):
                self._scoring.begin(state)
            self._run(outcome)
        except QuorumError as reason:
            if self._scoring.open:
                self._judge(outcome, self._scoring.evaluate(outcome.state))
            self._record.say(f"stopped after round {outcome.state.round}: {reason}")
            outcome.ended = reason
        return outcome

    def _run(self, outcome: Outcome) -> None:
        last, every = self._config.num_server_rounds, self._config.evaluation.every
        while outcome.state.round < last and not self._over:
            self._finish_round(outcome)
            done = outcome.state.round
            if not self._over and (done == last or (every and done % every == 0)):
                self._scoring.begin(outcome.state)
        if self._scoring.open:
            self._judge(outcome, self._scoring.evaluate(outcome.state))
            self._prune()
        if self._over:
            best, stale = self._standing.best, self._standing.stale
            self._record.say(f"no improvement for {stale} evaluations: stopped, round {best[0].round} is kept")
            outcome.state, outcome.after = best
        elif self._standing.chosen is not None and self._config.evaluation.export == "best":
            self._choose(outcome, *self._standing.chosen)

    @property
    def _over(self) -> bool:
        """Whether the scores have not become better for as long as the run has patience."""
        return 0 < self._config.round.patience <= self._standing.stale

    def _judge(self, outcome: Outcome, evaluation: Evaluation | None) -> None:
        """Take in the score of the newest state."""
        if outcome.state is self._start:
            outcome.before = evaluation
        outcome.after = evaluation
        self._standing.judge(outcome.state, evaluation)

    def _prune(self) -> None:
        """Leave the checkpoints that are kept, and those that may be asked for."""
        kept = self._config.checkpoint
        checkpoint.prune(self._record.checkpoints, kept.newest, kept.every, also=self._standing.rounds)

    def _choose(self, outcome: Outcome, turn: int, evaluation: Evaluation) -> None:
        """Let the run end with the state of an earlier round, where that is better and one model is all nodes'."""
        rule, last = self._strategy.rule, outcome.state.round
        if turn == last or self._recipe.own_models:
            return
        try:
            outcome.state = checkpoint.load(checkpoint.file_of(self._record.checkpoints, turn), rule.name)
        except BouquetError as error:  # what was trained is worth more than which round of it
            self._record.say(f"round {turn} of {last} was the best, but the last is exported: {error}")
            return
        outcome.after = evaluation
        self._record.event(events.Chosen(round=turn, last=last))
        self._record.say(
            f"round {turn} of {last} is exported: the lowest held-out loss (evaluation.export=last exports the last)"
        )

    def _finish_round(self, outcome: Outcome) -> None:
        """One round, tried until it counts, or until a score ends the run before it.

        Raises :class:`QuorumError` when it keeps failing.
        """
        retries, wait = self._config.round.retries, self._config.round.wait
        # A private node pays for what it trains, and is not to train in vain.
        may_end = self._config.privacy.on and self._standing.next_may_end(self._config.round.patience)
        if self._scoring.open and may_end:
            self._judge(outcome, self._scoring.evaluate(outcome.state))
            if self._over:
                return
        for tries in range(retries + 1):
            if tries:
                time.sleep(min(2.0 ** (tries - 1), wait))
            if self._train(outcome) or self._over:
                return
        raise QuorumError(
            f"round {outcome.state.round + 1} failed {retries + 1} times; the reasons are above",
            where=str(self._record.folder),
            cure="Finished rounds are kept: fix the cause and start again with resume = true.",
        )

    def _train(self, outcome: Outcome) -> bool:
        """One round; True if enough nodes replied to count it. Raises :class:`QuorumError` if too few are there."""
        state, watch = outcome.state, Stopwatch()
        messages, ranks = self._address(state)
        down = sum(map(state_bytes, messages))
        with Spool(self._record.folder / "spool") as spool:
            intake = Intake(self._nodes, self._strategy, self._record, state, spool)
            intake.take(messages, self._scoring.hear)
            up = intake.bytes_up
            watch.lap("training")
            if self._scoring.open and len(spool) >= intake.needed:
                self._judge(outcome, self._scoring.conclude())
            if self._over:
                self._tell_dropped(intake, len(ranks), len(spool), down)
                return False
            meter = self._meter(state, spool)
            merged = intake.merge(len(ranks), meter)
            if merged is None:
                self._tell_void(intake, len(ranks), len(spool), down)
                return False
            outcome.state = merged
            watch.lap("merging")
            if meter is not None:
                self._tell_lost(meter.read(merged), merged.round)
            watch.lap("measuring")
        checkpoint.save(self._record.checkpoints, outcome.state, self._strategy.rule.name)
        self._prune()
        watch.lap("saving")
        values = round_bytes(self._recipe, state, ranks, spool.names)
        merge = events.Merge(
            round=outcome.state.round,
            nodes=len(spool),
            asked=len(ranks),
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

    def _address(self, state: State) -> tuple[list[Message], dict[str, int]]:
        """The messages of a round, once enough nodes are there, and the rank of each node by its name."""
        self._nodes.gather()
        nodes = self._nodes.sample(self._config.fraction_train, state.round)
        ranks = {self._nodes.names[node]: self._nodes.ranks[node] for node in nodes}
        self._record.event(events.Asked(round=state.round + 1, nodes=tuple(ranks)))
        messages = self._nodes.address(self._strategy, MessageType.TRAIN, state, nodes)
        self._scoring.ask(messages)
        return messages, ranks

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

    def _tell_dropped(self, intake: Intake, asked: int, replies: int, down: int) -> None:
        told = events.Dropped(
            round=intake.round, asked=asked, replies=replies, bytes_up=intake.bytes_up, bytes_down=down
        )
        self._record.event(told)

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
