"""What this node allows: its operator's TOML file, checked against what a run asks for and what would leave.

    rules = ["ffa-lora", "fedsvd"]        # "*" allows all
    models = ["/models/llama-3.2-1b"]     # local folders have to be listed; "id@revision" for another than main
    parts = ["B"]                         # kinds of tensors that may leave
    codecs = ["fp32", "bf16"]
    max-bytes = 20_000_000                # of one message
    min-examples = 200                    # fewer, and this node takes no part; in private runs it goes by `records`

    [task]                                # what a coordinator may name of the task; a key left out keeps its default
    name = "classify"
    label = ["diagnosis", "urgency"]      # or one of several

    [cost]                                # of a run, at most; also epochs, batch-size, max-length, labels; 0 for any
    rank = 1024
    steps = 100_000                       # of a round: train.steps * train.accumulation

    [data]
    sources = ["stdlib", "/data/public"]  # for a node without `data` or `script`: names, files, folders and all below

    [tell]
    text = false                          # generated text
    details = false                       # of an error, which file, record, field and value

    [privacy]
    modes = ["example"]
    unit = "patient"                      # whose records are one unit; with a budget, "record" if left out
    scoring = false                       # noised scores, which cost budget
    largest-batch = 1                     # units that are computed together; 1 keeps them apart for certain
    max-epsilon = 8.0                     # of one run, by the node's own budget; needs privacy-epsilon
    min-noise-multiplier = 0.5

    [budget]
    fields = ["text"]                     # a budget for each data set, known by these fields; else one for the node

A key left out allows what is harmless, and nothing of what concerns the data. A node with a budget (`privacy-epsilon`)
answers only what its policy names: rules, models, task and modes must be there. What holds without a file: a reply has
the records of its kind and no others, and in a private run no figure at all.
"""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from flwr.app import RecordDict

from client_app.policy_tables import BudgetPolicy, CostPolicy, DataPolicy, PrivacyPolicy, TellPolicy
from client_app.simulation import simulated
from common import tasks, wire
from common.adapter.values import HEAD, OFFSET
from common.config.node import NodeConfig
from common.config.ranges import CountOrOff
from common.config.run import ModelConfig, RunConfig, TaskConfig
from common.config.section import ConfigError, Section, validate
from common.error import RefusalError, unknown_choice
from common.models import adapted
from common.privacy.accounting import Release
from common.tasks import TASKS
from common.wire.codecs import CODECS
from common.wire.header import PARTS
from strategies import RULES, Recipe
from strategies.cost import planned_bytes

RECORDS = {
    "query": {"node", "data"},
    "train": {"update", "metrics", "score", "tallies", "sample", "unscored", "failure"},
    "evaluate": {"metrics", "tallies", "sample"},
}
PUBLIC_FACTS = {"name", "rank", "code", "base", "where"}
# By record: what noise covers, and why a part of the reply is missing.
NOISED = {
    "train": {("score", "merit"), ("score", "count")},
    "evaluate": {("metrics", "merit"), ("metrics", "count")},
}
WHY = {("unscored", "reason"), ("unscored", "refused"), ("failure", "reason"), ("failure", "refused")}
ANY = "*"


