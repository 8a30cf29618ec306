"""The two configs: what a run is (:class:`RunConfig`), and what one machine is (:class:`NodeConfig`).

Flower's run config is flat: kebab-case keys with dots, values of bool, int, float or str. ``from_flower`` turns it
into frozen models and reports every mistake at once, in the keys that the user wrote.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.codec import CodecName, StateCodecName
from common.error import BouquetError, did_you_mean

Count = Annotated[int, Field(ge=1)]
CountOrOff = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]
RuleOption = int | float | str
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ConfigError(BouquetError):
    """Every mistake in a config, one a line."""

    def __init__(self, mistakes: list[str], where: str, cure: str) -> None:
        self.mistakes = mistakes
        count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        super().__init__("\n  ".join([f"{count} in the {where}:", *mistakes]) + f"\n{cure}")


class Section(BaseModel):
    """A strict, frozen table whose keys are written in kebab-case."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        alias_generator=lambda name: name.replace("_", "-"),
        protected_namespaces=(),
    )


S = TypeVar("S", bound=Section)


class ModelConfig(Section):
    """The frozen base. ``name`` is ``embedded``, a local folder, or a hub id."""

    name: str = "embedded"
    revision: str = "main"
    quantization: Literal["nf4", "int8", "none"] = "nf4"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    gradient_checkpointing: bool = False


class LoraConfig(Section):
    """The trained adapter. ``targets`` is ``all-linear`` or a comma-separated list of module names."""

    rank: Count = 8
    alpha: Positive = 16.0
    rslora: bool = False
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: str = "all-linear"

    @property
    def scale(self) -> float:
        """The factor s of ``W x + s B A x``: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


class TaskConfig(Section):
    """What is learned, and which fields of an example hold it."""

    name: str = "text"
    max_length: Annotated[int, Field(ge=4)] = 128
    text: str = "text"
    text_pair: str = ""
    label: str = "label"
    labels: Annotated[int, Field(ge=2)] = 2
    head: Literal["shared", "local", "frozen"] = "shared"
    prompt: str = "instruction"
    context: str = "input"
    answer: str = "output"


class DataConfig(Section):
    """Where examples come from. ``source`` is ``stdlib``, a file, a folder, or a hub data set.

    ``pooled`` is for a baseline in a simulation: every node trains on all nodes' training examples, not on its own.
    """

    source: str = "stdlib"
    partition: Literal["natural", "iid", "dirichlet", "none"] = "natural"
    partition_field: str = "family"
    dirichlet_alpha: Positive = 0.5
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.1
    limit: CountOrOff = 0
    pooled: bool = False


class RuleConfig(Section):
    """Which published rule merges the updates; ``options`` are the rules' own hyperparameters, by ``rule.field``."""

    name: str = "fedit"
    options: Mapping[str, RuleOption] = {}


class MergeConfig(Section):
    """What the server does around the rule's own mathematics.

    ``optimizer`` = ``auto`` is the rule's own, which most have not; ``learning_rate`` = 0 is the optimizer's own
    (1 for momentum, 0.001 for Adam). ``trim`` is the share cut at each end of a trimmed mean, ``hostile`` how many
    nodes multi-Krum defends against. ``offset_energy`` is what is kept of an offset that passes the break-even rank.
    """

    mean: Literal["weighted", "median", "trimmed", "krum"] = "weighted"
    trim: Annotated[float, Field(ge=0, lt=0.5)] = 0.1
    hostile: Count = 1
    optimizer: Literal["auto", "none", "momentum", "adam"] = "auto"
    learning_rate: NonNegative = 0.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    second_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.99
    tau: Positive = 1e-3
    offset_energy: Share = 1.0


class TrainConfig(Section):
    """The local loop of one round.

    ``steps`` = 0 means ``epochs`` passes over the node's examples; ``proximal`` is FedProx's mu, 0 for none.
    """

    steps: CountOrOff = 32
    epochs: Count = 1
    batch_size: Count = 8
    accumulation: Count = 1
    learning_rate: Positive = 5e-3
    weight_decay: NonNegative = 0.0
    clip_norm: NonNegative = 1.0
    proximal: NonNegative = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    weighting: Literal["examples", "uniform"] = "examples"


class WireConfig(Section):
    """How tensors travel to the nodes (``down``) and back (``up``)."""

    down: StateCodecName = "fp32"
    up: CodecName = "fp32"


class EvaluationConfig(Section):
    """When held-out examples are scored. ``every`` = 0: before the first round and after the last only.

    ``source`` names the coordinator's own held-out data; where it is set, the coordinator loads the base model.
    """

    every: CountOrOff = 1
    batch_size: Count = 16
    limit: CountOrOff = 0
    source: str = ""
    prompt: str = "def "


class RoundConfig(Section):
    """When a round is over, and when the run is. Seconds; ``patience`` = 0 never stops early."""

    deadline: Positive = 3600.0
    wait: Positive = 300.0
    min_replies: Share = 0.5
    retries: CountOrOff = 2
    patience: CountOrOff = 0


