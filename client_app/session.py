"""One node at work on one message: its config, rule, task, examples and model."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from client_app.ledger import Ledger
from client_app.memory import Memory
from client_app.policy import Policy
from client_app.privacy import privatise, train_privately
from client_app.training import Training, train
from common import accounting, base, models, sources, tasks, wire
from common.accounting import Release
from common.adapter import State, Tensors, Update, chosen_blocks, digest, leading
from common.codec import CODECS
from common.config import DataConfig, ModelConfig, TaskConfig
from common.error import BouquetError
from common.export import export
from common.ledger import DataSet
from common.models import LoraModel
from common.node_config import NodeConfig
from common.tasks import Example, Task
from common.version import ROOT, fingerprint
from strategies import Rule, build, read_config


@dataclass(frozen=True)
class Examples:
    """A node's tokenised examples."""

    train: list[Example]
    heldout: list[Example]


class Session:
    """What one message needs: the config, the rule, the task, the examples and the model of this node."""

    def __init__(self, context: Context) -> None:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        self.config = read_config(context.run_config)
        self.node = NodeConfig.from_flower(context.node_config)
        self.rule: Rule = build(self.config)
        self.task: Task = tasks.build(self.config.task)
        self.tokenizer: PreTrainedTokenizerBase = base.load_tokenizer(self.config.model)
        # A run that is resumed has another id, and its name.
        self.run = self.config.run_name or str(context.run_id)
        self.memory = Memory(self.node.state, self.run, self.node.label)
        self.ledger = Ledger(self.node.state, self.node.label, self.node.privacy_epsilon, self.node.privacy_delta)
        self.policy = Policy.read(self.node.policy)
        self.policy.check_run(self.config, self.rule, self.node.privacy_epsilon)
        self.epsilon: float | None = None

    @property
    def private(self) -> bool:
        """Whether no figure may leave that noise does not cover."""
        return self.config.privacy.mode != "none"

    @property
    def rank(self) -> int:
        """The rank this node starts with: its own, or what it had come down to when the run was broken off."""
        own = self.node.lora_rank or self.config.lora.rank
        return (self.config.resume and self.memory.rank) or own

    @property
    def pad(self) -> int:
        """The padding token."""
        return int(self.tokenizer.pad_token_id)

    def examples(self) -> Examples:
        """The node's examples."""
        config = self.config
        # A record is what the ledger charges, so under example-level privacy it may be no more than one example.
        most = 1 if config.privacy.mode == "example" else None
        examples = _examples(config.data, self.node, config.task, config.model, config.seed, most)
        self.policy.check_data(len(examples.train))
        return examples

    def check(self, kind: str, content: RecordDict) -> None:
        """Raise :class:`RefusalError` if a reply holds what may not leave this machine."""
        self.policy.check_reply(kind, content, self.config, self.node.weight)

    def answer_roll_call(self) -> RecordDict:
        """Who is here: the node's name and rank, and the code it runs. The data is read, so that it can be read."""
        self.examples()
        facts: dict[str, Any] = {
            "name": self.node.label,
            "rank": self.rank,
            "code": fingerprint(),
            "where": str(ROOT),
        }
        return RecordDict({"node": ConfigRecord(facts)})

    def train(self, message: Message) -> RecordDict:
        """One round of local training, from the state in the message to the update that leaves."""
        config, rule = self.config, self.rule
        model, state = self._receive(message)
        examples = self.examples().train
        release = self._charge(state.round, len(examples)) if self.private else None
        training = self._train(model, state, examples, release)
        local = model.tensors()
        if kept := {key: tensor for key, tensor in local.items() if rule.keeps(state.round, key)}:
            self.memory.save("personal", kept, state.round + 1)
        if (rank := rule.next_rank(state, local)) < state.rank:
            self.memory.rank = rank
        sent = rule.send(state, local)
        if release and config.privacy.mode == "update-local":
            start = None if rule.relative else {k: chosen_blocks(k, state.adapter[k], state.slots) for k in sent}
            sent = privatise(start, sent, config.privacy.clip, release.noise_multiplier)
        weights = {"examples": float(len(examples)), "declared": self.node.weight, "uniform": 1.0}
        record = self._pack(Update(sent, weights[config.train.weighting], state.scale, state.slots), state)
        metrics: dict[str, Any] = {
            "loss": training.loss,
            "steps": training.steps,
            "tokens": training.tokens,
            "examples": len(examples),
            "seconds": training.seconds,
            "peak-memory": training.peak_memory,
        }
        return RecordDict({"update": record, "metrics": MetricRecord({} if self.private else metrics)})

    def _charge(self, round: int, examples: int) -> Release:
        """Plan what this round gives away, and write it in the ledger: from here on it counts as given."""
        config = self.config
        release = accounting.plan(config.privacy, examples, config.train.steps, config.num_server_rounds)
        self.policy.check_release(release, config, self.node.privacy_delta)
        dataset = _dataset(config.data, self.node, config.seed)
        entry = self.ledger.charge(release, dataset, config.privacy, run=self.run, round=round, rule=self.rule.name)
        self.epsilon = entry.epsilon
        return release

    def _train(self, model: LoraModel, state: State, examples: Sequence[Example], release: Release | None) -> Training:
        """The local loop, plain or private."""
        config = self.config
        keys = [key for key in model.keys if self.rule.trains(state.round, key)]
        common: dict[str, Any] = {"pad": self.pad, "round": state.round, "rounds": config.num_server_rounds}
        common |= {"penalty": self.rule.penalty, "blocks": state.slots if self.rule.blocks else ()}
        if release and config.privacy.mode == "example":
            return train_privately(model, keys, self.task, examples, config.train, config.privacy, release, **common)
        seed = f"{config.seed}/{self.node.label}/{state.round}"
        return train(model, keys, self.task, examples, config.train, seed=seed, **common)

    def evaluate(self, message: Message) -> RecordDict:
        """Score the received state on the held-out examples; continue a prompt if the coordinator sends one.

        In a private run nothing is scored: a score is a figure of the data that no noise covers.
        """
        config = self.config.evaluation
        model, state = self._receive(message)
        if self.private:
            self._export(model, state)
            return RecordDict({"metrics": MetricRecord({})})
        started = time.monotonic()
        heldout = self.examples().heldout
        score = model.score(self.task, heldout[: config.limit or None], self.pad, config.batch_size)
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
        if prompt := message.content.config_records["config"].get("prompt"):
            content["sample"] = ConfigRecord({"text": model.generate(str(prompt), self.tokenizer)})
        return content

    def _pack(self, update: Update, state: State) -> ArrayRecord:
        """The update as it leaves. What a coarse codec loses of it is kept, and added to the next one."""
        codec, name = self.config.wire.up, self.rule.name
        received = None if self.rule.relative else state.adapter
        # Other slots in every round: what was lost of one is not owed to another.
        if not CODECS[codec].coarse or self.rule.relative or self.rule.reframes or update.slots:
            return wire.pack_update(update, name, state.round, self.node.label, codec=codec, received=received)
        owed = self.memory.load("feedback", state.round) if state.round else {}
        tensors = {
            key: tensor + owed[key] if key in owed and owed[key].shape == tensor.shape else tensor
            for key, tensor in update.tensors.items()
        }
        due = replace(update, tensors=tensors)
        record = wire.pack_update(due, name, state.round, self.node.label, codec=codec, received=received)
        _, arrived = wire.unpack_update(record, rule=name, round=state.round, received=received)
        left = {key: t - arrived.tensors[key] for key, t in tensors.items()}
        self.memory.save("feedback", owed | left, state.round + 1)
        return record

    def _export(self, model: LoraModel, state: State) -> None:
        """Leave the node's own adapter in its state directory, where the rule or the head is personal."""
        if self.rule.personal or self.config.task.head == "local":
            own = State(model.tensors(), state.scale, state.round, state.offset)
            export(own, self.config, self.memory.adapter, with_head=True)

    def _receive(self, message: Message) -> tuple[LoraModel, State]:
        """The state in a message: checked, completed with what this side has of it, and installed in the model."""
        header, state = wire.unpack_state(message.content.array_records["state"], rule=self.rule.name)
        config, rule = self.config, self.rule
        model = models.load(config.model, config.lora, config.task, self.node.device, rule.blocks)
        if header.held:
            state = replace(state, adapter=self._held(model, state, header) | state.adapter)
        if frames := {key: t for key, t in state.adapter.items() if key.part in rule.fixed - rule.drawn}:
            self.memory.save("frames", frames, state.round)
        state = rule.view(state, state.rank)
        model.resize(state.rank)
        # Before the first round nothing is kept: what there is, an attempt that did not count has left.
        kept = self.memory.load("personal", state.round) if state.round else {}
        kept = {key: tensor for key, tensor in kept.items() if rule.keeps(state.round, key)}
        model.install(rule.install(state, kept), state.scale, state.offset)
        return model, state

    def _held(self, model: LoraModel, state: State, header: wire.Header) -> Tensors:
        """What the message leaves out: drawn here, or received before; the coordinator's digest proves it the same."""
        spec = replace(model.spec, rank=self.config.lora.rank, scale=self.config.lora.scale)
        drawn = self.rule.draw(spec, self.config.seed, state.round)
        held = {key: leading(key, tensor, header.rank) for key, tensor in drawn.items()}
        held |= {key: t for key, t in self.memory.load("frames", state.round).items() if key not in state.adapter}
        if digest(held) != header.held:
            raise BouquetError(
                "this node has other frozen tensors than the coordinator",
                where=self.node.label,
                expected=f"digest {header.held[:16]}",
                got=digest(held)[:16],
                cure="Use the same torch version and the same seed on every machine.",
            )
        return held


@lru_cache(maxsize=8)
def _examples(
    data: DataConfig, node: NodeConfig, task: TaskConfig, model: ModelConfig, seed: int, most: int | None
) -> Examples:
    """Read, split and tokenise once a process, ``most`` examples a record; a simulation runs several nodes in one."""
    kind = tasks.build(task)
    dataset = sources.node_dataset(data, node, seed)
    kind.check(dataset.column_names, where=node.data or data.source)
    tokenizer = base.load_tokenizer(model)
    own, heldout = sources.split(dataset, data.holdout, seed)
    parts = [
        [example for record in part for example in islice(kind.encode(record, tokenizer), most)]
        for part in (sources.pool(data, node, seed) if data.pooled else own, heldout)
    ]
    for name, part in zip(("train on", "hold out"), parts, strict=True):
        if not part:
            raise BouquetError(f"a node has nothing to {name}", where=f"{node.label}, {node.data or data.source}")
    return Examples(*parts)


@lru_cache(maxsize=8)
def _dataset(data: DataConfig, node: NodeConfig, seed: int) -> DataSet:
    """All of the node's records, as the ledger knows them."""
    return DataSet.of(sources.own_records(data, node, seed))
