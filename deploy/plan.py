"""`bouquet plan`: what a private run would cost each node, and what it can learn for it.

The noise is what the run itself would use, by the same functions. It is for the worst case, a node that takes part in
every round: noise for the mean participation is too little for whoever is drawn more often.

*Noise over signal* is the norm of a step's noise over the largest norm that the sum of clipped gradients can have:
``sqrt(d) sigma / B`` for d trained values and a mean batch of B. For the whole change of a node it is
``2 sqrt(d) sigma``, since the change can turn round; on the mean of n nodes it is ``sqrt(d) sigma / n``. Near 1 and
above, a step is mostly noise.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from common import readable
from common.adapter.spec import Spec
from common.adapter.values import Tensors
from common.config.run import RunConfig
from common.error import BouquetError
from common.privacy import accounting
from common.privacy.accounting import Release
from deploy import settings
from deploy.settings import Commands
from strategies import RULES, Recipe, read_config
from strategies.cost import planned_bytes
from strategies.strategy import share_of

MOSTLY_NOISE = 1.0
SAYS_LITTLE = 10.0


@dataclass(frozen=True)
class RulePlan:
    """What a rule trains and sends in a round: values, and bytes one way and the other; the most over the rounds."""

    name: str
    trained: int
    noised: int
    up: float
    down: float


def add_to(commands: Commands) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "plan",
        help="what a private run would cost each node",
        description="Example: bouquet plan --records 5000,1200 profiles/private.toml privacy.epsilon=3",
    )
    parser.add_argument(
        "--records",
        type=_sizes,
        default=[],
        metavar="N,N,...",
        help="the public number of each node's records (or persons)",
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="run config, or a TOML file of it")
    parser.set_defaults(work=lambda options: _show(options.settings, options.records))


def _show(written: Sequence[str], records: Sequence[int]) -> int:
    config = read_config(settings.read(written))
    if not records and not config.privacy.records:
        raise BouquetError(
            "a plan needs the public number of each node's records", where="--records, privacy.records", got="neither"
        )
    return show(config, records or [config.privacy.records])


def releases(config: RunConfig, records: Sequence[int]) -> list[Release]:
    """The release of each round, for each public number of records."""
    steps, rounds = config.train.steps, config.num_server_rounds
    return [accounting.plan(config.privacy, config.trained_on(size), steps, rounds, config.scores) for size in records]


def _plans(config: RunConfig, spec: Spec) -> Iterator[RulePlan]:
    """The plan of every rule that fits the privacy mode and the rank; a misfit of the run's own rule is raised."""
    from common.record import peft_folder  # what knows models takes seconds to import

    given = peft_folder.given(config, spec)
    for name in RULES:
        try:
            yield rule_plan(_recipe(config, name), spec, given)
        except BouquetError:
            if name == config.rule:
                raise


def rule_plan(recipe: Recipe, spec: Spec, given: Tensors | None = None) -> RulePlan:
    """What a recipe costs, for a model of this shape, that starts from an adapter if one is ``given``."""
    config, spec = recipe.config, replace(spec, structure=recipe.structure)
    sizes = {key: math.prod(shape) for key, shape in (spec.factor_shapes() | dict(spec.head)).items()}
    rounds = range(min(config.num_server_rounds, 2))  # a rule alternates between two rounds at most
    trained = max(sum(sizes[key] for key in recipe.trained(turn, sizes)) for turn in rounds)
    sent = max(sum(sizes[key] for key in recipe.sent(turn, sizes)) for turn in rounds)
    noised = trained if config.privacy.per_example else sent
    crossed = planned_bytes(recipe, spec, share_of(config.min_nodes, config.fraction_train), given)
    return RulePlan(recipe.rule.name, trained, noised, crossed.up, crossed.down)


def noise_over_signal(config: RunConfig, values: int, release: Release, records: int, nodes: int) -> float:
    """The norm of the noise over the largest norm of what it covers."""
    spread = math.sqrt(values) * release.noise_multiplier
    per_mode = {
        "example": spread / (release.sample_rate * config.trained_on(records)),
        "update-local": 2 * spread,
        "update-central": spread / nodes,
    }
    return per_mode[config.privacy.mode]


