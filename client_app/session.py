"""One node at work on one message: its config, rule, task, examples and model."""

import os
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from client_app.memory import Memory
from client_app.training import train
from common import base, models, sources, tasks, wire
from common.adapter import State, Tensors, Update, digest, leading
from common.codec import CODECS
from common.config import DataConfig, ModelConfig, NodeConfig, TaskConfig
from common.error import BouquetError
from common.export import export
from common.models import LoraModel
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
        run = self.config.run_name or str(context.run_id)
        self.memory = Memory(self.node.state_directory, run, self.node.label)

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
        return _examples(config.data, self.node, config.task, config.model, config.seed)

    def answer_roll_call(self) -> RecordDict:
        """Who is here: the node's name, rank and number of examples, and the code it runs."""
        facts: dict[str, Any] = {
            "name": self.node.label,
            "rank": self.rank,
            "examples": len(self.examples().train),
            "code": fingerprint(),
            "where": str(ROOT),
        }
        return RecordDict({"node": ConfigRecord(facts)})

    def train(self, message: Message) -> RecordDict:
        """One round of local training, from the state in the message to the update that leaves."""
        config, rule = self.config, self.rule
        model, state = self._receive(message)
        examples = self.examples().train
        training = train(
            model,
            [key for key in model.keys if rule.trains(state.round, key)],
            self.task,
            examples,
            config.train,
            pad=self.pad,
            seed=f"{config.seed}/{self.node.label}/{state.round}",
            round=state.round,
            rounds=config.num_server_rounds,
            penalty=rule.penalty,
        )
        local = model.tensors()
        if kept := {key: tensor for key, tensor in local.items() if rule.keeps(state.round, key)}:
            self.memory.save("personal", kept)
        if (rank := rule.next_rank(state, local)) < state.rank:
            self.memory.rank = rank
        weight = float(len(examples)) if config.train.weighting == "examples" else 1.0
        record = self._pack(Update(rule.send(state, local), weight, state.scale, state.slots), state)
        metrics: dict[str, Any] = {
            "loss": training.loss,
            "steps": training.steps,
            "tokens": training.tokens,
            "examples": len(examples),
            "seconds": training.seconds,
            "peak-memory": training.peak_memory,
        }
        return RecordDict({"update": record, "metrics": MetricRecord(metrics)})

    def evaluate(self, message: Message) -> RecordDict:
        """Score the received state on the held-out examples; continue a prompt if the coordinator sends one."""
        config = self.config.evaluation
        model, state = self._receive(message)
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
        if self.rule.personal or self.config.task.head == "local":
            own = State(model.tensors(), state.scale, state.round, state.offset)
            export(own, self.config, self.memory.adapter, with_head=True)
        if prompt := message.content.config_records["config"].get("prompt"):
            content["sample"] = ConfigRecord({"text": model.generate(str(prompt), self.tokenizer)})
        return content

    def _pack(self, update: Update, state: State) -> ArrayRecord:
        """The update as it leaves. What a coarse codec loses of it is kept, and added to the next one."""
        codec, name = self.config.wire.up, self.rule.name
        received = None if self.rule.relative else state.adapter
        if not CODECS[codec].coarse or self.rule.relative or self.rule.reframes:
            return wire.pack_update(update, name, state.round, self.node.label, codec=codec, received=received)
        owed = self.memory.load("feedback") if state.round else {}
        tensors = {
            key: tensor + owed[key] if key in owed and owed[key].shape == tensor.shape else tensor
            for key, tensor in update.tensors.items()
        }
        due = replace(update, tensors=tensors)
        record = wire.pack_update(due, name, state.round, self.node.label, codec=codec, received=received)
        _, arrived = wire.unpack_update(record, rule=name, round=state.round, received=received)
        self.memory.save("feedback", owed | {key: t - arrived.tensors[key] for key, t in tensors.items()})
        return record

    def _receive(self, message: Message) -> tuple[LoraModel, State]:
        """The state in a message: checked, completed with what this side has of it, and installed in the model."""
        header, state = wire.unpack_state(message.content.array_records["state"], rule=self.rule.name)
        config, rule = self.config, self.rule
        model = models.load(config.model, config.lora, config.task, self.node.device, rule.blocks)
        if header.held:
            state = replace(state, adapter=self._held(model, state, header) | state.adapter)
        if frames := {key: t for key, t in state.adapter.items() if key.part in rule.fixed - rule.drawn}:
            self.memory.save("frames", frames)
        state = rule.view(state, state.rank)
        model.resize(state.rank)
        # Before the first round nothing is kept: what there is, an attempt that did not count has left.
        kept = self.memory.load("personal") if state.round else {}
        kept = {key: tensor for key, tensor in kept.items() if rule.keeps(state.round, key)}
        model.install(rule.install(state, kept), state.scale, state.offset)
        return model, state

    def _held(self, model: LoraModel, state: State, header: wire.Header) -> Tensors:
        """What the message leaves out: drawn here, or received before; the coordinator's digest proves it the same."""
        spec = replace(model.spec, rank=self.config.lora.rank, scale=self.config.lora.scale)
        drawn = self.rule.draw(spec, self.config.seed, state.round)
        held = {key: leading(key, tensor, header.rank) for key, tensor in drawn.items()}
        held |= {key: t for key, t in self.memory.load("frames").items() if key not in state.adapter}
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
def _examples(data: DataConfig, node: NodeConfig, task: TaskConfig, model: ModelConfig, seed: int) -> Examples:
    """Read, split and tokenise once a process; a simulation runs several nodes in one."""
    kind = tasks.build(task)
    dataset = sources.node_dataset(data, node, seed)
    kind.check(dataset.column_names, where=node.data or data.source)
    tokenizer = base.load_tokenizer(model)
    own, heldout = sources.split(dataset, data.holdout, seed)
    parts = [
        [example for record in part for example in kind.encode(record, tokenizer)]
        for part in (sources.pool(data, node, seed) if data.pooled else own, heldout)
    ]
    for name, part in zip(("train on", "hold out"), parts, strict=True):
        if not part:
            raise BouquetError(f"a node has nothing to {name}", where=f"{node.label}, {node.data or data.source}")
    return Examples(*parts)
