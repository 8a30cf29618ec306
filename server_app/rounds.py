"""The round loop: when a round counts, and when the run is over."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from flwr.app import ConfigRecord, Message, MessageType

from common import checkpoint, wire
from common.adapter import State
from common.config import RunConfig
from common.error import BouquetError, RefusalError
from common.tasks import Score, Task
from common.units import size
from server_app.nodes import Nodes
from server_app.record import Record, Stopwatch, peak_memory
from server_app.scores import read_noised, read_score
from server_app.scrutiny import Scrutiny
from server_app.spool import Spool
from strategies import RULES
from strategies.cost import round_bytes
from strategies.meter import aggregation_error
from strategies.strategy import LoraStrategy, Metrics, mean_metrics, raise_failure

# The share of the ideal update that a rule may lose before it is worth a line.
WORTH_SAYING = 0.1
FIGURES = {"loss", "steps", "tokens", "examples", "seconds", "peak-memory", "correct", "count"}

Central = Callable[[State], Score]


@dataclass(frozen=True)
class Evaluation:
    """Held-out figures of one state: the task's metric over all nodes and for each, and the loss over all."""

    overall: float
    loss: float
    nodes: dict[str, float]
    sample: str


class Receipt(NamedTuple):
    """What is remembered of an accepted update, once the update itself is on disk."""

    node: str
    weight: float
    metrics: Metrics
    bytes_up: int


@dataclass
class Outcome:
    """What the rounds came to."""

    state: State
    before: Evaluation | None = None
    after: Evaluation | None = None
    bytes_up: int = 0
    bytes_down: int = 0


