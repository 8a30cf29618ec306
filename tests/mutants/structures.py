"""What structures and starts get wrong, and an adapter as a start."""

from tests.mutants import Mutant

INITS = ("tests/oracles/test_gradient_inits.py",)
STRUCTURES = ("tests/laws/test_structures.py", "tests/oracles/test_structures.py")
STARTS = ("tests/laws/test_continued.py", "tests/units/test_peft_folder.py", "tests/runs/test_continued.py")

STRUCTURED = (
    Mutant(
        "LoRA-GA: what the start adds is not taken off the frozen weight",
        "strategies/recipe.py",
        "if not self.init.moves and left.any() and right.any():",
        "if False:",
        INITS,
    ),
    Mutant(
        "LoRA-GA: what the start adds is taken off without its scale",
        "strategies/recipe.py",
        "= -scale * left, right",
        "= -left, right",
        INITS,
    ),
    Mutant(
        "LoRA-GA: A and B start in the same directions",
        "strategies/inits/lora_ga.py",
        "u[:, rank : 2 * rank]",
        "u[:, :rank]",
        INITS,
    ),
    Mutant(
        "LoRA-SB: the start goes up the gradient",
        "strategies/inits/lora_sb.py",
        "-self.step * seen.sign()",
        "self.step * seen.sign()",
        INITS,
    ),
    Mutant(
        "an adapter as a start: alpha is left out",
        "common/record/peft_folder.py",
        'update[Key(layer, "Q")] = scale * factors',
        'update[Key(layer, "Q")] = factors',
        STARTS,
    ),
    Mutant(
        "an adapter as a start: rank-stabilised or not is one",
        "common/record/peft_folder.py",
        'alpha / (rank**0.5 if settings["use_rslora"] else rank)',
        "alpha / rank",
        STARTS,
    ),
    Mutant(
        "an adapter as a start: slots that it does not fill are zero in both factors",
        "common/adapter/continued.py",
        "torch.where(alive[:, None], a, fresh)",
        "a",
        STARTS,
    ),
    Mutant(
        "an adapter as a start: what does not fit the rank is lost",
        "strategies/recipe.py",
        "if rest[0].numel():",
        "if False:",
        STARTS,
    ),
    Mutant(
        "an adapter as a start: its head is drawn on the nodes",
        "strategies/recipe.py",
        "sent = OFFSET | (HEAD if self.config.model.adapter else frozenset())",
        "sent = OFFSET",
        STARTS,
    ),
    Mutant(
        "what a coarse codec has changed on its way is held to the coordinator's digest",
        "strategies/recipe.py",
        'once = equipped and self.config.wire.down == "fp32"',
        "once = equipped",
        STARTS,
    ),
    Mutant(
        "Fed-PLoRA: what a node does not train takes the offset's place",
        "strategies/rules/fed_plora.py",
        "torch.cat([offset[key], side], dim=dim) if key in offset else side",
        "side",
        STARTS,
    ),
    Mutant(
        "DyLoRA: slots that were not drawn are computed with",
        "common/adapter/dylora.py",
        "return torch.where(number < self.slots, y, 0.0)",
        "return y",
        STRUCTURES,
    ),
    Mutant(
        "DyLoRA: whoever computes without training has the slots of the last step",
        "common/adapter/dylora.py",
        "if not self.training:",
        "if False:",
        STRUCTURES,
    ),
    Mutant(
        "RandLoRA: one diagonal before all bases",
        "common/adapter/randlora.py",
        "linear(scaled(x), block) for scaled, block",
        "linear(self.diagonals[0](x), block) for _, block",
        STRUCTURES,
    ),
    Mutant(
        "IA3: PEFT loads the change of the scale, and not the scale",
        "common/record/form.py",
        "1 + state.scale * g[:, None]",
        "state.scale * g[:, None]",
        STRUCTURES,
    ),
    Mutant(
        "IA3: a scale of its own is left out",
        "common/adapter/ia3.py",
        "module.scaling[active_adapter] * module.lora_B",
        "module.lora_B",
        STRUCTURES,
    ),
    Mutant(
        "DoRA: the gradient sees the norm",
        "common/adapter/dora.py",
        "@torch.no_grad()\ndef norms",
        "def norms",
        STRUCTURES,
    ),
    Mutant(
        "DoRA: the bias is turned too",
        "common/adapter/dora.py",
        "(result - bias + change)",
        "(result + change)",
        STRUCTURES,
    ),
    Mutant(
        "DoRA: PEFT loads the magnitude of the start",
        "common/record/form.py",
        " * (1 + state.scale * g)",
        "",
        STRUCTURES,
    ),
    Mutant(
        "a start between frozen frames counts twice: in the frames' core and in the offset",
        "strategies/recipe.py",
        "= -scale * left, right",
        "= scale * left, right",
        STRUCTURES,
    ),
    Mutant(
        "a diagonal's gradient is that of the whole batch",
        "strategies/gradients/fast.py",
        "examples=lambda g, x: (g * x).sum(1),",
        "examples=lambda g, x: (g * x).sum(1).mean(0).expand(len(x), -1),",
        STRUCTURES,
    ),
)