class Policy(Section):
    """One node's policy. Empty lists and zeros allow everything, but on a node with a budget."""

    rules: Sequence[str] = ()
    models: Sequence[str] = ()
    parts: Sequence[str] = ()
    codecs: Sequence[str] = ()
    max_bytes: CountOrOff = 0
    min_examples: CountOrOff = 0
    task: Mapping[str, Any] = {}
    cost: CostPolicy = CostPolicy()
    data: DataPolicy = DataPolicy()
    tell: TellPolicy = TellPolicy()
    privacy: PrivacyPolicy = PrivacyPolicy()
    budget: BudgetPolicy = BudgetPolicy()

    @classmethod
    def of(cls, node: NodeConfig) -> Self:
        """The policy of a node: its file's; without one, what is harmless, and in a simulation everything.

        Raises :class:`RefusalError` where the file cannot be read, :class:`ConfigError` with every mistake in it.
        """
        file = node.policy
        if not file:
            own = {"data": DataPolicy(sources=(ANY,)), "tell": TellPolicy(text=True, details=True), "models": (ANY,)}
            return cls().model_copy(update=own) if simulated() else cls()
        try:
            written = tomllib.loads(Path(file).expanduser().read_text(encoding="utf-8"))
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise RefusalError(
                "the node's policy cannot be read",
                where=file,
                expected="a TOML file",
                got=error.strerror or "" if isinstance(error, OSError) else str(error),
                cure="Correct it, or name another in policy of --node-config; `bouquet site kit` writes one.",
            ) from error
        policy = validate(cls, written, list(_mistakes(written)), f"policy {file}", "Correct them in the file.")
        if policy.privacy.max_epsilon and not node.privacy_epsilon:
            raise RefusalError(
                "a limit for one run but none for all runs, which a run of another name would get around",
                where=f"{file}, privacy.max-epsilon",
                expected="privacy-epsilon in --node-config too",
                got="none",
                cure="Set it, or leave max-epsilon out.",
            )
        return policy

    def check_run(self, recipe: Recipe, node: NodeConfig) -> None:
        """Raise :class:`RefusalError` with everything that the run asks for and this node does not allow.

        A node with a budget (its ``privacy-epsilon``) takes part in private runs only, in those that its policy
        names, and in one whose noise is the coordinator's only where ``privacy.modes`` names that.
        """
        config, rule = recipe.config, recipe.rule
        sent = {part for turn in range(min(config.num_server_rounds, 2)) for part in rule.plan(turn).sent}
        if config.task.head == "shared" and tasks.classes(config.task):
            sent |= HEAD
        private, wanted = config.privacy, self.privacy
        mistakes = [
            *_outside("rule.name", [rule.name], self.rules),
            *_outside("model.name", [_named(config.model)], self.models or _distant(config.model.name)),
            *_outside(f"what the rule '{rule.name}' sends", sorted(sent), self.parts),
            *_outside("wire.up", [config.wire.up], self.codecs),
            *_outside("privacy.mode", [private.mode], wanted.modes),
            *_outside("privacy.unit", [config.privacy.unit], self._units(node)),
            *self._outside_task(config.task, node),
            *self.cost.mistakes(config),
        ]
        own = node.data or node.script
        if not own and not any(_covers(source, config.data.source) for source in self.data.sources):
            allowed = " or ".join(self.data.sources) or "nothing"
            mistakes.append(f"data.source: expected {allowed} (data.sources), got {config.data.source!r}")
        # One record of a new kind would move all others to another node; only one user of all nodes need not mind.
        if private.guarded and not own and ANY not in self.data.sources:
            mistakes += _outside("data.partition", [config.data.partition], ["iid", "none"])
        if node.privacy_epsilon:
            mistakes += self._silent()
        if private.per_example and 0 < wanted.largest_batch < config.train.batch_size:
            least = f"at most {wanted.largest_batch} (largest-batch)"
            mistakes.append(f"train.batch-size: expected {least}, got {config.train.batch_size}")
        if config.privacy.score_noise and node.privacy_epsilon and not wanted.scoring:
            mistakes.append("privacy.score-noise: expected 0 (privacy.scoring), got a run with noised scores")
        if not private.on and (node.privacy_epsilon or wanted.min_noise_multiplier):
            what = "privacy-epsilon" if node.privacy_epsilon else "min-noise-multiplier"
            mistakes.append(f"privacy.mode: expected a private run ({what}), got 'none'")
        if private.central and node.privacy_epsilon and private.mode not in wanted.modes:
            mistakes.append("privacy.mode: expected noise added by this node (privacy-epsilon), got 'update-central'")
        _refuse(mistakes)

    def _units(self, node: NodeConfig) -> list[str]:
        """What may be one unit: half of the promise, and so with a budget the operator's to say."""
        return [self.privacy.unit or "record"] if self.privacy.unit or node.privacy_epsilon else []

    def _silent(self) -> Iterator[str]:
        """What the policy of a node with a budget has to name, and does not."""
        named = {"rules": self.rules, "models": self.models, "[task]": self.task, "privacy.modes": self.privacy.modes}
        for key, value in named.items():
            if not value:
                yield f"{key}: expected in the policy of a node with a budget (privacy-epsilon), got nothing"

    def _outside_task(self, task: TaskConfig, node: NodeConfig) -> Iterator[str]:
        """A mistake for every ``task.*`` of the run that is not as the policy has it; none where it has no table."""
        if not self.task:
            return
        default = TaskConfig().model_dump(by_alias=True)
        for key, got in task.model_dump(by_alias=True).items():
            allowed = self.task.get(key, default[key])
            choices = list(allowed) if isinstance(allowed, list) else [allowed]
            if not any(type(got) is type(choice) and got == choice for choice in choices):
                yield f"task.{key}: expected {' or '.join(map(repr, choices))}, got {got!r}"

    def check_size(self, recipe: Recipe, rank: int) -> None:
        """Raise :class:`RefusalError` if a run's updates of this ``rank`` cannot be as small as this node wants them.

        Told before a round that would be charged and whose update would not leave.
        """
        if not self.max_bytes:
            return
        config = recipe.config
        lora = config.lora.model_copy(update={"rank": rank})
        spec = adapted.describe(config.model, lora, config.task, recipe.structure)
        size = planned_bytes(recipe, spec, nodes=1).up
        if size > self.max_bytes:
            _refuse([f"bytes of an update: expected at most {self.max_bytes:,} (max-bytes), got about {size:,.0f}"])

    def check_data(self, examples: int) -> None:
        """Raise :class:`RefusalError` if there are too few examples; how many there are is not said."""
        if examples < self.min_examples:
            _refuse([f"examples: expected {self.min_examples} or more (min-examples), got fewer"])

    def check_release(self, release: Release) -> None:
        """Raise :class:`RefusalError` if a release has too little noise."""
        if release.noise_multiplier < (least := self.privacy.min_noise_multiplier):
            _refuse([f"the noise multiplier: expected {least:g} or more (min-noise-multiplier), got less"])

    def check_reply(self, kind: str, content: RecordDict, config: RunConfig, public_weight: float) -> None:
        """Raise :class:`RefusalError` if a reply holds anything that may not leave this machine."""
        mistakes = _outside("records of a reply", sorted(content), sorted(RECORDS[kind]))
        if "update" in content.array_records:
            header = wire.read_header(content.array_records["update"])
            parts = sorted({part for _, part, _ in header.tensors})
            mistakes += _outside("parts in the update", parts, self.parts)
            mistakes += _outside("the update's codec", [header.codec], self.codecs)
            if config.privacy.on and header.weight not in (1.0, public_weight):
                mistakes.append("the update's weight: expected a public one in a private run, got another")
        size = sum(wire.payload_bytes(record) for record in content.array_records.values())
        if self.max_bytes and size > self.max_bytes:
            mistakes.append(f"bytes: expected at most {self.max_bytes:,} (max-bytes), got {size:,}")
        if config.privacy.on:
            noised = NOISED.get(kind, set()) if config.privacy.score_noise else set()
            figures = [(of, name) for of, record in content.metric_records.items() for name in record]
            facts = [name for of, record in content.config_records.items() for name in record if (of, name) not in WHY]
            told = [name for of, name in figures if (of, name) not in noised]
            mistakes += [f"figures in a private run: expected none, got {name!r}" for name in told]
            mistakes += _outside("facts in a private run", facts, sorted(PUBLIC_FACTS))
        _refuse(mistakes)


