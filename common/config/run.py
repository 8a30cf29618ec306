"""The config of a run; that of a machine is in ``common/config/node.py``.

Flower's run config is flat: kebab-case keys with dots, values of bool, int, float or str. ``from_flower`` turns it
into frozen models and reports every mistake at once, in the keys that the user wrote.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field

from common.adapter import ranks
from common.config.coordinator import (
    CheckpointConfig,
    EvaluationConfig,
    MetricsConfig,
    RoundConfig,
    TrackingConfig,
)
from common.config.privacy import PrivacyConfig
from common.config.ranges import (
    Count,
    CountOrOff,
    FileName,
    LearningRate,
    NonNegative,
    Only,
    Positive,
    Share,
)
from common.config.section import ConfigError, Section, flatten, validate
from common.config.task import TaskConfig as TaskConfig  # for all who read a run's config
from common.error import unknown_choice
from common.method import Option, Registry


class ModelConfig(Section):
    """The frozen base."""

    name: str = "embedded"
    """`embedded`, the absolute path of a Transformers folder, or a hub id."""
    revision: str = "main"
    """The branch, tag or commit of a model on the hub."""
    adapter: str = ""
    """The adapter that the run starts from: the absolute path of a PEFT folder, or a hub id; empty for none."""
    adapter_revision: str = "main"
    """The branch, tag or commit of an adapter on the hub."""
    quantization: Literal["nf4", "int8", "none", "gptq", "awq", "fp8", "compressed-tensors"] = "nf4"
    """How the frozen weights are stored: NF4 with double quantisation, int8, unquantised, or as the base was saved."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The type that the model computes in; auto is bfloat16 on a GPU that supports it, else float32."""
    gradient_checkpointing: bool = False
    """Whether to recompute activations in the backward pass: less memory, more time."""
    pooling: Literal["default", "mean"] = "default"
    """How a text is pooled: `mean` takes the mean of its last hidden states, `default` what the model's own head reads.

    For embeddings `default` is that mean in an encoder, and the last token in a decoder.
    """

    @property
    def pooled(self) -> bool:
        """Whether the mean of the tokens is what is read of a text."""
        return self.pooling == "mean"


class LoraConfig(Section):
    """The trained adapter."""

    rank: Count = 8
    """The rank r of the adapter; a node may choose a smaller one under rules that allow it."""
    rank_pattern: Annotated[str, Only(ranks.is_pattern, ranks.EXPECTED)] = ""
    """Layers with fewer slots, by name: `q_proj=4,mlp=2`; empty for none. All have the run's scale."""
    alpha: Positive = 16.0
    """The numerator of the scale s of `W x + s B A x`, which is alpha / r."""
    rslora: bool = False
    """Whether the scale is alpha / sqrt(r), as in rank-stabilised LoRA."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The dropout rate of the adapter's inputs in training; 0 for none."""
    targets: str = "all-linear"
    """The layers to adapt, separated by commas: `all-linear`, names of layers, or modules of the vision tower."""

    @property
    def scale(self) -> float:
        """The factor s of ``W x + s B A x``: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


class DataConfig(Section):
    """Where examples come from, and how a simulation divides them among its nodes."""

    source: str = "stdlib"
    """`stdlib`, a file (JSON, CSV, text, Parquet), a folder of files, or a hub data set."""
    partition: Literal["natural", "iid", "dirichlet", "none"] = "natural"
    """How a simulation divides the examples: by a field, evenly, unevenly by class, or all to every node."""
    partition_field: str = "family"
    """The field by whose values `data.partition` = natural divides the examples."""
    dirichlet_alpha: Positive = 0.5
    """How even the classes are under `data.partition` = dirichlet: the smaller, the less even."""
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """The share of a node's examples that is held out for scoring."""
    limit: CountOrOff = 0
    """The most records that a node uses; 0 for all."""
    pooled: bool = False
    """Whether every simulated node trains on all nodes' examples, as a baseline."""


class MergeConfig(Section):
    """What the server does under every rule."""

    offset_energy: Share = 1.0
    """The share of energy kept of an offset past the break-even rank; 1 keeps all of it."""


class TrainConfig(Section):
    """The local loop of one round."""

    steps: CountOrOff = 32
    """Optimizer steps of a node per round; 0 for `train.epochs` passes over its examples."""
    epochs: Count = 1
    """Passes over a node's examples per round, where `train.steps` is 0."""
    batch_size: Count = 8
    """Examples per physical batch."""
    accumulation: Count = 1
    """Physical batches per step."""
    blocks: CountOrOff = 0
    """Blocks of the model that are trained and sent in a round, drawn anew for each; 0 for all of them."""
    learning_rate: LearningRate = 0.0
    """The adapter's peak learning rate; 0 takes the rule's own."""
    head_learning_rate: LearningRate = 0.0
    """The peak learning rate of a classification head; 0 takes the adapter's."""
    clip_norm: NonNegative = 1.0
    """The norm to which the gradient of a step is clipped; 0 for no clipping."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the learning rate decays from its peak, over the steps of the whole run."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """The share of the run's steps over which the learning rate rises to its peak."""
    optimizer_state: Literal["reset", "kept"] = "reset"
    """What a node's optimizer starts a round with: nothing, or its moments from the node's last round."""
    weighting: Literal["examples", "uniform", "declared"] = "examples"
    """A node's weight in the mean: its number of examples, the same for all, or what its operator declares."""

    @property
    def keeps_optimizer(self) -> bool:
        """Whether a node's optimizer goes on in each round where it was."""
        return self.optimizer_state == "kept"


class WireConfig(Section):
    """How tensors travel."""

    down: str = "fp32"
    """How the state travels to the nodes."""
    up: str = "fp32"
    """How updates travel to the coordinator; what a lossy encoding drops from one is added to the next."""


class RunConfig(Section):
    """One run of the federation, the same on every machine.

    ``methods`` are the choices on the axes of a recipe and their hyperparameters, in the flat form: ``rule.name``,
    ``rule.florist.energy``.
    """

    num_server_rounds: Count = 5
    """The number of rounds."""
    min_nodes: Count = 2
    """How many nodes must be connected before a round starts."""
    fraction_train: Share = 1.0
    """The share of the nodes that are asked to train in a round."""
    fraction_evaluate: Share = 1.0
    """The share that scores: of the nodes that train in a round, and of all nodes after the last round."""
    seed: CountOrOff = 0
    """The seed of everything drawn at random, except the noise of a private run."""
    run_name: FileName = ""
    """The name of the run's folder; empty for the date and time."""
    run_directory: str = ""
    """The folder of all runs; empty for `runs` under `bouquet run`, else `~/.bouquet/runs`."""
    resume: bool = False
    """Whether to resume the run of this name from its newest checkpoint."""
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
            mistakes.append("privacy.clip-quantile: expected 0 unless privacy.mode is 'example' and clipping 'flat'")
        if self.privacy.score_noise and not self.privacy.per_example:
            mistakes.append("privacy.score-noise: expected 0 where privacy.mode is not 'example'")
        if self.data.pooled:
            mistakes.append("data.pooled: expected false in a private run, got true, which no node's budget covers")
        if self.task.class_weights == "balanced":
            mistakes.append("task.class-weights: expected the same on every node in a private run, got 'balanced'")
        if self.data.partition == "dirichlet":
            mistakes.append("data.partition: expected one that assigns each record independently, got 'dirichlet'")
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
