"""What a node's objectives, optimizers, blocks and ranks get wrong."""

from tests.mutants import Mutant

LAWS = ("tests/units/test_laws.py",)
SCAFFOLD = ("tests/oracles/test_scaffold.py",)
STEPS = ("tests/oracles/test_optimizers.py",)
SHRINK = ("tests/oracles/test_svd_shrink.py",)
BLOCKS = ("tests/laws/test_blocks.py", "-m", "not slow")
RANKS = ("tests/laws/test_ranks.py", "-m", "not slow")
PENALTIES = ("tests/oracles/test_penalties.py",)

NODES = (
    Mutant(
        "SCAFFOLD corrects towards the node's own optimum",
        "strategies/objectives/scaffold.py",
        "parameter.grad.sub_(start - own, alpha=self.gain)",
        "parameter.grad.add_(start - own, alpha=self.gain)",
        SCAFFOLD,
    ),
    Mutant(
        "SCAFFOLD: a control variate is that of the last round alone",
        "strategies/objectives/scaffold.py",
        "[own + parameter.detach() - start",
        "[parameter.detach()",
        SCAFFOLD,
    ),
    Mutant(
        "SCAFFOLD: a node's first correction is all of the state",
        "client_app/training.py",
        "objective.first(start)",
        "torch.zeros_like(start)",
        SCAFFOLD,
    ),
    Mutant(
        "SCAFFOLD where the server does not take the mean",
        "strategies/laws/objective.py",
        "if objective.compares and not _comes_back_as_its_mean(rule):",
        "if False:",
        LAWS,
    ),
    Mutant(
        "group sparsity: A and B are groups of their own",
        "strategies/objectives/group_sparsity.py",
        "groups[key.layer].append",
        "groups[str(key)].append",
        PENALTIES,
    ),
    Mutant(
        "group sparsity: a ridge, which presses long layers the most",
        "strategies/objectives/group_sparsity.py",
        "torch.cat(group).norm()",
        "torch.cat(group).square().sum()",
        PENALTIES,
    ),
    Mutant(
        "O-LoRA's code: absolute values of rows as they are",
        "strategies/objectives/orthogonal.py",
        "@ directions.T).square().sum()",
        "@ directions.T).abs().sum()",
        PENALTIES,
    ),
    Mutant(
        "O-LoRA: rows of any length stand for directions",
        "strategies/objectives/orthogonal.py",
        "= directions[:rank].float()",
        "= right.float()",
        PENALTIES,
    ),
    Mutant(
        "O-LoRA: the earlier adapter is what is trained",
        "strategies/recipe.py",
        " and not self.objective.over",
        "",
        ("tests/runs/test_continued.py",),
    ),
    Mutant(
        "O-LoRA where a rule puts its own rounds under the factors",
        "strategies/laws/objective.py",
        "and not (rule.moves_offset or rule.scattered)",
        "",
        LAWS,
    ),
    Mutant(
        "an objective's own term is left out",
        "client_app/training.py",
        "recipe.objective.penalty(live, earlier)",
        "None",
        PENALTIES,
    ),
    Mutant(
        "a natural gradient: the Fisher matrix is of this step alone",
        "strategies/optimizers/natural.py",
        "torch.cat([kept, parameter.grad[None]])",
        "parameter.grad[None]",
        STEPS,
    ),
    Mutant(
        "a natural gradient: the memory grows without end",
        "strategies/optimizers/natural.py",
        "past[max(0, len(past) - self.memory + 1) :]",
        "past",
        STEPS,
    ),
    Mutant(
        "a natural gradient: what is remembered is what was stepped along",
        "strategies/optimizers/natural.py",
        "optimizer.state[parameter][RECENT] = gradients",
        "optimizer.state[parameter][RECENT] = torch.cat([gradients[:-1], parameter.grad[None]])",
        STEPS,
    ),
    Mutant(
        "shrinking: the noise is taken to be that of a square matrix",
        "strategies/optimizers/svd_shrink.py",
        "rows / columns",
        "1.0",
        SHRINK,
    ),
    Mutant(
        "shrinking: a tall gradient is shrunk by its rows",
        "strategies/optimizers/svd_shrink.py",
        "(deviation**2 * columns)",
        "(deviation**2 * gradient.shape[1])",
        SHRINK,
    ),
    Mutant(
        "shrinking by the noise of the sum, not of the mean",
        "client_app/privacy.py",
        "deviation = mechanism.deviation / privacy.expected_batch",
        "deviation = mechanism.deviation",
        SHRINK,
    ),
    Mutant(
        "an optimizer that shrinks noise, without any",
        "strategies/laws/node.py",
        "if choices.optimizer.denoises and not choices.config.privacy.per_example:",
        "if False:",
        LAWS,
    ),
    Mutant(
        "XGBLoRA: the same blocks in every round",
        "strategies/blocks.py",
        'layer_seed(seed, round, "blocks")',
        "seed",
        BLOCKS,
    ),
    Mutant(
        "XGBLoRA: what rests is merged as if it had been trained",
        "strategies/recipe.py",
        "if key.part not in own and key.layer not in resting",
        "if key.part not in own",
        BLOCKS,
    ),
    Mutant(
        "XGBLoRA: what has rested is another draw on the server than on a node",
        "strategies/recipe.py",
        "if self.rule.restarts:  #",
        "if False:  #",
        BLOCKS,
    ),
    Mutant(
        "ranks by layer: a stack is divided to the run's rank",
        "strategies/rules/stack.py",
        "len(state.adapter[a]), state.scale",
        "state.rank, state.scale",
        RANKS,
    ),
    Mutant(
        "ranks by layer: a state's rank is its first layer's",
        "common/adapter/values.py",
        "return max(self.ranks.values())",
        "return next(iter(self.ranks.values()))",
        RANKS,
    ),
    Mutant(
        "ranks by layer: a name fits whatever has it as letters",
        "common/adapter/ranks.py",
        'f".{name}." in f".{layer}."',
        "name in layer",
        RANKS,
    ),
    Mutant(
        "EVA: slots go by how much varies, and not by their share of the layer's",
        "strategies/inits/eva.py",
        "squares / squares.sum().clamp_min(torch.finfo(squares.dtype).tiny)",
        "squares",
        RANKS,
    ),
    Mutant(
        "ranks by layer: bytes are those of one rank",
        "strategies/cost.py",
        "min(1.0, rank / slots)",
        "rank / state.rank",
        RANKS,
    ),
)
