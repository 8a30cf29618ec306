"""What means, server optimizers and rules of several ranks or thinned changes get wrong."""

from tests.mutants import Mutant
from tests.mutants.rules import TESTS

MERGES = (
    Mutant(
        "FLoRA: the weight stands on both factors",
        "strategies/rules/stack.py",
        "left = torch.cat([reply.tensors[b] for reply in replies], dim=1)",
        "left = torch.cat([s.float() * r.tensors[b] for s, r in zip(shares, replies, strict=True)], dim=1)",
        TESTS,
    ),
    Mutant(
        "FLoRA, FedEx in FedLLM-Factory: alpha / r is left out",
        "strategies/rules/stack.py",
        "(share * r.scale).float()",
        "share.float()",
        TESTS,
    ),
    Mutant(
        "RB-LoRA's FLoRA baseline: the nodes are summed, not averaged",
        "strategies/rules/stack.py",
        "(share * r.scale).float()",
        "torch.full_like(share, r.scale).float()",
        TESTS,
    ),
    Mutant(
        "raFLoRA's rank collapse: nodes without a slot count in it",
        "strategies/rules/raflora.py",
        "held[own] += reply.weight",
        "held += reply.weight",
        TESTS,
    ),
    Mutant(
        "raFLoRA in public code: partitions that no node of the round has are forgotten",
        "strategies/rules/raflora.py",
        "if most < state.rank:",
        "if False:",
        TESTS,
    ),
    Mutant(
        "FLASC: the masked values are lost to the server too",
        "strategies/rules/changes.py",
        "return {key: state.adapter[key] + tensor",
        "return {key: self.view(state, state.rank).adapter[key] + tensor",
        TESTS,
    ),
    Mutant(
        "FSLoRA as released: nothing is sketched",
        "strategies/rules/fslora.py",
        "sorted(random.Random(draw).sample(range(state.rank), rank))",
        "range(rank)",
        TESTS,
    ),
    Mutant(
        "FSLoRA as released: A and B have sets of their own",
        "strategies/rules/fslora.py",
        "tensor.index_select(ALONG[key.part], torch.tensor(slots))",
        "tensor.roll(ALONG[key.part], ALONG[key.part]).index_select(ALONG[key.part], torch.tensor(slots))",
        TESTS,
    ),
    Mutant(
        "FSLoRA: a sketch of the size of its slots, which is biased",
        "strategies/rules/fslora.py",
        "scale=state.scale * state.rank / len(slots), ",
        "",
        TESTS,
    ),
    Mutant(
        "FedSRD as released: the turns begin with A, and the first round is lost",
        "strategies/rules/fedsrd.py",
        '"B" if state.round % 2 == 0 else "A"',
        '"A" if state.round % 2 == 0 else "B"',
        TESTS,
    ),
    Mutant(
        "FedSRD: values are kept by their size alone",
        "strategies/rules/fedsrd.py",
        "change[b].abs() * received.adapter[a].norm(dim=1)",
        "change[b].abs()",
        TESTS,
    ),
    Mutant(
        "FedSRD: what is left is as large as it was, and the mean shrinks",
        "strategies/rules/fedsrd.py",
        "values = values * (change.abs().sum().item() / size)",
        "pass",
        TESTS,
    ),
    Mutant(
        "FedSRD: the excess kurtosis",
        "strategies/rules/fedsrd.py",
        "log(kurtosis(importance))",
        "log(max(kurtosis(importance) - 3, 1.0))",
        TESTS,
    ),
    Mutant(
        "FedSRD as released: B^+ of all that is not zero",
        "strategies/rules/fedsrd.py",
        "torch.linalg.pinv(factors[key], rtol=SMALLEST)",
        "torch.linalg.pinv(factors[key])",
        TESTS,
    ),
)
