"""What rules get wrong."""

from tests.mutants import Mutant

TESTS = ("tests/test_laws.py", "tests/test_oracles.py", "tests/test_config.py")

RULES = (
    Mutant(
        "FLoRA's FedIT baseline: only one node counts",
        "common/adapter.py",
        "average.lerp_(tensors[key], weight / total)",
        "average.lerp_(tensors[key], 0.0)",
        TESTS,
    ),
    Mutant(
        "FLoRA: the weight stands on both factors",
        "strategies/rule.py",
        "left = torch.cat([reply.tensors[b] for reply in replies], dim=1)",
        "left = torch.cat([reply.weight / total * reply.tensors[b] for reply in replies], dim=1)",
        TESTS,
    ),
    Mutant(
        "FLoRA, FedEx in FedLLM-Factory: alpha / r is left out",
        "strategies/rule.py",
        "reply.weight / total * reply.scale * reply.tensors[a]",
        "reply.weight / total * reply.tensors[a]",
        TESTS,
    ),
    Mutant(
        "FedEx in FedLLM-Factory: alpha / r is left out of the residual",
        "strategies/fedex_lora.py",
        "state.scale * reply.weight / total",
        "reply.weight / total",
        TESTS,
    ),
    Mutant(
        "FedEx: the residual is added again in every round",
        "common/adapter.py",
        "left, right = torch.cat([offset[q], left], dim=1), torch.cat([offset[p], right], dim=0)",
        "left, right = torch.cat([offset[q], offset[q], left], dim=1), torch.cat([offset[p], offset[p], right], dim=0)",
        TESTS,
    ),
    Mutant(
        "RB-LoRA: V taken for Vh",
        "strategies/flexlora.py",
        "u, singular, vh = low_rank_svd(left, right)",
        "u, singular, vh = low_rank_svd(left, right)\n        vh = vh.flip(1)",
        TESTS,
    ),
    Mutant(
        "FlexLoRA in FedLLM-Factory: the root of the singular values is lost",
        "strategies/flexlora.py",
        "(u * singular)[:, :rank] / scale",
        "(u * singular.sqrt())[:, :rank] / scale",
        TESTS,
    ),
    Mutant(
        "RoLoRA in FedLLM-Factory: A is trained first, while B is zero",
        "strategies/rolora.py",
        '"B" if round % 2 == 0 else "A"',
        '"A" if round % 2 == 0 else "B"',
        TESTS,
    ),
    Mutant(
        "RoLoRA: the frozen factor is sent and averaged too",
        "strategies/rolora.py",
        "Plan(trained=turn, sent=turn)",
        'Plan(trained=turn, sent=frozenset({"A", "B"}))',
        TESTS,
    ),
    Mutant(
        "FedFTG's FFA baseline: every node draws another A",
        "strategies/rule.py",
        "generator = torch.Generator().manual_seed(seed)\n        adapter",
        "generator = torch.Generator()\n        generator.seed()\n        adapter",
        TESTS,
    ),
    Mutant(
        "FFA: A is trained after all",
        "strategies/ffa_lora.py",
        "Plan(trained=B_ONLY, sent=B_ONLY)",
        'Plan(trained=frozenset({"A", "B"}), sent=B_ONLY)',
        TESTS,
    ),
    Mutant(
        "FedRot's hard variant: a reflection is taken for a rotation",
        "strategies/fedrot_lora.py",
        "if torch.linalg.det(u @ vh) < 0:",
        "if False:",
        TESTS,
    ),
    Mutant(
        "LoRA-FAIR: the correction has the wrong sign",
        "strategies/lora_fair.py",
        "(mean_b + correction)",
        "(mean_b - correction)",
        TESTS,
    ),
    Mutant(
        "FedSVD: the singular values stay behind",
        "strategies/fedsvd.py",
        "((q @ u) * singular)",
        "(q @ u)",
        TESTS,
    ),
    Mutant(
        "HetLoRA in public code: keys that do not match are dropped without a word",
        "common/adapter.py",
        "        if keys:\n",
        "        if False:\n",
        TESTS,
    ),
    Mutant(
        "FedAvg: an update of NaN is averaged",
        "strategies/rule.py",
        "if not all_finite(tensor):",
        "if False:",
        TESTS,
    ),
)
