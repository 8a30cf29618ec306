"""Held-out scores of a state: of the nodes, and centrally."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TypedDict

from flwr.app import ConfigRecord, Message, MessageType

from common.adapter.values import State
from common.error import brief
from common.record import events
from common.tasks import Score, Task
from server_app.costs import Stopwatch
from server_app.nodes import Nodes
from server_app.record import Record
from server_app.scores import judged, overall, read_noised, read_score
from server_app.scrutiny import FEWEST
from server_app.transport import state_bytes
from strategies.replies import Metrics, explained, raise_failure
from strategies.strategy import LoraStrategy, choose

MAX_SAMPLE = 4000
"""Characters of a text that a model has continued."""

Central = Callable[[State], Score]


class Figures(TypedDict):
    """What an event has of a score."""

    metric: str
    score: float
    further: dict[str, float] | None


@dataclass(frozen=True)
class Evaluation:
    """Held-out figures of one state: the task's metric over all nodes and for each, and the losses likewise."""

    overall: float
    judged: float
    nodes: dict[str, float]
    sample: str
    losses: Mapping[str, float] = field(default_factory=dict)

    @property
    def with_all(self) -> dict[str, float]:
        """The figure of each node, and that of all of them under ``all``, which no node is called."""
        return self.nodes | {"all": self.overall}

    def above(self, other: "Evaluation") -> float:
        """By how much the loss is higher than that of ``other``: the median over the nodes that have scored both.

        Nodes' data are unlike, and so are their losses: of the median loss itself a single node could take the place.
        Of fewer than four nodes in common it is the difference of the losses that the states are known by.
        """
        both = self.losses.keys() & other.losses.keys()
        if len(both) < FEWEST:
            return self.judged - other.judged
        return median(self.losses[name] - other.losses[name] for name in both)


@dataclass
class Sheet:
    """What has come of having the state of one round scored: who was asked, and what each has said.

    ``teller`` is the node that continues the prompt, and ``sample`` what its model made of it.
    """

    state: State
    asked: set[str] = field(default_factory=set)
    scores: dict[str, Score] = field(default_factory=dict)
    teller: str = ""
    sample: str = ""


