"""The config of a run; that of a machine is in ``common/config/node.py``.

Flower's run config is flat: kebab-case keys with dots, values of bool, int, float or str. ``from_flower`` turns it
into frozen models and reports every mistake at once, in the keys that the user wrote.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from common.config.privacy import PrivacyConfig
from common.config.ranges import (
    Count,
    CountOrOff,
    FileName,
    LearningRate,
    NonNegative,
    Positive,
    Share,
)
from common.config.section import ConfigError, Section, flatten, validate
from common.config.task import TaskConfig as TaskConfig  # for all who read a run's config
from common.error import unknown_choice
from common.method import Option, Registry

TRACKERS = ("tensorboard", "mlflow", "wandb")


class ModelConfig(Section):
    """The frozen base. ``name`` is ``embedded``, a local folder, or a hub id.

    ``pooling`` is what a classifier reads: what the model's own head does, or the mean of the last hidden states.
    """

    name: str = "embedded"
    revision: str = "main"
    quantization: Literal["nf4", "int8", "none"] = "nf4"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    gradient_checkpointing: bool = False
    pooling: Literal["default", "mean"] = "default"

    @property
    def pooled(self) -> bool:
        """Whether a classifier reads the mean of the tokens."""
        return self.pooling == "mean"


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


class MergeConfig(Section):
    """What the server does with every rule: ``offset_energy`` is kept of an offset that passes the break-even rank."""

    offset_energy: Share = 1.0


class TrainConfig(Section):
    """The local loop of one round.

    ``steps`` = 0 means ``epochs`` passes over the node's examples; ``learning_rate`` = 0 is the rule's own, and
    ``head_learning_rate`` = 0 the adapter's rate.
    """

    steps: CountOrOff = 32
    epochs: Count = 1
    batch_size: Count = 8
    accumulation: Count = 1
    learning_rate: LearningRate = 0.0
    head_learning_rate: LearningRate = 0.0
    clip_norm: NonNegative = 1.0
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    weighting: Literal["examples", "uniform", "declared"] = "examples"


class WireConfig(Section):
    """How tensors travel to the nodes (``down``) and back (``up``)."""

    down: str = "fp32"
    up: str = "fp32"


class EvaluationConfig(Section):
    """When held-out examples are scored. ``every`` = 0: before the first round and after the last only.

    ``source`` names the coordinator's own held-out data; where it is set, the coordinator loads the base model.
    ``export`` is which round's model the run leaves: the one of the least held-out loss, where that is known and one
    model is all nodes', or the last.
    """

    every: CountOrOff = 1
    batch_size: Count = 16
    limit: CountOrOff = 0
    source: str = ""
    prompt: str = "def "
    export: Literal["best", "last"] = "best"


class RoundConfig(Section):
    """When a round is over, and when the run is. Seconds; ``patience`` = 0 never stops early.

    ``patience`` goes by the median of the nodes' losses, of four nodes or more, else by the loss over all.

    A round counts if ``min_replies`` of the nodes that belong to the run (or of the share that is asked) have replied,
    and at least ``fewest_replies``. One that does not is tried again, ``retries`` times, after a second, two, four;
    each try waits up to ``wait`` for ``min_nodes``. A node that fails ``max_failures`` times in a row (0: however
    often) is left out of the next ``sit_out`` rounds. ``max_norm`` bounds the norm of what one node changes, and
    ``max_ratio`` how many times the median of the others' it may be (0: any); ``max_weight`` is how many times the
    median of the others' a weight may be that nobody but the node knows. The record shows what is usual.
    """

    deadline: Positive = 3600.0
    wait: Positive = 300.0
    min_replies: Share = 0.5
    fewest_replies: Count = 1
    retries: CountOrOff = 2
    patience: CountOrOff = 0
    max_failures: CountOrOff = 2
    sit_out: CountOrOff = 3
    max_norm: NonNegative = 1e4
    max_ratio: NonNegative = 20.0
    max_weight: NonNegative = 1000.0

    @property
    def ttl(self) -> float:
        """How long a message is valid: past the deadline, so that a late reply is seen and counted."""
        return 2 * self.deadline


def _known_trackers(to: str) -> str:
    for name in filter(None, (part.strip() for part in to.split(","))):
        if name not in TRACKERS:
            raise PydanticCustomError("unknown_tracker", f"a comma-separated list of {', '.join(TRACKERS)}")
    return to


class TrackingConfig(Section):
    """Where the figures of the record go besides: ``to`` lists trackers, with commas. Off where it is empty."""

    to: Annotated[str, AfterValidator(_known_trackers)] = ""

    @property
    def names(self) -> list[str]:
        """The trackers, each once."""
        return list(dict.fromkeys(filter(None, (part.strip() for part in self.to.split(",")))))


class MetricsConfig(Section):
    """Where the coordinator answers Prometheus while a run lasts. ``port`` = 0: nowhere."""

    port: Annotated[int, Field(ge=0, le=65535)] = 0
    address: str = "127.0.0.1"


class CheckpointConfig(Section):
    """Which checkpoints stay: the ``newest``, and one ``every`` so many rounds (0: no more)."""

    newest: Count = 3
    every: CountOrOff = 0


class RunConfig(Section):
    """One run of the federation, the same on every machine.

    ``methods`` are the choices on the axes of a recipe and their hyperparameters, in the flat form: ``rule.name``,
    ``rule.florist.energy``.
    """

    num_server_rounds: Count = 5
    min_nodes: Count = 2
    fraction_train: Share = 1.0
    fraction_evaluate: Share = 1.0
    seed: CountOrOff = 0
    run_name: FileName = ""
    run_directory: str = ""
    resume: bool = False
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    task: TaskConfig = TaskConfig()
    data: DataConfig = DataConfig()
    methods: Mapping[str, Option] = {}
    merge: MergeConfig = MergeConfig()
    train: TrainConfig = TrainConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    wire: WireConfig = WireConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    round: RoundConfig = RoundConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    metrics: MetricsConfig = MetricsConfig()

    @classmethod
    def from_flower(
        cls,
        flat: Mapping[str, Any],
        axes: Sequence[Registry[Any]] = (),
        names: Mapping[str, Sequence[str]] | None = None,
    ) -> Self:
        """Read Flower's flat run config.

        What is known only elsewhere is given: the ``axes`` with their members, and further ``names`` to choose from by
        key, such as ``{"task.name": [...]}``. Raises :class:`ConfigError` with every mistake.
        """
        sections = tuple(f"{axis.section}." for axis in axes)
        chosen = {key: value for key, value in flat.items() if key.startswith(sections)}
        mistakes = [mistake for axis in axes for mistake in axis.mistakes(chosen)]
        mistakes += [
            unknown_choice(key, flat[key], known)
            for key, known in (names or {}).items()
            if key in flat and flat[key] not in known
        ]
        rest = {key: value for key, value in flat.items() if key not in chosen}
        config = validate(
            cls,
            rest,
            mistakes,
            "run config",
            "Correct them in pyproject.toml ([tool.flwr.app.config]) or in --run-config.",
        )
        if mistakes := config.task.contradictions():
            raise ConfigError(mistakes, "run config", "The names of the classes decide how many there are.")
        if classes := config.task.names:
            config = config.model_copy(update={"task": config.task.model_copy(update={"labels": len(classes)})})
        if mistakes := config.unprivate():
            raise ConfigError(mistakes, "run config", "A private run lets no un-noised number leave a node.")
        defaults = {key: value for axis in axes for key, value in axis.defaults().items()}
        methods = {key: type(value)(chosen.get(key, value)) for key, value in defaults.items()}
        return config.model_copy(update={"methods": methods})

    @property
    def rule(self) -> str:
        """The rule's name."""
        return str(self.methods.get("rule.name", ""))

    def unprivate(self) -> list[str]:
        """What contradicts ``privacy.mode``: settings by which numbers would leave that no noise covers."""
        if not self.privacy.on:
            return []
        mistakes = []
        if self.train.weighting == "examples":
            mistakes.append("train.weighting: expected 'uniform' or 'declared' in a private run, got 'examples'")
        if self.privacy.per_example and not self.train.steps:
            mistakes.append("train.steps: expected 1 or more in a private run, got 0, which counts a node's examples")
        if self.privacy.clip_quantile and not (self.privacy.per_example and self.privacy.clipping == "flat"):
            mistakes.append("privacy.clip-quantile: expected 0 but where privacy.mode is 'example' and clipping 'flat'")
        if self.privacy.score_noise and not self.privacy.per_example:
            mistakes.append("privacy.score-noise: expected 0 where privacy.mode is not 'example'")
        if self.data.pooled:
            mistakes.append("data.pooled: expected false in a private run, got true, which no node's budget covers")
        if self.task.class_weights == "balanced":
            mistakes.append("task.class-weights: expected the same on every node in a private run, got 'balanced'")
        if self.data.partition == "dirichlet":
            mistakes.append("data.partition: expected one that deals each record out by itself, got 'dirichlet'")
        return mistakes

    @property
    def scores(self) -> int:
        """How many times a run scores its nodes."""
        return self.scores_after(self.num_server_rounds)

    def scores_after(self, round: int) -> int:
        """How many times a run has scored its nodes after a round: before the first, every so many, after the last."""
        every, last = self.evaluation.every, self.num_server_rounds
        regular = round // every if every else 0
        return 1 + regular + (round == last and (not every or last % every > 0))

    def trained_on(self, records: int) -> int:
        """How many units a private node is taken to train on, from the public number of all of them."""
        kept = min(self.data.limit or records, records)
        return max(1, round(kept * (1 - self.data.holdout))) if self.privacy.score_noise else kept

    def to_flower(self) -> dict[str, Any]:
        """The flat form, every key present."""
        return dict(flatten(self.model_dump(by_alias=True, exclude={"methods"}))) | dict(self.methods)