class Rounds:
    """Runs a strategy's rounds over the nodes. ``central`` scores a state on the coordinator's own data."""

    def __init__(
        self,
        nodes: Nodes,
        strategy: LoraStrategy,
        task: Task,
        config: RunConfig,
        record: Record,
        central: Central | None = None,
    ) -> None:
        self._nodes = nodes
        self._strategy = strategy
        self._task = task
        self._config = config
        self._record = record
        self._central = central
        self._advised = False

    def run(self, state: State) -> Outcome:
        """All rounds that ``state`` has not seen yet. Raises :class:`BouquetError` when a round keeps failing."""
        outcome = Outcome(state)
        outcome.before = outcome.after = self._evaluate(outcome)
        best, stale, tries = (outcome.state, outcome.after), 0, 0
        every, patience = self._config.evaluation.every, self._config.round.patience
        while outcome.state.round < self._config.num_server_rounds:
            if outcome.state.round and not self._nodes.anyone:
                self._record.say(f"no node takes part any more: stopped, round {outcome.state.round} is the last")
                break
            tries += 1
            if not self._train(outcome):
                if tries > self._config.round.retries:
                    raise BouquetError(
                        f"round {outcome.state.round + 1} failed {tries} times; the reasons are above",
                        where=str(self._record.folder),
                        cure="Finished rounds are kept: mend the cause and start again with resume = true.",
                    )
                continue
            tries = 0
            last = outcome.state.round == self._config.num_server_rounds
            if last or (every and outcome.state.round % every == 0):
                outcome.after = self._evaluate(outcome)
                better = best[1] is None or (outcome.after is not None and outcome.after.loss < best[1].loss)
                best, stale = ((outcome.state, outcome.after), 0) if better else (best, stale + 1)
            if patience and stale >= patience:
                self._record.say(f"no better for {stale} evaluations: stopped, round {best[0].round} is kept")
                outcome.state, outcome.after = best
                break
        return outcome

    def _train(self, outcome: Outcome) -> bool:
        """One round; True if enough nodes replied to count it."""
        state, config, watch = outcome.state, self._config, Stopwatch()
        nodes = self._nodes.sample(config.fraction_train, state.round)
        ranks = {self._nodes.names[node]: self._nodes.ranks[node] for node in nodes}
        self._record.event("asked", state.round + 1, nodes=list(ranks))
        messages = self._messages(MessageType.TRAIN, state, nodes)
        outcome.bytes_down += (down := _bytes_down(messages))
        with Spool(self._record.folder / "spool") as spool:
            replies = self._replies(state, messages, spool)
            outcome.bytes_up += (up := sum(reply.bytes_up for reply in replies))
            watch.lap("training")
            staying = sum(self._nodes.takes_part(node) for node in nodes)
            needed = max(config.round.fewest_replies, math.ceil(config.round.min_replies * staying))
            if len(replies) < needed:
                traffic = {"bytes_up": up, "bytes_down": down}
                self._record.event("void", state.round + 1, replies=len(replies), needed=needed, **traffic)
                self._record.say(
                    f"round {state.round + 1} does not count: {len(replies)} of {len(nodes)} replied, {needed} needed"
                )
                return False

            outcome.state = self._strategy.merge(state, spool, len(nodes))
            watch.lap("merging")
            self._measure(state, spool, outcome.state)
            watch.lap("measuring")
        checkpoint.save(self._record.checkpoints, outcome.state, self._strategy.rule.name)
        watch.lap("saving")
        means = mean_metrics([(reply.weight, reply.metrics) for reply in replies])
        # A private run tells no loss.
        loss = {"loss": means["loss"]} if "loss" in means else {}
        said = f"loss {means['loss']:.3f}  " if loss else ""
        facts = {**loss, "bytes_up": up, "bytes_down": down, "seconds": watch.total, "phases": watch.seconds}
        by_formula = round_bytes(self._strategy.rule, state, ranks, [reply.node for reply in replies], config.wire)
        facts |= {"formula_up": by_formula.up, "formula_down": by_formula.down, "peak_memory": peak_memory()}
        self._record.event("merge", outcome.state.round, nodes=len(replies), asked=len(nodes), **facts)
        self._record.say(
            f"round {outcome.state.round}/{config.num_server_rounds}  {said}"
            f"{len(replies)}/{len(nodes)} nodes  up {size(up)}  down {size(down)}  {watch.total:.1f} s"
        )
        return True

    def _measure(self, state: State, updates: Spool, merged: State) -> None:
        """Record what a rule that is not exact has lost in this round; say it once where an exact one would pay."""
        rule = self._strategy.rule
        scattered = rule.scattered and any(rank != state.rank for rank in self._nodes.ranks.values())
        if (rule.is_exact and not scattered) or rule.personal or self._strategy.private_mean is not None:
            return
        errors = aggregation_error(rule, state, updates, merged)
        overall = errors.pop("")
        self._record.event("aggregation-error", merged.round, overall=overall, layers=errors)
        if overall > WORTH_SAYING and not self._advised:
            exact = ", ".join(name for name, other in RULES.items() if other.exact)
            self._record.say(f"    {rule.name} lost {overall:.0%} of the nodes' mean update; exact rules are {exact}")
            self._advised = True

    def _replies(self, state: State, messages: list[Message], spool: Spool) -> list[Receipt]:
        """Put the updates that can be merged into ``spool``; the receipts are in the order of the nodes' names."""
        replies: list[Receipt] = []
        # Where the coordinator noises the mean, no single node's figure is kept.
        central = self._config.privacy.mode == "update-central"
        scrutiny = Scrutiny(self._strategy.rule, state, self._config.round.max_norm)
        down = {self._nodes.names[message.metadata.dst_node_id]: _bytes_down([message]) for message in messages}
        for name, message in self._nodes.exchange(messages):
            node_id = message.metadata.src_node_id
            try:
                reply = self._strategy.accept(state, message)
                if reply.node != name:
                    raise BouquetError("an update signed by another node", expected=name, got=reply.node)
                norm = scrutiny.examine(name, reply.update)
                own = {} if central else {"norm": norm}
            except BouquetError as reason:
                # It may have lost what it was sent once.
                self._nodes.equipped.discard(node_id)
                self._nodes.failed("train", state.round + 1, name, str(reason))
                if isinstance(reason, RefusalError):
                    self._nodes.dismiss(name)
                continue
            if state.round >= self._strategy.rule.settled:
                self._nodes.equipped.add(node_id)
            if reply.update.rank and not reply.update.slots:
                self._nodes.ranks[node_id] = reply.update.rank
            spool.put(name, reply.update)
            replies.append(Receipt(name, reply.update.weight, reply.metrics, reply.bytes_up))
            traffic = {"bytes_up": reply.bytes_up, "bytes_down": down[name]}
            self._record.event("train", state.round + 1, node=name, **traffic, **own, **_known(reply.metrics))
        if not central:
            self._tell(scrutiny.against(), state.round + 1)
        return sorted(replies)

    def _tell(self, against: Mapping[str, float], round: int) -> None:
        """Say which nodes' changes point against the others', with the cosine."""
        for name, cosine in against.items():
            said = f"went against the other nodes (cosine {cosine:.2f}); it is merged all the same"
            self._record.note("against", round, name, said, cosine=cosine)

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
        private, noised = config.privacy.mode != "none", config.privacy.score_noise > 0
        if self._central is not None:
            self._score_centrally(state, self._central)
        if private and not (noised or self._strategy.rule.personal or config.task.head == "local"):
            return None
        watch = Stopwatch()
        nodes = self._nodes.sample(config.fraction_evaluate, state.round)
        messages = self._messages(MessageType.EVALUATE, state, nodes)
        prompted = bool(config.evaluation.prompt) and not private and not self._task.sequence_classification
        if messages and prompted:
            messages[0].content["config"] = ConfigRecord({"prompt": config.evaluation.prompt})
        outcome.bytes_down += (down := _bytes_down(messages))
        total, figures, sample = Score(), dict[str, float](), ""
        for name, message in self._nodes.exchange(messages):
            try:
                raise_failure(message)
                if private and not noised:
                    continue
                score, metrics = (read_noised if private else read_score)(message, self._task)
            except BouquetError as reason:
                self._nodes.failed("evaluate", state.round, name, str(reason))
                continue
            total += score
            told = self._task.figures(score)
            figures[name] = told[metric]
            self._record.event("evaluate", state.round, node=name, **told, **_known(metrics))
            if "sample" in message.content.config_records:
                sample = str(message.content.config_records["sample"].get("text", ""))
        watch.lap("evaluation")
        self._record.event("evaluation", state.round, asked=len(nodes), bytes_down=down, seconds=watch.total)
        if not figures:
            return None
        evaluation = Evaluation(
            self._task.figure(total), total.loss / total.count, dict(sorted(figures.items())), sample
        )
        overall = self._task.figures(total)
        self._record.event("heldout", state.round, loss=evaluation.loss, **overall)
        self._record.say(f"    held-out {_figures(overall)} over {len(figures)} nodes{', noised' if private else ''}")
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


def _known(metrics: Metrics) -> Metrics:
    """The figures of a node that the record has a place for: others could take the place of its own facts."""
    return {name: value for name, value in metrics.items() if name in FIGURES}


def _figures(figures: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {figure:.4g}" for name, figure in figures.items())


def _bytes_down(messages: list[Message]) -> int:
    return sum(wire.payload_bytes(message.content.array_records["state"]) for message in messages)