class Scoring:
    """Scores a state on the nodes' held-out examples; ``central`` does it on the coordinator's own data.

    A node scores the state that it is sent to train from, so that its score comes with its update; only where nobody
    trains from a state it is sent to be scored alone.
    """

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
        self._config = config = strategy.recipe.config
        self._record = record
        self._central = central
        self._private = config.privacy.on
        self._noised = config.privacy.score_noise > 0
        # In a private run a node scores under noise, if the run asks for it; one that has a model of its own installs
        # the state all the same.
        self._asks = not self._private or self._noised or strategy.recipe.own_models
        self._prompted = bool(config.evaluation.prompt) and not self._private and task.language
        self._sheet: Sheet | None = None
        # Who was asked for the score before this one and had none.
        self._missed: set[str] = set()

    @property
    def open(self) -> bool:
        """Whether a state is to be scored that has not been summed up yet."""
        return self._sheet is not None

    def begin(self, state: State) -> Sheet:
        """Have a state scored: centrally at once, and by the nodes with the next messages."""
        self._sheet = sheet = Sheet(state)
        if self._central is not None:
            self._score_centrally(state, self._central)
        return sheet

    def ask(self, messages: Sequence[Message]) -> None:
        """Let those score that the state goes to in ``messages``: a share of them, and nobody for a second time."""
        if self._sheet is not None and self._asks:
            config = self._config
            self._put(self._sheet, choose(messages, config.fraction_evaluate, config.seed, self._sheet.state.round))

    def hear(self, name: str, message: Message) -> None:
        """Take a node's score of the state that it trained from; one that was not asked for is not looked at."""
        sheet = self._sheet
        if sheet is None or name not in sheet.asked or name in sheet.scores or message.has_error():
            return
        content = message.content
        # A node that could do neither says so once, and is heard where its update is missed.
        if "failure" not in content.config_records or {"score", "unscored"} & set(content):
            self._hear(sheet, name, message, "score", "unscored")

    def evaluate(self, state: State) -> Evaluation | None:
        """What the scores of ``state`` come to; the nodes are sent it for that, unless some have just been asked."""
        sheet = self._sheet or self.begin(state)
        if self._asks and not sheet.asked:
            self._ask_alone(sheet)
        return self.conclude()

    def conclude(self) -> Evaluation | None:
        """What the scores that have come come to; None where no node has scored."""
        sheet, self._sheet = self._sheet, None
        if sheet is None:
            return None
        self._missed = sheet.asked - sheet.scores.keys()
        if not sheet.scores:
            return None
        evaluation = self._sum_up(sheet.scores, sheet.sample, sheet.state.round)
        if self._prompted and not sheet.sample and not sheet.state.round:
            self._record.say("    the prompt is not continued: the node's policy lets no generated text leave")
        return evaluation

    def _ask_alone(self, sheet: Sheet) -> None:
        """Send a state to be scored, and to nothing else: to those that scored the one before, where some did.

        Else a node that fails to train, and so to score, would be heard in the last score alone, and no state before
        it would be judged by the same nodes.
        """
        watch, state = Stopwatch(), sheet.state
        nodes = self._nodes.sample(self._config.fraction_evaluate, state.round)
        nodes = [node for node in nodes if self._nodes.names[node] not in self._missed] or nodes
        messages = self._nodes.address(self._strategy, MessageType.EVALUATE, state, nodes)
        self._put(sheet, messages)
        for name, message in self._nodes.exchange(messages):
            self._hear(sheet, name, message, "metrics", "failure")
        watch.lap("evaluation")
        down = sum(map(state_bytes, messages))
        self._record.event(events.Evaluation(round=state.round, asked=len(nodes), bytes_down=down, seconds=watch.total))

    def _put(self, sheet: Sheet, messages: Sequence[Message]) -> None:
        """Write into ``messages`` that the state is to be scored; into one of them, what is to be continued."""
        # What is paid for is asked for once, whether it has come or not.
        done = sheet.asked if self._noised else sheet.scores.keys()
        asked = {name: message for message in messages if (name := self._name_of(message)) not in done}
        for message in asked.values():
            message.content["config"] = ConfigRecord({"score": True})
        if asked and self._prompted and not sheet.sample:
            sheet.teller, message = next(iter(asked.items()))
            message.content.config_records["config"]["prompt"] = self._config.evaluation.prompt
        sheet.asked |= asked.keys()

    def _name_of(self, message: Message) -> str:
        return self._nodes.names[message.metadata.dst_node_id]

    def _hear(self, sheet: Sheet, name: str, message: Message, record: str, failure: str) -> None:
        """Take the score in one record of a reply, or the reason in another why there is none."""
        try:
            raise_failure(message, failure)
            if self._private and not self._noised:
                return
            read = read_noised if self._private else read_score
            score, metrics = read(message, self._task, record)
            figures = self._task.figures(score)
        except Exception as reason:  # a boundary: what is raised here is the doing of this reply
            self._nodes.failed("evaluate", sheet.state.round, name, explained(reason))
            return
        sheet.scores[name] = score
        self._record.event(self._told_of(name, figures, metrics, sheet.state.round))
        if name == sheet.teller and "sample" in message.content.config_records:
            sheet.sample = brief(message.content.config_records["sample"].get("text", ""), MAX_SAMPLE)

    def _told_of(self, name: str, figures: dict[str, float], metrics: Metrics, round: int) -> events.Evaluate:
        """What the record has of a node's score; of the node's own figures those it knows."""
        return events.Evaluate(
            round=round,
            node=name,
            **self._named(figures),
            loss=metrics.get("loss"),
            count=metrics.get("count"),
            correct=metrics.get("correct"),
            seconds=metrics.get("seconds"),
        )

    def _sum_up(self, scores: dict[str, Score], sample: str, round: int) -> Evaluation:
        """The score over all nodes but those that would be it by themselves."""
        total, left_out = overall(scores)
        for name in left_out:
            said = f"counts {scores[name].count:,} examples, far more than the others: not in the overall score"
            self._record.note(events.Implausible(round=round, node=name, count=scores[name].count), said)
        figures, loss = self._task.figures(total), total.loss / total.count
        classes = self._task.by_class(total) or None
        self._record.event(events.HeldOut(round=round, **self._named(figures), loss=loss, classes=classes))
        by_node = {name: self._task.figure(score) for name, score in sorted(scores.items())}
        losses = {name: score.loss / score.count for name, score in sorted(scores.items())}
        evaluation = Evaluation(self._task.figure(total), judged(scores), by_node, sample, losses)
        self._record.event(events.Judged(round=round, by=evaluation.judged, losses=losses))
        noised = ", noised" if self._private else ""
        self._record.say(f"    held-out {_listed(figures)} over {len(scores)} nodes{noised}")
        return evaluation

    def _score_centrally(self, state: State, central: Central) -> None:
        """Score the state on the coordinator's own held-out examples."""
        watch = Stopwatch()
        score = central(state)
        figures, loss = self._task.figures(score), score.loss / score.count
        watch.lap("central")
        told = events.Central(round=state.round, **self._named(figures), loss=loss, seconds=watch.total)
        self._record.event(told)
        self._record.say(f"    central {_listed(figures)}")

    def _named(self, figures: dict[str, float]) -> Figures:
        """The task's figures as an event has them."""
        metric = self._task.metric
        further = {name: value for name, value in figures.items() if name != metric}
        return {"metric": metric, "score": figures[metric], "further": further or None}


def _listed(figures: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {figure:.4g}" for name, figure in figures.items())