class RunConfig(Section):
    """One run of the federation, the same on every machine."""

    num_server_rounds: Count = 5
    min_nodes: Count = 2
    fraction_train: Share = 1.0
    fraction_evaluate: Share = 1.0
    seed: CountOrOff = 0
    run_name: str = ""
    run_directory: str = ""
    resume: bool = False
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    task: TaskConfig = TaskConfig()
    data: DataConfig = DataConfig()
    rule: RuleConfig = RuleConfig()
    merge: MergeConfig = MergeConfig()
    train: TrainConfig = TrainConfig()
    wire: WireConfig = WireConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    round: RoundConfig = RoundConfig()

    @classmethod
    def from_flower(
        cls,
        flat: Mapping[str, Any],
        choices: Mapping[str, list[str]] | None = None,
        rule_options: Mapping[str, RuleOption] | None = None,
    ) -> Self:
        """Read Flower's flat run config.

        Some of it is known only elsewhere: ``choices`` has names by key, such as ``{"rule.name": [...]}``, and
        ``rule_options`` the hyperparameters of every rule with their defaults, such as ``{"florist.energy": 0.95}``.
        Raises :class:`ConfigError` with every mistake.
        """
        mistakes = [
            _unknown_choice(key, flat[key], names)
            for key, names in (choices or {}).items()
            if key in flat and flat[key] not in names
        ]
        defaults = {f"rule.{key}": value for key, value in (rule_options or {}).items()}
        own = {key: value for key, value in flat.items() if re.fullmatch(r"rule\.[^.]+\.[^.]+", key)}
        for key, value in own.items():
            if key not in defaults:
                mistakes.append(f"{key}: unknown key. {did_you_mean(key, defaults)}".rstrip())
            elif not _is_like(value, defaults[key]):
                kind = {int: "a whole number", float: "a number", str: "a string"}[type(defaults[key])]
                mistakes.append(f"{key}: expected {kind}, got {value!r}")
        rest = {key: value for key, value in flat.items() if key not in own}
        config = validate(
            cls,
            rest,
            mistakes,
            "run config",
            "Correct them in pyproject.toml ([tool.flwr.app.config]) or in --run-config.",
        )
        options = {key.removeprefix("rule."): type(defaults[key])(value) for key, value in (defaults | own).items()}
        return config.model_copy(update={"rule": RuleConfig(name=config.rule.name, options=options)})

    def to_flower(self) -> dict[str, Any]:
        """The flat form, every key present."""
        flat = dict(flatten(self.model_dump(by_alias=True)))
        options = {key: value for key, value in flat.items() if key.startswith("rule.options.")}
        return {key: value for key, value in flat.items() if key not in options} | {
            key.replace("rule.options.", "rule."): value for key, value in options.items()
        }


class NodeConfig(Section):
    """Facts of one machine, from ``flower-supernode --node-config``; a simulation sets the first two.

    ``data`` replaces the run's ``data.source`` and is used whole; ``device`` is ``auto`` or a torch device.
    """

    partition_id: CountOrOff = 0
    num_partitions: Count = 1
    name: str = ""
    data: str = ""
    lora_rank: CountOrOff = 0
    device: str = "auto"
    state_directory: str = ""

    @classmethod
    def from_flower(cls, flat: Mapping[str, Any]) -> Self:
        """Read Flower's node config. Raises :class:`ConfigError` with every mistake."""
        return validate(cls, flat, [], "node config", "Correct them in --node-config of this flower-supernode.")

    @property
    def label(self) -> str:
        """The node's stable name: it orders the merge and seeds the node, whatever id Flower gives it."""
        return self.name or f"node-{self.partition_id:03d}"


def validate(model: type[S], flat: Mapping[str, Any], mistakes: list[str], where: str, cure: str) -> S:
    """``model`` from flat keys. Raises :class:`ConfigError` with ``mistakes``, found before, and its own."""
    try:
        settings = model.model_validate(_unflatten(flat))
    except ValidationError as error:
        default = model().model_dump(by_alias=True)
        known = [*default, *dict(flatten(default))]
        mistakes = mistakes + [_describe(dict(detail), known) for detail in error.errors()]
        raise ConfigError(mistakes, where, cure) from None
    if mistakes:
        raise ConfigError(mistakes, where, cure)
    return settings


def _describe(detail: dict[str, Any], known: list[str]) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"{key}: unknown key. {did_you_mean(key, known)}".rstrip()
    expected = detail["msg"].removeprefix("Input should be ")
    return f"{key}: expected {expected}, got {detail['input']!r}"


def _is_like(value: object, default: RuleOption) -> bool:
    """Whether a value may stand where ``default`` stood; a whole number may stand for a float."""
    accepted = (int, float) if isinstance(default, float) else (type(default),)
    return isinstance(value, accepted) and not isinstance(value, bool)


def _unknown_choice(key: str, got: object, names: list[str]) -> str:
    return f"{key}: expected one of {', '.join(names)}, got {got!r}. {did_you_mean(str(got), names)}".rstrip()


def _unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        table = nested
        for section in sections:
            inner = table.setdefault(section, {})
            table = inner if isinstance(inner, dict) else {}
        table[name] = value
    return nested


def flatten(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested tables as pairs of a dotted key and a value."""
    for key, value in nested.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
