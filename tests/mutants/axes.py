"""What the other axes of a recipe get wrong: starts, optimizers, objectives, what is kept, laws."""

from tests.mutants import Mutant

INITS = ("tests/oracles/test_gradient_inits.py",)
OPTIMIZERS = ("tests/oracles/test_lora_pro.py", "tests/oracles/test_lora_pro_layers.py")
OBJECTIVES = ("tests/oracles/test_fedspeed.py", "tests/runs/test_loop_rules.py")
KEEPS = ("tests/laws/test_rules.py", "tests/laws/test_axes.py", "tests/runs/test_loop.py")
STARTS = ("tests/laws/test_continued.py", "tests/units/test_peft_folder.py", "tests/runs/test_continued.py")
LAWS = ("tests/units/test_laws.py", "tests/units/test_privacy.py")

AXES = (
    Mutant(
        "LoRA-GA: what the start adds is not taken off the frozen weight",
        "strategies/recipe.py",
        "if not self.init.moves and b.any() and (right := self.structure.right(adapter, layer)).any():",
        "if False:",
        INITS,
    ),
    Mutant(
        "LoRA-GA: what the start adds is taken off without its scale",
        "strategies/recipe.py",
        "= -scale * b, right",
        "= -b, right",
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
        "LoRA-Pro without its projection",
        "strategies/optimizers/lora_pro.py",
        "grad_b = grad_b - b @ torch.linalg.solve(gram_b, b.T @ grad_b)",
        "pass",
        OPTIMIZERS,
    ),
    Mutant(
        "LoRA-Pro's code: the scale is 2",
        "strategies/optimizers/lora_pro.py",
        "pair.scale**2",
        "4.0",
        OPTIMIZERS,
    ),
    Mutant(
        "LoRA-Pro: the gradients are adjusted by factors of another layer",
        "strategies/optimizers/lora_pro.py",
        "                adjust(pair, self.damping)\n",
        "                adjust(pairs[0], self.damping)\n",
        OPTIMIZERS,
    ),
    Mutant(
        "FedSpeed forgets its correction from step to step",
        "strategies/objectives/fedspeed.py",
        "parameter.detach() - start + correction",
        "parameter.detach() - start",
        OBJECTIVES,
    ),
    Mutant(
        "FedSpeed: the correction is that of the last round alone",
        "strategies/objectives/fedspeed.py",
        "[correction + parameter.detach() - start",
        "[parameter.detach() - start",
        OBJECTIVES,
    ),
    Mutant(
        "FedSpeed: the correction stays at home",
        "strategies/objectives/fedspeed.py",
        "return trained + remembered",
        "return trained",
        OBJECTIVES,
    ),
    Mutant(
        "FedSpeed: the node forgets its correction between two rounds",
        "client_app/session.py",
        '        self.memory.save("objective", remembered, state.round + 1)\n',
        "",
        OBJECTIVES,
    ),
    Mutant(
        "FedProx pulls away from where the round started",
        "strategies/objectives/fedprox.py",
        "parameter.detach() - start",
        "start - parameter.detach()",
        OBJECTIVES,
    ),
    Mutant(
        "a head that is each node's own is sent",
        "strategies/recipe.py",
        'and not (key.part in HEAD and self.config.task.head != "shared")',
        "",
        KEEPS,
    ),
    Mutant(
        "FedSA-LoRA: B is sent, and kept back all the same",
        "strategies/rules/fedsa_lora.py",
        'sent=frozenset({"A"})',
        "sent=FACTORS",
        KEEPS,
    ),
    Mutant(
        "what a node has kept is overwritten by what it receives",
        "strategies/keeps/keep.py",
        "{**received, **{key: tensor for key, tensor in kept.items() if self.keeps(key)}}",
        "{**{key: tensor for key, tensor in kept.items() if self.keeps(key)}, **received}",
        KEEPS,
    ),
    Mutant(
        "a private run whose gradient clips no example",
        "strategies/laws.py",
        "if privacy.per_example != (choices.gradient.engine is not None):",
        "if False:",
        LAWS,
    ),
    Mutant(
        "a private run in which a step computes two gradients, and counts one",
        "strategies/laws.py",
        "if privacy.on and (choices.objective.passes > 1 or choices.objective.remembers):",
        "if False:",
        LAWS,
    ),
    Mutant(
        "noise on the mean, for a rule that looks at every update",
        "strategies/laws.py",
        "if privacy.central and not rule.linear:",
        "if False:",
        LAWS,
    ),
    Mutant(
        "noise on the mean, where the mean is a median",
        "strategies/laws.py",
        "if privacy.central and isinstance(rule, MeanRule) and rule.mean != Weighted():",
        "if False:",
        LAWS,
    ),
    Mutant(
        "an optimizer that does not know what is trained",
        "strategies/laws.py",
        "if choices.optimizer.name not in fitting:",
        "if False:",
        LAWS,
    ),
    Mutant(
        "FedSpeed over a sample of the nodes, where its corrections make it diverge",
        "strategies/laws.py",
        "if choices.objective.remembers and share < 1:",
        "if False:",
        LAWS,
    ),
)