def warnings(config: RunConfig, records: Sequence[int], planned: Sequence[Release], own: RulePlan) -> list[str]:
    """What the run should not be started with."""
    privacy, found = config.privacy, []
    for size, release in zip(records, planned, strict=True):
        if privacy.delta >= 1 / size:
            found.append(
                f"{size} records: delta {privacy.delta:g} is not below 1/{size}: a mechanism that reveals one record "
                f"in full could satisfy it. Set privacy.delta to {0.1 / size:.0e} or less."
            )
        if privacy.per_example and privacy.expected_batch >= size:
            found.append(f"{size} records: every record is in every step, so sampling protects none of them.")
        if (share := noise_over_signal(config, own.noised, release, size, len(records))) >= MOSTLY_NOISE:
            cure = {
                "example": "Raise privacy.expected-batch, or train fewer values (another rule, a lower lora.rank).",
                "update-local": "Use privacy.mode = 'example': this mode is for thousands of nodes or few values.",
                "update-central": "It needs more nodes, or fewer values.",
            }
            found.append(f"{size} records: noise is {share:.2g} times the largest signal. {cure[privacy.mode]}")
    if privacy.epsilon > SAYS_LITTLE and not privacy.noise_multiplier:
        ratio = math.exp(min(privacy.epsilon, 700))
        found.append(f"epsilon {privacy.epsilon:g} promises little: odds may change {ratio:.0e}-fold.")
    return found


def show(config: RunConfig, records: Sequence[int]) -> int:
    """Print the plan. Raises :class:`BouquetError` where the run is not private."""
    privacy, rounds = config.privacy, config.num_server_rounds
    if not privacy.on:
        raise BouquetError("a run without privacy has no plan", where="privacy.mode", cure="Set privacy.mode=example.")
    Recipe.build(config)
    planned = releases(config, records)
    console = Console(width=110, highlight=False, soft_wrap=True)
    console.print(
        f"{privacy.mode}, {rounds} rounds, delta {privacy.delta:g}, accountant {privacy.accountant}, "
        f"{config.rule} at learning rate {config.train.learning_rate:g}; for a node that takes part in every round"
    )
    console.print(_costs(config, records, planned))
    from common.models import adapted  # what knows models takes seconds to import

    spec = adapted.describe(config.model, config.lora, config.task)
    plans = {plan.name: plan for plan in _plans(config, spec)}
    console.print(_rules(config, records, planned, plans))
    for warning in warnings(config, records, planned, plans[config.rule]):
        console.print(f"warning: {warning}", markup=False)
    return 0


def _costs(config: RunConfig, records: Sequence[int], planned: Sequence[Release]) -> Table:
    """A column a node: its release, and epsilon after each round."""
    privacy = config.privacy
    table = Table("records", *map(str, records))
    for label, facts in (
        ("noise multiplier", [f"{release.noise_multiplier:.4g}" for release in planned]),
        ("sampling rate", [f"{release.sample_rate:.4g}" for release in planned]),
        ("steps per round", [str(release.steps) for release in planned]),
    ):
        table.add_row(label, *facts)
    scored = Release(privacy.score_noise, 1.0, 1) if privacy.score_noise else None
    if scored:
        price = accounting.epsilon([scored] * config.scores, privacy.delta, privacy.accountant)
        table.add_row(f"epsilon of {config.scores} scores alone", *[f"{price:.3f}"] * len(records))
    table.add_section()
    for turn in range(1, config.num_server_rounds + 1):
        scores = [scored] * config.scores_after(turn) if scored else []
        spent = [accounting.epsilon([*[r] * turn, *scores], privacy.delta, privacy.accountant) for r in planned]
        table.add_row(f"epsilon after round {turn}", *(f"{epsilon:.3f}" for epsilon in spent))
        if config.fraction_train < 1 and turn == round(config.fraction_train * config.num_server_rounds):
            table.add_row(f"  (a node's mean share of the rounds: {turn})")
    return table


def _rules(config: RunConfig, records: Sequence[int], planned: Sequence[Release], plans: dict[str, RulePlan]) -> Table:
    """A row a rule: what it trains, what crosses, and a node's noise over its signal."""
    sizes = [f"noise/signal, {size}" for size in records]
    table = Table("rule", "trained values", "up", "down", *sizes, title="a round of one node", title_justify="left")
    for name, plan in plans.items():
        ratios = [
            noise_over_signal(config, plan.noised, release, size, len(records))
            for size, release in zip(records, planned, strict=True)
        ]
        facts = (f"{plan.trained:,}", readable.size(plan.up), readable.size(plan.down), *(f"{r:.3g}" for r in ratios))
        table.add_row(f"{name} *" if name == config.rule else name, *facts)
    return table


def _recipe(config: RunConfig, name: str) -> Recipe:
    return Recipe.build(config.model_copy(update={"methods": {**config.methods, "rule.name": name}}))


def _sizes(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"expected whole numbers above 0, separated by commas, got '{text}'")
    return [int(part) for part in parts]
