"""Held-out scores of a state: of the nodes, and centrally."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
from server_app.transport import state_bytes
from strategies.replies import Metrics, explained, raise_failure
from strategies.strategy import LoraStrategy

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
    """Held-out figures of one state: the task's metric over all nodes and for each, and the loss to judge it by."""

    overall: float
    judged: float
    nodes: dict[str, float]
    sample: str

    @property
    def with_all(self) -> dict[str, float]:
        """The figure of each node, and that of all of them under ``all``, which no node is called."""
        return self.nodes | {"all": self.overall}


class Scoring:
    """Scores a state on the nodes' held-out examples; ``central`` does it on the coordinator's own data."""

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
        self._prompted = bool(config.evaluation.prompt) and not self._private and not task.sequence_classification

    def evaluate(self, state: State) -> Evaluation | None:
        """Score the state on the nodes' held-out examples, and centrally; None where no node did.

        In a private run a node does under noise, if the run asks for it; those that have models of their own install
        the state all the same.
        """
        if self._central is not None:
            self._score_centrally(state, self._central)
        if self._private and not (self._noised or self._strategy.recipe.own_models):
            return None
        watch = Stopwatch()
        nodes = self._nodes.sample(self._config.fraction_evaluate, state.round)
        messages = self._nodes.address(self._strategy, MessageType.EVALUATE, state, nodes)
        scores, sample = self._collect(messages, state.round)
        watch.lap("evaluation")
        down = sum(map(state_bytes, messages))
        self._record.event(events.Evaluation(round=state.round, asked=len(nodes), bytes_down=down, seconds=watch.total))
        if not scores:
            return None
        evaluation = self._sum_up(scores, sample, state.round)
        if self._prompted and not sample and not state.round:
            self._record.say("    the prompt is not continued: the node's policy lets no generated text leave")
        return evaluation

    def _collect(self, messages: list[Message], round: int) -> tuple[dict[str, Score], str]:
        """The scores of the nodes that have one to tell, and what the first node's model made of the prompt."""
        teller, sample = "", ""
        if messages and self._prompted:
            messages[0].content["config"] = ConfigRecord({"prompt": self._config.evaluation.prompt})
            teller = self._nodes.names[messages[0].metadata.dst_node_id]
        scores: dict[str, Score] = {}
        for name, message in self._nodes.exchange(messages):
            try:
                raise_failure(message)
                if self._private and not self._noised:
                    continue
                score, metrics = (read_noised if self._private else read_score)(message, self._task)
                figures = self._task.figures(score)
            except Exception as reason:  # a boundary: what is raised here is the doing of this reply
                self._nodes.failed("evaluate", round, name, explained(reason))
                continue
            scores[name] = score
            self._record.event(self._told_of(name, figures, metrics, round))
            if name == teller and "sample" in message.content.config_records:
                sample = brief(message.content.config_records["sample"].get("text", ""), MAX_SAMPLE)
        return scores, sample

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
        evaluation = Evaluation(self._task.figure(total), judged(scores), by_node, sample)
        self._record.event(events.Judged(round=round, by=evaluation.judged))
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
