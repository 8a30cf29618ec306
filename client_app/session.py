"""One node at work on one message: its config, rule, task, examples and model.

In a private run whose noise is the node's own, the coordinator is trusted with nothing, so nothing that depends on the
records may decide whether there is a reply, or of what form. Up to the charge, a message is worked on without them;
after it, whatever fails with them is done as if there were none.
"""

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from transformers import PreTrainedTokenizerBase

from client_app import children
from client_app.audit import run_name
from client_app.children import Children
from client_app.examples import Examples, node_examples
from client_app.exchange import Exchange
from client_app.memory import Memory
from client_app.policy import Policy
from client_app.privacy import check_apart, privatise, train_privately
from client_app.probe import probe_scores
from client_app.process import model_of, prepare, recipe_of
from client_app.scoring import noised_score
from client_app.shares import ALONE, Processes
from client_app.simulation import simulated
from client_app.spending import Spending
from client_app.training import Training, Turn, recalled, train, turn_of
from client_app.units import Units, Wanted, node_units
from common import durable
from common.adapter.values import State, Tensors, Update
from common.config.node import NodeConfig
from common.error import BouquetError
from common.models import base, kernels, lengths
from common.models.adapted import LoraModel
from common.privacy.accounting import Release
from common.record.export import export
from common.record.steps import StepsFile
from common.sources import files
from common.tasks import Example, Score, Task
from common.version import ROOT, fingerprint


