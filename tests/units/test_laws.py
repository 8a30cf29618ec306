"""The laws between the axes: what clashes is refused in a sentence that names what would fit. A long table."""

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
        "with in-batch negatives an example's loss depends on the rest of its batch, so clipping does not bound what "
        "it adds (task.negatives, privacy.mode = 'example'): expected own, got batch. Set task.negatives = 'own'",
    ),
    "in-batch negatives in a batch of one": (
        {"task.name": "embed", "train.batch-size": 1},
        "a batch of one record has no in-batch negatives (task.negatives = 'batch', train.batch-size): expected 2 or "
        "more",
    ),
    "a robust mean beside a rule that takes more": (
        {"rule.name": "flora", "mean.name": "median"},
        "the rule 'flora' needs more than a mean (mean.name = 'median', server-optimizer.name = 'none'): expected "
        "mean.name = 'weighted' and server-optimizer.name = 'none'. Rules that support these are fedit, ffa-lora,",
    ),
    "a server optimizer beside a rule that takes more": (
        {"rule.name": "fedex-lora", "server-optimizer.name": "adam"},
        "the rule 'fedex-lora' needs more than a mean (mean.name = 'weighted', server-optimizer.name = 'adam')",
    ),
    "a memory of nodes that are not asked": (
        {"objective.name": "fedspeed", "fraction-train": 0.5},
        "the objective 'fedspeed' corrects a mean over all nodes, and only some are asked "
        "(objective.name, fraction-train): expected fraction-train = 1.0, or another objective, got 0.5",
    ),
    **{
        f"blocks that rest, {rule}": (
            {"rule.name": rule, "train.blocks": 2},
            f"the rule '{rule}' chooses what a node trains by all that the model has (train.blocks): expected 0, or "
            "one of fedit, ffa-lora,",
        )
        for rule in ("flasc", "fed-plora", "ravan")
    },
    "slots that are shared out, of a diagonal's frames": (
        {"init.name": "eva", "init.eva.source": "/public.jsonl", "init.eva.rho": 2.0, "adapter.name": "nlora"},
        "the init 'eva' shares out the slots of a plain LoRA between all layers (init.name, lora.rank-pattern, "
        "adapter.name): expected lora.rank-pattern = '' and adapter.name = 'lora', got '', 'nlora'",
    ),
    "a layer of more slots than the run": (
        {"lora.rank-pattern": "q_proj=4,v_proj=16"},
        "a layer of more slots than the adapter has (lora.rank-pattern): expected at most 8 (lora.rank), got v_proj=16",
    ),
    **{
        f"layers of several ranks, {rule}": (
            {"rule.name": rule, "lora.rank-pattern": "q_proj=4", **more},
            f"the rule '{rule}' with the structure '{structure}' counts slots across layers (lora.rank-pattern, "
            "init.name): expected one rank for all, or one of fedit, ffa-lora, rolora, ",
        )
        for rule, structure, more in (
            ("ravan", "core", {}),
            ("fed-plora", "lora", {}),
            ("hetlora", "lora", {}),
            ("fed-sb", "core", {"rule.fed-sb.start": "nodes"}),
            ("fedit", "dylora", {"adapter.name": "dylora"}),
        )
    },
    "a structure that the rule does not know": (
        {"rule.name": "flora", "adapter.name": "vera"},
        "the rule 'flora' does not support this structure (adapter.name): expected 'auto', or lora or "
        "dylora, got vera. Rules that support it are fedit, local.",
    ),
    "a structure whose update is not linear in B": (
        {"rule.name": "ffa-lora", "adapter.name": "loldu"},
        "the rule 'ffa-lora' does not support this structure (adapter.name): expected 'auto', or lora, "
        "dylora or nlora, got loldu",
    ),
    **{
        f"moments of other factors, {rule}": (
            {"rule.name": rule, "train.optimizer-state": "kept"},
            f"a node's optimizer state cannot be kept under the rule '{rule}', which gives the node "
            "other factors or another rank than it trained (train.optimizer-state): expected 'reset', or one of fedit,",
        )
        for rule in ("fedsvd", "flora", "fedrot-lora", "hetlora")
    },
    "another keep than the rule's": (
        {"rule.name": "fedsa-lora", "keep.name": "nothing"},
        "the rule 'fedsa-lora' requires another choice (keep.name): expected 'b' or 'auto', got nothing",
    ),
    "factors' start where a core is trained": (
        {"rule.name": "fed-sb", **GA},
        "an init that does not fit what the rule 'fed-sb' trains (init.name): expected 'auto', or orthonormal, "
        "nystrom or lora-sb, got lora-ga",
    ),
    "a start where slots are cut": (
        {"rule.name": "hetlora", **GA},
        "the rule 'hetlora' makes starts of its own, which its init has to match (init.name): expected 'auto' or "
        "'drawn', got lora-ga",
    ),
    "a start where every round has one": (
        {"rule.name": "flora", **GA},
        "the rule 'flora' makes starts of its own, which its init has to match (init.name)",
    ),
    "a start that adds something where leading slots are trained without the others": (
        {"adapter.name": "dylora", "init.name": "pissa"},
        "the structure 'dylora' trains leading slots without the others, but the whole start is subtracted from "
        "the base (init.name): expected 'auto', or drawn, eva or lora-sb, got pissa",
    ),
    "a start that adds something where some values are sent": (
        {"rule.name": "flasc", "init.name": "pissa"},
        "the rule 'flasc' sends only some values of a start that is subtracted from the base as a whole (init.name): "
        "expected 'auto', or drawn, eva or lora-sb, got pissa",
    ),
    "a start where the nodes find the frames": (
        {"rule.name": "fed-sb", "rule.fed-sb.start": "nodes", **SB},
        "the rule 'fed-sb' makes starts of its own, which its init has to match (init.name): expected 'auto' or "
        "'orthonormal', got lora-sb",
    ),
    "an optimizer of factors where a core is trained": (
        {"rule.name": "ravan", "optimizer.name": "lora-pro"},
        "the optimizer 'lora-pro' does not support what the rule 'ravan' trains (optimizer.name): expected adamw, "
        "adamw-8bit, muon, natural, svd-shrink or sgd, got lora-pro",
    ),
    "factors in turns where one never learns": (
        {"rule.name": "ffa-lora", "optimizer.name": "la-lora"},
        "the optimizer 'la-lora' trains both factors in turns, 'ffa-lora' does not (optimizer.name): expected adamw,",
    ),
    "factors in turns by a gradient of all": (
        {**PRIVATE, "optimizer.name": "la-lora", "gradient.name": "hooks"},
        "the gradient 'hooks' covers everything that is trained, in every step (gradient.name, optimizer.name = "
        "'la-lora'): expected 'auto', or backward or fast, got hooks",
    ),
    "an adapter to start from under what is no LoRA": (
        {"adapter.name": "ia3", "model.adapter": "/adapters/flu"},
        "what the structure 'ia3' trains is kept as IA3, which holds no LoRA beside it (adapter.name, model.adapter): "
        "expected model.adapter = '', or lora, dylora,",
    ),
    "what is no LoRA over a base that PEFT adapts by nothing else": (
        {"adapter.name": "ia3", "model.quantization": "gptq"},
        "PEFT loads no IA3 over a base that is held like this (adapter.name, model.quantization): expected lora,",
    ),
    "a start that an offset takes off, under what is no LoRA": (
        {"adapter.name": "dora", "init.name": "pissa"},
        "the structure 'dora' starts at the base's weights, and has no place for an offset (init.name): expected "
        "'auto', or drawn, got pissa",
    ),
    "what PEFT does not load over an int8 base": (
        {"adapter.name": "dora", "model.quantization": "int8"},
        "or another quantization than awq, gptq or int8, got dora over int8",
    ),
    **{
        f"noise that is not there, {mode['privacy.mode']}": (
            {**mode, "optimizer.name": "svd-shrink"},
            "the optimizer 'svd-shrink' is about the noise in a step's gradients, and there is none (optimizer.name, "
            f"privacy.mode = '{mode['privacy.mode']}'): expected privacy.mode = 'example', or adamw, adamw-8bit,",
        )
        for mode in ({"privacy.mode": "none"}, LOCAL, CENTRAL)
    },
    "a start of zeros between frozen frames": (
        {"adapter.name": "loldu", "init.name": "drawn"},
        "the structure 'loldu' cannot start from this init (init.name): expected 'auto', or an init that neither "
        "leaves B at zero nor moves the base model, got drawn",
    ),
    **{
        f"corrections by the mean, {key}={name}": (
            {"objective.name": "scaffold", key: name},
            "the objective 'scaffold' takes what comes back for the mean of what the nodes have trained "
            "(objective.name, rule.name, mean.name, server-optimizer.name): expected a rule of fedit, ffa-lora, "
            "rolora, fedsa-lora, fed-sb or fedkseed, mean.name = 'weighted' and server-optimizer.name = 'none', got ",
        )
        for key, name in (
            ("mean.name", "median"),
            ("server-optimizer.name", "momentum"),
            ("rule.name", "fedsvd"),
            ("rule.name", "fedrot-lora"),
            ("rule.name", "flexlora"),
            ("rule.name", "local"),
        )
    },
    "orthogonal to nothing": (
        {"objective.name": "orthogonal"},
        "the objective 'orthogonal' is about an earlier adapter, and the run starts from none (objective.name, "
        "model.adapter): expected an adapter to start from, or another objective, got ''",
    ),
    **{
        f"orthogonal to more than what came before, {name}": (
            {"objective.name": "orthogonal", "model.adapter": "/adapters/taught", f"{axis}.name": name},
            "the objective 'orthogonal' is about factors that are trained over an earlier adapter, and nothing else "
            "(objective.name, rule.name, adapter.name, init.name): expected a rule of fedit, rolora, fedsa-lora, "
            "fedrot-lora, flexlora, raflora, lora-fair, hetlora, flasc, fedsrd, lora-lego or local, a plain LoRA, and "
            "a start that adds nothing, got ",
        )
        for axis, name in (
            ("rule", "flora"),
            ("rule", "fedex-lora"),
            ("rule", "fed-plora"),
            ("rule", "ffa-lora"),
            ("adapter", "nlora"),
            ("init", "pissa"),
        )
    },
    "a correction where more than a mean is taken": (
        {"rule.name": "flexlora", "objective.name": "fedspeed"},
        "the objective 'fedspeed' sends a correction that 'flexlora' would merge (objective.name): expected none, "
        "fedprox, orthogonal or group-sparsity, or a rule that averages what it trains, got fedspeed",
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
        "the gradient 'backward' does not support what the rule 'fedkseed' trains (gradient.name): expected 'auto', or "
        "zeroth, got backward",
    ),
    "one scalar where there are factors": (
        {"gradient.name": "zeroth"},
        "the gradient 'zeroth' does not support what the rule 'fedit' trains (gradient.name): expected 'auto', or "
        "backward, fast or hooks, got zeroth",
    ),
    "a head without a backward pass": (
        {"rule.name": "fedkseed", "task.name": "classify"},
        "the gradient 'zeroth' is of the adapter alone, and a head would never learn (task.head, gradient.name): "
        "expected frozen, got shared. Set task.head = 'frozen', ask in words",
    ),
    "directions in a private run": (
        {**PRIVATE, "rule.name": "fedkseed"},
        "the rule 'fedkseed' trains tensors outside linear layers, which have no gradient for each example (rule.name, "
        "privacy.mode = 'example'): expected a rule that trains only linear layers, got c of 'seeded'",
    ),
    "scales of heads in a private run": (
        {**PRIVATE, "rule.name": "ravan"},
        "the rule 'ravan' trains tensors outside linear layers, which have no gradient for each example (rule.name, "
        "privacy.mode = 'example'): expected a rule that trains only R, got R, s of 'core'. Leave it out where "
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
            "the objective 'fedspeed' releases more of the data than a private run accounts for (objective.name, "
            f"privacy.mode = '{private['privacy.mode']}'): expected none, fedprox, orthogonal or "
            "group-sparsity, got fedspeed",
        )
        for private in (PRIVATE, LOCAL, CENTRAL)
    },
    "an example that looks at its companions": (
        {**PRIVATE, "task.name": "kto"},
        "in the task 'kto' an example's loss depends on the rest of its batch, so clipping does not bound what it adds "
        "(task.name, privacy.mode = 'example'): expected text,",
    ),
    "a reference that the start is not": (
        {"task.name": "dpo", "model.adapter": "/adapters/taught"},
        "the task 'dpo' compares with the bare base, not with an adapter that the run starts from (task.name, "
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
        "with the rule 'hetlora' the size of a message reveals what a node learned, and noise cannot hide a size "
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
        {"rule.name": "rolora", "objective.name": "scaffold"},
        {**PRIVATE, "objective.name": "orthogonal", "model.adapter": "/adapters/taught"},
        {**CENTRAL, "rule.name": "ffa-lora", "objective.name": "group-sparsity"},
        {**PRIVATE, "gradient.name": "hooks", "objective.name": "fedprox"},
        {**PRIVATE, "task.name": "embed", "task.negatives": "own", "train.batch-size": 1},
        {**LOCAL, "task.name": "embed"},
        {**CENTRAL, "server-optimizer.name": "momentum"},
        {**LOCAL, "rule.name": "hetlora", "rule.hetlora.keep": 1.0},
        {**PRIVATE, "rule.name": "hetlora"},
        {**PRIVATE, "optimizer.name": "svd-shrink", "privacy.clip-quantile": 0.5},
        {**PRIVATE, "rule.name": "rolora", "train.optimizer-state": "kept"},
    ],
    ids=str,
)
def test_what_fits_is_built(flat):
    recipe = Recipe.read(flat)
    named = {axis: getattr(recipe, axis).name for axis in ("rule", "init", "optimizer", "objective", "gradient")}
    assert {axis: flat[f"{axis}.name"] for axis in named if f"{axis}.name" in flat}.items() <= named.items()
