"""The round loop: who takes part, how long a round lasts, when it counts, and when the run is over."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from common import wire
from common.adapter import State
from common.config import RunConfig
from common.error import BouquetError
from common.tasks import Score, Task
from server_app import checkpoint
from server_app.record import Record, megabytes
from strategies.strategy import LoraStrategy, Reply, choose, mean_metrics, raise_failure, read_metrics

POLL_SECONDS = 0.1
STEADY_SECONDS = 0.5


@dataclass(frozen=True)
class Evaluation:
    """Held-out figures of one state: the task's metric over all nodes and for each, and the loss over all."""

    overall: float
    loss: float
    nodes: dict[str, float]
    sample: str


@dataclass
class Outcome:
    """What the rounds came to."""

    state: State
    before: Evaluation | None = None
    after: Evaluation | None = None
    bytes_up: int = 0
    bytes_down: int = 0


class Rounds:
    """Runs a strategy's rounds over a grid. ``central`` scores a state on the coordinator's own data."""

    def __init__(
        self,
        grid: Grid,
        strategy: LoraStrategy,
        task: Task,
        config: RunConfig,
        record: Record,
        central: Callable[[State], Score] | None = None,
    ) -> None:
        self._grid = grid
        self._strategy = strategy
        self._task = task
        self._config = config
        self._record = record
        self._central = central
        self._names: dict[int, str] = {}
        self._left_out: dict[int, str] = {}

    def run(self, state: State) -> Outcome:
        """All rounds that ``state`` has not seen yet. Raises :class:`BouquetError` when a round keeps failing."""
        self._wait_for_nodes()
        outcome = Outcome(state)
        outcome.before = outcome.after = self._evaluate(outcome)
        best, stale, tries = (outcome.state, outcome.after), 0, 0
        every, patience = self._config.evaluation.every, self._config.round.patience
        while outcome.state.round < self._config.num_server_rounds:
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
        state, config, started = outcome.state, self._config, time.monotonic()
        nodes = self._sample(config.fraction_train, state.round)
        messages = self._strategy.messages(MessageType.TRAIN, state, nodes, ttl=config.round.deadline)
        down = sum(wire.payload_bytes(message.content.array_records["state"]) for message in messages)
        accepted: list[Reply] = []
        for name, message in self._exchange(messages):
            try:
                reply = self._accept(state, name, message)
            except BouquetError as reason:
                self._fail("train", state.round + 1, name, str(reason))
                continue
            accepted.append(reply)
            facts = {key: value for key, value in reply.metrics.items()}
            self._record.event("train", state.round + 1, node=name, bytes_up=reply.bytes_up, **facts)
            self._record.say(f"    {name}  loss {facts['loss']:.3f}  {facts['tokens']:,.0f} tokens  {facts['seconds']:.1f} s")
        outcome.bytes_down += down
        outcome.bytes_up += (up := sum(reply.bytes_up for reply in accepted))
        needed = max(1, math.ceil(config.round.min_replies * len(nodes)))
        if len(accepted) < needed:
            self._record.event("void", state.round + 1, replies=len(accepted), needed=needed)
            self._record.say(f"round {state.round + 1} does not count: {len(accepted)} of {len(nodes)} replied, {needed} needed")
            return False

        accepted.sort(key=lambda reply: reply.node)
        merging = time.monotonic()
        outcome.state = self._strategy.rule.aggregate(state, (reply.update for reply in accepted))
        checkpoint.save(self._record.checkpoints, outcome.state, self._strategy.rule.name)
        loss = mean_metrics([(reply.update.weight, reply.metrics) for reply in accepted])["loss"]
        seconds = time.monotonic() - started
        self._record.event(
            "merge",
            outcome.state.round,
            nodes=len(accepted),
            asked=len(nodes),
            loss=loss,
            bytes_up=up,
            bytes_down=down,
            seconds=seconds,
            merge_seconds=time.monotonic() - merging,
        )
        self._record.say(
            f"round {outcome.state.round}/{config.num_server_rounds}  loss {loss:.3f}  {len(accepted)}/{len(nodes)} nodes  "
            f"up {megabytes(up)}  down {megabytes(down)}  {seconds:.1f} s"
        )
        return True

    def _accept(self, state: State, name: str, message: Message | None) -> Reply:
        if message is None:
            raise BouquetError("no reply", expected=f"one within {self._config.round.deadline:g} s (round.deadline)")
        reply = self._strategy.accept(state, message)
        if reply.node != name:
            raise BouquetError("an update signed by another node", expected=name, got=reply.node)
        return reply

    def _evaluate(self, outcome: Outcome) -> Evaluation | None:
        """Score the state on the nodes' held-out examples, and centrally; None where nobody could."""
        state, round = outcome.state, outcome.state.round
        nodes = self._sample(self._config.fraction_evaluate, round)
        messages = self._strategy.messages(MessageType.EVALUATE, state, nodes, ttl=self._config.round.deadline)
        if messages and self._config.evaluation.prompt and not self._task.sequence_classification:
            messages[0].content["config"] = ConfigRecord({"prompt": self._config.evaluation.prompt})
        outcome.bytes_down += sum(wire.payload_bytes(message.content.array_records["state"]) for message in messages)
        total, scores, sample = Score(), dict[str, float](), ""
        for name, message in self._exchange(messages):
            try:
                if message is None:
                    raise BouquetError("no reply", expected=f"one within {self._config.round.deadline:g} s (round.deadline)")
                raise_failure(message)
                metrics = read_metrics(message)
                scores[name] = metrics[self._task.metric]
            except (BouquetError, KeyError) as reason:
                self._fail("evaluate", round, name, str(reason))
                continue
            count = int(metrics["count"])
            total = Score(total.loss + metrics["loss"] * count, total.correct + int(metrics["correct"]), total.count + count)
            self._record.event("evaluate", round, node=name, **metrics)
            if "sample" in message.content.config_records:
                sample = str(message.content.config_records["sample"]["text"])
        if not scores:
            return None
        evaluation = Evaluation(
            self._task.figure(total), total.loss / total.count, dict(sorted(scores.items())), sample
        )
        self._record.event("heldout", round, loss=evaluation.loss, **{self._task.metric: evaluation.overall})
        self._record.say(f"    held-out {self._task.metric} {evaluation.overall:.4g} over {len(scores)} nodes")
        if self._central is not None:
            central = self._central(state)
            figure = self._task.figure(central)
            self._record.event("central", round, loss=central.loss / central.count, **{self._task.metric: figure})
            self._record.say(f"    central {self._task.metric} {figure:.4g}")
        return evaluation

    def _wait_for_nodes(self) -> None:
        """Wait until ``min-nodes`` are connected and nobody has come for a moment, then call the roll."""
        limit = time.monotonic() + self._config.round.wait
        connected: set[int] = set()
        steady = said = time.monotonic()
        while len(connected) < self._config.min_nodes or time.monotonic() - steady < STEADY_SECONDS:
            present = set(self._grid.get_node_ids())
            if present != connected:
                connected, steady = present, time.monotonic()
            if time.monotonic() > limit:
                raise BouquetError(
                    "too few nodes",
                    expected=f"{self._config.min_nodes} within {self._config.round.wait:g} s (min-nodes, round.wait)",
                    got=str(len(connected)),
                    cure="Start more flower-supernode, or a simulation with --federation-config 'num-supernodes=N'.",
                )
            if len(connected) < self._config.min_nodes and time.monotonic() - said > 10:
                self._record.say(f"waiting for nodes: {len(connected)} of {self._config.min_nodes}")
                said = time.monotonic()
            time.sleep(POLL_SECONDS)
        self._call_roll()

    def _call_roll(self) -> None:
        """Ask the nodes that have come since the last time for their names; leave out those that cannot take part."""
        new = [node for node in self._grid.get_node_ids() if node not in self._names and node not in self._left_out]
        self._names.update({node: f"{node:x}" for node in new})
        messages = [
            Message(RecordDict(), dst_node_id=node, message_type=MessageType.QUERY, ttl=self._config.round.deadline)
            for node in new
        ]
        identities = {f"{node:x}": node for node in new}
        answers = dict(self._exchange(messages))
        for provisional, message in sorted(answers.items()):
            node = identities[provisional]
            del self._names[node]
            try:
                if message is None:
                    raise BouquetError("no answer to the roll call")
                raise_failure(message)
                facts = message.content.config_records["node"]
                self._admit(node, str(facts["name"]), int(str(facts["rank"])))
            except BouquetError as reason:
                self._left_out[node] = str(reason)
                self._fail("roll call", 0, provisional, str(reason))
        if not self._names:
            raise BouquetError("no node can take part; the reasons are above")

    def _admit(self, node: int, name: str, rank: int) -> None:
        rule = self._strategy.rule
        if name in self._names.values():
            raise BouquetError(
                "two nodes of one name", got=f"'{name}'", cure="Give each its own name or partition-id in --node-config."
            )
        if rank != self._config.lora.rank and not rule.mixed_ranks:
            raise BouquetError(
                f"the rule '{rule.name}' needs one rank on every node",
                where=f"{name}, lora-rank",
                expected=str(self._config.lora.rank),
                got=str(rank),
                cure="Leave lora-rank out of its --node-config.",
            )
        self._names[node] = name

    def _sample(self, fraction: float, round: int) -> list[int]:
        """Nodes that are connected now, sampled by name, so that a run can be repeated whatever ids Flower gives."""
        self._call_roll()
        connected = set(self._grid.get_node_ids())
        by_name = sorted((node for node in self._names if node in connected), key=self._names.__getitem__)
        return choose(by_name, fraction, self._config.seed, round) if by_name else []

    def _exchange(self, messages: list[Message]) -> Iterator[tuple[str, Message | None]]:
        """Send messages and yield each node's reply as it comes; None for a node that missed the deadline."""
        limit = time.monotonic() + self._config.round.deadline
        waiting: dict[str, str] = {}
        for message in messages:
            name = self._names[message.metadata.dst_node_id]
            pushed = list(self._grid.push_messages([message]))
            if pushed and pushed[0]:
                waiting[pushed[0]] = name
            else:
                yield name, None
        while waiting and time.monotonic() < limit:
            for reply in self._grid.pull_messages(list(waiting)):
                if name := waiting.pop(reply.metadata.reply_to_message_id, ""):
                    yield name, reply
            if waiting:
                time.sleep(POLL_SECONDS)
        for name in waiting.values():
            yield name, None

    def _fail(self, phase: str, round: int, node: str, reason: str) -> None:
        self._record.event("failure", round, node=node, during=phase, reason=reason)
        self._record.say(f"    {node} left out of {phase}: {reason}")