class Session:
    """What one message needs: the recipe, the task, the examples and the model of this node.

    One class, though a long one: the order of what is checked, charged and looked at is the promise of a private node,
    and stands here to be read at a stretch.
    """

    def __init__(self, context: Context) -> None:
        prepare()
        self.recipe = recipe_of(context.run_config)
        self.config, self.rule = self.recipe.config, self.recipe.rule
        self.node = NodeConfig.from_flower(context.node_config)
        self.policy = Policy.of(self.node)
        self.policy.check_run(self.recipe, self.node)
        kernels.check_gradient(self.node, whole=self.recipe.gradient.engine is None)
        self.task: Task = lengths.widest(self.config)
        self.tokenizer: PreTrainedTokenizerBase = base.load_tokenizer(self.config.model)
        self.run = run_name(context)
        self.memory = Memory(self.node.state, self.run, self.node.label, self.config.privacy.mode)
        self.exchange = Exchange(self.recipe, self.node, self.memory, self.load)
        self.spending = Spending(self.config, self.node, self.policy, self.rule.name, self.run)
        self._run_config = context.run_config
        self._processes: Processes = ALONE
        self.round = 0  # as the run's record counts: of training from 1, of a score alone the round before it
        self.epsilon: float | None = None

    def load(self) -> LoraModel:
        """The model of this node, with the adapter that the recipe wants."""
        return model_of(self.recipe, self.node)

    def examples(self) -> Examples:
        """The node's examples. Raises :class:`BouquetError` where they cannot be read, with pieces of them."""
        config = self.config
        examples = node_examples(config.data, self.node, config.task, config.model, config.seed, self._stamp())
        self.policy.check_data(len(examples.train))
        return examples

    def units(self) -> Units:
        """The node's units; none where they cannot be read, which is told to this machine's log alone."""
        try:
            return self._units()
        except Exception:
            traceback.print_exc()
            return Units((), ())

    def _stamp(self) -> files.Stamp:
        """The state of the data's files. Raises :class:`BouquetError` where there are none."""
        own = self.node.data
        return files.stamp(own, "data, of the node's config") if own else files.stamp(self.config.data.source)

    def _units(self) -> Units:
        config = self.config
        wanted = Wanted(config.data, config.task, config.model, config.privacy, config.seed, self._stamp())
        return node_units(wanted, self.node, self.spending.records if config.privacy.per_example else 0)

    def check(self, kind: str, content: RecordDict) -> None:
        """Raise :class:`RefusalError` if a reply holds what may not leave this machine."""
        self.policy.check_reply(kind, content, self.config, self.node.weight)

    def answer_roll_call(self) -> RecordDict:
        """Who is here: the node's name and rank, and the code it runs.

        The data is read, so that it can be read; in a private run only what is no record's doing is looked at.
        """
        counts: dict[str, Any] = {}
        if not self.config.privacy.guarded:
            counts = dict(self.examples().counts.numbers())
        elif simulated():
            self._check_units()
        else:
            self._check_public()
        self.policy.check_size(self.recipe, self.exchange.rank)
        kernels.check(self.node)
        if self.config.privacy.on:
            self.spending.check_places()
        facts: dict[str, Any] = {
            "name": self.node.label,
            "rank": self.exchange.rank,
            "code": fingerprint(),
            "base": base.digest(self.config.model),
            "where": str(ROOT) if self.policy.tell.details else "",
        }
        content = RecordDict({"node": ConfigRecord(facts)})
        if not self.config.privacy.on:
            content["data"] = MetricRecord(counts)
        return content

    def _check_units(self) -> None:
        """Raise :class:`BouquetError` where nothing could be learned: in a simulation, whose data is the user's own."""
        units = self._units()
        if not units.train and not units.heldout:
            unit = self.config.privacy.unit
            raise BouquetError(
                "none of this node's records can be used",
                where=f"{self.node.label}, {self.node.data or self.config.data.source}",
                expected="the fields that task.* names"
                + ("" if unit == "record" else f", and '{unit}' (privacy.unit)"),
                cure="bouquet doctor says what is wrong with each.",
            )

    def _check_public(self) -> None:
        """Raise :class:`BouquetError` where a private run cannot be, whatever stands in the records."""
        self._stamp()
        if self.config.privacy.per_example or self.policy.min_examples:
            self.policy.check_data(self.spending.records)

    def train(self, message: Message) -> RecordDict:
        """One round of local training, from the state in the message to the update that leaves."""
        model, state = self.exchange.receive(message)
        self.round = state.round + 1
        if self.config.privacy.per_example:
            self._check_apart(model, state)
        self._processes = self._gather()
        release = self._charge() if self.config.privacy.on else None
        if release and self.config.privacy.guarded:
            sent, count, metrics = self._guarded_change(model, state, release), 1, dict[str, Any]()
        else:
            sent, count, metrics = self._change(model, state)
        weights = {"examples": float(count), "declared": self.node.weight, "uniform": 1.0}
        record = self.exchange.pack(Update(sent, weights[self.config.train.weighting], state.scale, state.slots), state)
        return RecordDict({"update": record, "metrics": MetricRecord({} if self.config.privacy.on else metrics)})

    def _check_apart(self, model: LoraModel, state: State) -> None:
        """Look at the model before a charge: what is refused whatever the data costs nothing."""
        check_apart(model, self.recipe, self.task, turn_of(self.recipe, state, model.keys))

    def _gather(self) -> Processes:
        """The node's processes, each with the run's model: before a charge, which one that cannot start then spares."""
        if len(self.node.devices) == 1:
            return ALONE
        gathered = children.on(self.node.devices)
        gathered.load(self._run_config, self.node.attention, self.node.compile)
        return gathered

    def _shared(self, turn: Turn, model: LoraModel, state: State, units: Sequence[Sequence[Example]]) -> Turn:
        """The turn of all of the node's processes, which have begun it with this one's ``model``."""
        if isinstance(self._processes, Children):
            whole = State(model.tensors(), state.scale, state.round, state.offset)
            self._processes.begin(whole, turn, units)
        return replace(turn, processes=self._processes)

    def _charge(self) -> Release:
        """Plan what this round gives away, and charge it."""
        if self.config.privacy.guarded:
            self._check_public()
        release = self.spending.plan()
        self.epsilon = self.spending.charge(release, self.round)
        return release

    def _change(self, model: LoraModel, state: State) -> tuple[Tensors, int, dict[str, Any]]:
        """What a round of plain training sends, from how many examples, and its figures."""
        examples = self.examples().train
        training = self._train(model, state, examples)
        metrics: dict[str, Any] = {
            "loss": training.loss,
            "steps": training.steps,
            "tokens": training.tokens,
            "examples": len(examples),
            "seconds": training.seconds,
            "peak-memory": training.peak_memory,
        }
        return self._keep_and_send(model, state, training.remembered), len(examples), metrics

    def _guarded_change(self, model: LoraModel, state: State, release: Release) -> Tensors:
        """What a round of private training sends, under this node's own noise, whatever becomes of the records.

        Training that fails with them starts again without: from noise alone, or as no change.
        """
        units, whole = self.units().train, self.config.privacy.whole_change

        def learn(units: Sequence[Sequence[Example]]) -> Tensors:
            if not whole:
                self._train_privately(model, state, units, release)
            elif units:
                self._train(model, state, [example for unit in units for example in unit])
            return self._keep_and_send(model, state)

        try:
            sent = learn(units)
        except Exception:
            traceback.print_exc()
            # Whoever of them has ended, and whatever that was from, is not asked again.
            self._processes = ALONE
            self.exchange.install(model, state)
            sent = learn(())
        if not whole:
            return sent
        chosen = self.recipe.structure.chosen
        start = None if self.rule.relative else {k: chosen(k, state.adapter[k], state.slots) for k in sent}
        return privatise(start, sent, self.config.privacy.clip, release.noise_multiplier)

    def _keep_and_send(self, model: LoraModel, state: State, remembered: Tensors | None = None) -> Tensors:
        """What leaves of the trained model, with what the objective remembers; what is the node's own is kept."""
        local = model.tensors()
        if kept := self.recipe.kept(state, local):
            self.memory.save("personal", kept, state.round + 1)
        if (rank := self.rule.next_rank(state, local)) < state.rank:
            self.memory.rank = rank
        if remembered:
            objective = self.recipe.objective
            local = {key: objective.sent(tensor, recalled(model, key, remembered)) for key, tensor in local.items()}
        return self.recipe.send(state, local)

    def _train(self, model: LoraModel, state: State, examples: Sequence[Example]) -> Training:
        recipe, seed = self.recipe, f"{self.config.seed}/{self.node.label}/{state.round}"
        remembered = self.memory.load("objective", state.round) if recipe.objective.remembers and state.round else {}
        task, turn = self.task.weighed(examples), turn_of(recipe, state, model.keys, seed, remembered)
        turn = self._shared(turn, model, state, [examples])
        training = self._taught(turn, lambda turn: train(model, recipe, task, examples, turn))
        if not training.remembered:
            return training
        remembered = remembered | training.remembered
        self.memory.save("objective", remembered, state.round + 1)
        return replace(training, remembered=remembered)

    def _train_privately(
        self, model: LoraModel, state: State, units: Sequence[Sequence[Example]], release: Release
    ) -> None:
        recipe, follows = self.recipe, self.config.privacy.clip_quantile > 0
        if follows and state.round and self.memory.clip:
            privacy = self.config.privacy.model_copy(update={"clip": self.memory.clip})
            recipe = replace(recipe, config=self.config.model_copy(update={"privacy": privacy}))
        turn = self._shared(turn_of(recipe, state, model.keys), model, state, units)
        training = self._taught(turn, lambda turn: train_privately(model, recipe, self.task, units, turn, release))
        if follows:
            self.memory.clip = training.clip

    def _taught(self, turn: Turn, learn: Callable[[Turn], Training]) -> Training:
        """What ``learn`` makes of a turn: with the optimizer's state, if it is kept, and followed on this machine."""
        name, kept = f"{self.recipe.optimizer.name}-state", Tensors()
        if self.config.train.keeps_optimizer and turn.number:
            kept = self.memory.load(name, turn.number)
        counted = not self.config.privacy.on
        with StepsFile(self.node.state, self.run, self.node.label, self.round, counted=counted) as steps:
            training = learn(replace(turn, optimizer_state=kept, tell=steps.tell))
        if training.optimizer_state:
            self.memory.save(name, kept | training.optimizer_state, turn.number + 1)
        return training

    def evaluate(self, message: Message) -> RecordDict:
        """Score the received state on the held-out examples; continue a prompt if one comes and the policy allows it.

        In a private run nothing is scored but under noise that is charged, where the run and the policy want it.
        """
        model, state = self.exchange.receive(message)
        self.round = state.round
        if self.config.privacy.on:
            self._export(model, state)
            figures = self._noised_score(model, state) if self.config.privacy.scored else {}
            return RecordDict({"metrics": MetricRecord(dict(figures))})
        started = time.monotonic()
        score = self._score(model)
        metrics: dict[str, Any] = {
            "loss": score.loss / score.count,
            self.task.metric: self.task.figure(score),
            "count": score.count,
            "correct": score.correct,
            "seconds": time.monotonic() - started,
        }
        content = RecordDict({"metrics": MetricRecord(metrics)})
        if score.tallies:
            content["tallies"] = MetricRecord({name: list(values) for name, values in score.tallies.items()})
        self._export(model, state)
        prompt = message.content.config_records["config"].get("prompt")
        if prompt and self.policy.tell.text:
            content["sample"] = ConfigRecord({"text": model.generate(str(prompt), self.tokenizer)})
        return content

    def _score(self, model: LoraModel) -> Score:
        config = self.config.evaluation
        return model.score(self.task, self.examples().heldout[: config.limit or None], config.batch_size)

    def _noised_score(self, model: LoraModel, state: State) -> dict[str, float]:
        """The private score of the held-out units, charged before any of them is looked at."""
        self._check_apart(model, state)
        probe_scores(model, self.task)
        noise, size = self.config.privacy.score_noise, self.config.evaluation.batch_size
        self.epsilon = self.spending.charge(Release(noise, 1.0, 1), self.round)
        return noised_score(model, self.task, self.units().heldout, size, noise)

    def _export(self, model: LoraModel, state: State) -> None:
        """Leave the node's own adapter in its state directory, where the rule or the head is personal."""
        if self.recipe.own_models:
            self.memory.make()
            own = State(model.tensors(), state.scale, state.round, state.offset)
            with durable.writing("this node's own adapter", self.memory.adapter, durable.OF_A_NODE):
                export(own, self.config, self.memory.adapter, with_head=True)