def _mistakes(written: Mapping[str, Any]) -> Iterator[str]:
    """What a policy's file says that is of the right form and yet means nothing."""
    task, data = (table if isinstance(table := written.get(key), dict) else {} for key in ("task", "data"))
    tables = {**written, "data.sources": data.get("sources")}
    lists = {key: value for key, value in tables.items() if isinstance(value, list)}
    known = {"rules": [*RULES, ANY], "parts": sorted(PARTS - OFFSET), "codecs": list(CODECS)}
    for key, names in known.items():
        yield from (unknown_choice(key, name, names) for name in lists.get(key, []) if name not in names)
    for key in ("models", "data.sources"):
        # Where an app is started is no folder of the operator's.
        relative = [path for path in lists.get(key, []) if str(path).startswith(".")]
        yield from (f"{key}: expected an absolute path, a name or a hub id, got {path!r}" for path in relative)
    for key, value in task.items():
        for choice in value if isinstance(value, list) else [value]:
            try:
                named = validate(TaskConfig, {key: choice}, [], "", "").name
            except ConfigError as error:
                yield from (f"task.{mistake}" for mistake in error.mistakes)
            else:
                yield from [unknown_choice("task.name", named, list(TASKS))] if named not in TASKS else []


def _refuse(mistakes: list[str]) -> None:
    if mistakes:
        raise RefusalError("\n  ".join(["this node's policy does not allow it:", *mistakes]))


def _outside(what: str, got: Sequence[str], allowed: Sequence[str]) -> list[str]:
    """A mistake for everything in ``got`` that is not in ``allowed``; an empty ``allowed`` allows all."""
    if not allowed or ANY in allowed:
        return []
    return [f"{what}: expected {' or '.join(allowed)}, got {name!r}" for name in got if name not in allowed]


def _named(model: ModelConfig) -> str:
    """A model as a policy names it: on a hub, anybody may offer another revision than the main one."""
    return model.name if model.revision == "main" else f"{model.name}@{model.revision}"


def _distant(model: str) -> list[str]:
    """What a policy that lists no models allows: the embedded one, and hub ids."""
    local = Path(model).is_absolute() or model.startswith((".", "~"))
    return ["embedded", "a hub id"] if local else []


def _covers(allowed: str, source: str) -> bool:
    """Whether a listed source allows one: itself, any where it is ``*``, and of a folder all below it."""
    if allowed in (ANY, source):
        return True
    folder = Path(allowed).expanduser()
    return folder.is_absolute() and Path(source).expanduser().resolve().is_relative_to(folder.resolve())
