"""The laws between the axes: what clashes is refused in a sentence that names what would fit."""

import re
from typing import Any

import pytest

from common.error import BouquetError
from strategies import Recipe

PRIVATE = {"privacy.mode": "example", "train.weighting": "uniform"}
LOCAL = {"privacy.mode": "update-local", "train.weighting": "uniform"}
CENTRAL = {"privacy.mode": "update-central", "train.weighting": "uniform"}
GA = {"init.name": "lora-ga", "init.lora-ga.source": "/public.jsonl"}
SB = {"init.name": "lora-sb", "init.lora-sb.source": "/public.jsonl"}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "in-batch negatives where every example is by itself": (
        {"task.name": "embed", **PRIVATE},
        "with in-batch negatives an example has a loss that depends on its companions, so no clipping bounds what it "
        "adds (task.negatives, privacy.mode = 'example'): expected own, got batch. Set task.negatives = 'own'",
    ),
    "in-batch negatives in a batch of one": (
        {"task.name": "embed", "train.batch-size": 1},
        "a batch of one record has no in-batch negatives (task.negatives = 'batch', train.batch-size): expected 2 or "
        "more",
    ),
    "a robust mean beside a rule that takes more": (
        {"rule.name": "flora", "mean.name": "median"},
        "the rule 'flora' takes more than a mean (mean.name = 'median', server-optimizer.name = 'none'): expected "
        "mean.name = 'weighted' and server-optimizer.name = 'none'. Rules that take these are fedit, ffa-lora,",
    ),
    "a server optimizer beside a rule that takes more": (
        {"rule.name": "fedex-lora", "server-optimizer.name": "adam"},
        "the rule 'fedex-lora' takes more than a mean (mean.name = 'weighted', server-optimizer.name = 'adam')",
    ),
    "a memory of nodes that are not asked": (
        {"objective.name": "fedspeed", "fraction-train": 0.5},
        "the objective 'fedspeed' corrects a mean over all nodes, and only some are asked "
        "(objective.name, fraction-train): expected fraction-train = 1.0, or another objective, got 0.5",
    ),
    "a structure that the rule does not know": (
        {"rule.name": "flora", "adapter.name": "vera"},
        "the rule 'flora' does not know what to do with this structure (adapter.name): expected 'auto', or lora or "
        "dylora, got vera. Rules that take it are fedit, local.",
    ),
    "a structure whose update is not linear in B": (
        {"rule.name": "ffa-lora", "adapter.name": "loldu"},
        "the rule 'ffa-lora' does not know what to do with this structure (adapter.name): expected 'auto', or lora, "
        "dylora or nlora, got loldu",
    ),
    **{
        f"moments of other factors, {rule}": (
            {"rule.name": rule, "train.optimizer-state": "kept"},
            f"a node's optimizer cannot go on under the rule '{rule}', which gives it other factors or another rank "
            "than it trained (train.optimizer-state): expected 'reset', or one of fedit,",
        )
        for rule in ("fedsvd", "flora", "fedrot-lora", "hetlora")
    },
    "another keep than the rule's": (
        {"rule.name": "fedsa-lora", "keep.name": "nothing"},
        "the rule 'fedsa-lora' goes with another choice (keep.name): expected 'b' or 'auto', got nothing",
    ),
    "factors' start where a core is trained": (
        {"rule.name": "fed-sb", **GA},
        "an init that does not fit what the rule 'fed-sb' trains (init.name): expected 'auto', or orthonormal, "
        "nystrom or lora-sb, got lora-ga",
    ),
    "a start where slots are cut": (
        {"rule.name": "hetlora", **GA},
        "the rule 'hetlora' makes starts of its own, which its init has to agree with (init.name): expected 'auto' or "
        "'drawn', got lora-ga",
    ),
    "a start where every round has one": (
        {"rule.name": "flora", **GA},
        "the rule 'flora' makes starts of its own, which its init has to agree with (init.name)",
    ),
    "a start that adds something where leading slots are trained without the others": (
        {"adapter.name": "dylora", "init.name": "pissa"},
        "the structure 'dylora' trains leading slots without the others, of a start that is taken off the base with "
        "all of them (init.name): expected 'auto', or drawn, eva or lora-sb, got pissa",
    ),
    "a start that adds something where some values are sent": (
        {"rule.name": "flasc", "init.name": "pissa"},
        "the rule 'flasc' sends some of the values of a start that is taken off the base with all of them (init.name): "
        "expected 'auto', or drawn, eva or lora-sb, got pissa",
    ),
    "a start where the nodes find the frames": (
        {"rule.name": "fed-sb", "rule.fed-sb.start": "nodes", **SB},
        "the rule 'fed-sb' makes starts of its own, which its init has to agree with (init.name): expected 'auto' or "
        "'orthonormal', got lora-sb",
    ),
    "an optimizer of factors where a core is trained": (
        {"rule.name": "ravan", "optimizer.name": "lora-pro"},
        "the optimizer 'lora-pro' does not know what the rule 'ravan' trains (optimizer.name): expected adamw, "
        "adamw-8bit, muon or sgd, got lora-pro",
    ),
    "factors in turns where one never learns": (
        {"rule.name": "ffa-lora", "optimizer.name": "la-lora"},
        "the optimizer 'la-lora' trains both factors in turns, 'ffa-lora' does not (optimizer.name): expected adamw,",
    ),
    "factors in turns by a gradient of all": (
        {**PRIVATE, "optimizer.name": "la-lora", "gradient.name": "hooks"},
        "the gradient 'hooks' is of all that is trained, in every step (gradient.name, optimizer.name = 'la-lora'): "
        "expected 'auto', or backward or fast, got hooks",
    ),
    "a start of zeros between frozen frames": (
        {"adapter.name": "loldu", "init.name": "drawn"},
        "the structure 'loldu' cannot start there (init.name): expected 'auto', or another start than one whose B is "
        "zero and stays so, or that leaves the base model, got drawn",
    ),
    "a correction where more than a mean is taken": (
        {"rule.name": "flexlora", "objective.name": "fedspeed"},
        "the objective 'fedspeed' sends a correction that 'flexlora' would merge (objective.name): expected none or "
        "fedprox, or a rule that averages what it trains, got fedspeed",
    ),
    "a correction where scales are multiplied into what is sent": (
        {"rule.name": "ravan", "objective.name": "fedspeed"},
        "the objective 'fedspeed' sends a correction that 'ravan' would merge (objective.name)",
    ),
    "a correction where differences are sent": (
        {"rule.name": "flasc", "objective.name": "fedspeed"},
        "the objective 'fedspeed' sends a correction that 'flasc' would merge (objective.name)",
    ),
    "a plain gradient in a private run": (
        {**PRIVATE, "gradient.name": "backward"},
        "a gradient that does not fit the privacy mode (gradient.name, privacy.mode = 'example'): expected fast or "
        "hooks, got backward",
    ),
    "a backward pass where none reaches what is trained": (
        {"rule.name": "fedkseed", "gradient.name": "backward"},
        "the gradient 'backward' is not one of what the rule 'fedkseed' trains (gradient.name): expected 'auto', or "
        "zeroth, got backward",
    ),
    "one scalar where there are factors": (
        {"gradient.name": "zeroth"},
        "the gradient 'zeroth' is not one of what the rule 'fedit' trains (gradient.name): expected 'auto', or "
        "backward, fast or hooks, got zeroth",
    ),
    "a head without a backward pass": (
        {"rule.name": "fedkseed", "task.name": "classify"},
        "the gradient 'zeroth' is of the adapter alone, and a head would never learn (task.head, gradient.name): "
        "expected frozen, got shared. Set task.head = 'frozen', ask in words",
    ),
    "directions in a private run": (
        {**PRIVATE, "rule.name": "fedkseed"},
        "the rule 'fedkseed' trains what no linear layer holds, by which a single example has no gradient (rule.name, "
        "privacy.mode = 'example'): expected a rule that trains linear layers alone, got c of 'seeded'",
    ),
    "scales of heads in a private run": (
        {**PRIVATE, "rule.name": "ravan"},
        "the rule 'ravan' trains what no linear layer holds, by which a single example has no gradient (rule.name, "
        "privacy.mode = 'example'): expected a rule that trains R alone, got R, s of 'core'. Leave it out where "
        "rule.ravan.* has an option for that, or choose another rule.",
    ),
    "a clipped gradient in a plain run": (
        {"gradient.name": "hooks"},
        "a gradient that does not fit the privacy mode (gradient.name, privacy.mode = 'none'): expected backward, "
        "got hooks",
    ),
    "a clipped gradient where the whole change is noised": (
        {**LOCAL, "gradient.name": "fast"},
        "a gradient that does not fit the privacy mode (gradient.name, privacy.mode = 'update-local'): expected "
        "backward, got fast",
    ),
    **{
        f"two gradients a step, {private['privacy.mode']}": (
            {**private, "objective.name": "fedspeed"},
            "the objective 'fedspeed' lets more of the data out than a private run counts (objective.name, "
            f"privacy.mode = '{private['privacy.mode']}'): expected none or fedprox, got fedspeed",
        )
        for private in (PRIVATE, LOCAL, CENTRAL)
    },
    "an example that looks at its companions": (
        {**PRIVATE, "task.name": "kto"},
        "an example of the task 'kto' has a loss that depends on its companions, so no clipping bounds what it adds "
        "(task.name, privacy.mode = 'example'): expected text,",
    ),
    "a reference that the start is not": (
        {"task.name": "dpo", "model.adapter": "/adapters/taught"},
        "the task 'dpo' compares with the base, and not with an adapter on it that the run starts from (task.name, "
        "model.adapter): expected model.adapter = '', got /adapters/taught. Merge the adapter into its base",
    ),
    "noise on a mean that is not enough": (
        {**CENTRAL, "rule.name": "flora"},
        "the rule 'flora' needs more of the updates than their mean, so no noise on the mean makes it private "
        "(privacy.mode = 'update-central'): expected one of fedit, ffa-lora,",
    ),
    "noise on a robust mean": (
        {**CENTRAL, "mean.name": "krum"},
        "a robust mean looks at every update, so no noise on the mean makes it private (privacy.mode = "
        "'update-central', mean.name): expected weighted, got krum",
    ),
    "a size that tells": (
        {**LOCAL, "rule.name": "hetlora"},
        "with the rule 'hetlora' the size of a message tells what a node learned, and no noise covers a size "
        "(privacy.mode = 'update-local'): expected rule.hetlora.keep = 1.0. Choose another rule, or privacy.mode = "
        "'example', whose training is private as a whole.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_clash_is_refused_by_name(case):
    flat, said = REFUSED[case]
    with pytest.raises(BouquetError, match=re.escape(said)):
        Recipe.read(flat)


@pytest.mark.parametrize(
    "flat",
    [
        {"rule.name": "fedsa-lora", "keep.name": "b", "adapter.name": "lora"},
        {"rule.name": "ravan", "mean.name": "median", "server-optimizer.name": "momentum"},
        {"rule.name": "fed-sb", **SB},
        {"rule.name": "ravan", "init.name": "orthonormal"},
        {"rule.name": "fedit", **GA},
        {"rule.name": "flora", "init.name": "drawn"},
        {"rule.name": "fedsa-lora", "optimizer.name": "lora-pro", "objective.name": "fedspeed"},
        {"rule.name": "ravan", "rule.ravan.scales": 0, "objective.name": "fedspeed"},
        {**PRIVATE, "gradient.name": "hooks", "objective.name": "fedprox"},
        {**PRIVATE, "task.name": "embed", "task.negatives": "own", "train.batch-size": 1},
        {**LOCAL, "task.name": "embed"},
        {**CENTRAL, "server-optimizer.name": "momentum"},
        {**LOCAL, "rule.name": "hetlora", "rule.hetlora.keep": 1.0},
        {**PRIVATE, "rule.name": "hetlora"},
        {**PRIVATE, "rule.name": "rolora", "train.optimizer-state": "kept"},
    ],
    ids=str,
)
def test_what_fits_is_built(flat):
    recipe = Recipe.read(flat)
    named = {axis: getattr(recipe, axis).name for axis in ("rule", "init", "optimizer", "objective", "gradient")}
    assert {axis: flat[f"{axis}.name"] for axis in named if f"{axis}.name" in flat}.items() <= named.items()
