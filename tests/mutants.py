"""The published mistakes, seeded one by one into a copy of the code: the suite must catch each.

    python -m tests.mutants          (or: make mutants)

A mutant is one line of text exchanged for another. The unit tests of the rules run against it and have to fail; one
that survives, or that no longer applies, is printed, and the exit code is 1.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
TESTS = (
    "tests/test_oracles_means.py",
    "tests/test_oracles_stacks.py",
    "tests/test_oracles_slots.py",
    "tests/test_oracles_server.py",
    "tests/test_laws.py",
    "tests/test_config.py",
)


class Mutant(NamedTuple):
    """``old`` in ``file`` becomes ``new``; ``bug`` says whose mistake that is."""

    bug: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = TESTS


MUTANTS = (
    Mutant(
        "FLoRA's FedIT baseline: only one node counts",
        "common/adapter.py",
        "average.lerp_(tensors[key], weight / total)",
        "average.lerp_(tensors[key], 0.0)",
    ),
    Mutant(
        "FLoRA: the weight stands on both factors",
        "strategies/stack.py",
        "left = torch.cat([reply.tensors[b] for reply in replies], dim=1)",
        "left = torch.cat([reply.weight / total * reply.tensors[b] for reply in replies], dim=1)",
    ),
    Mutant(
        "FLoRA, FedEx in FedLLM-Factory: alpha / r is left out",
        "strategies/stack.py",
        "reply.weight / total * reply.scale * reply.tensors[a]",
        "reply.weight / total * reply.tensors[a]",
    ),
    Mutant(
        "RB-LoRA's FLoRA baseline: the nodes are summed, not averaged",
        "strategies/stack.py",
        "reply.weight / total * reply.scale * reply.tensors[a]",
        "reply.scale * reply.tensors[a]",
    ),
    Mutant(
        "FLoRA's zero padding: a node of a smaller rank gets another scale",
        "strategies/rule.py",
        "return replace(state, adapter={key: leading(key, tensor, rank) for key, tensor in state.adapter.items()})",
        "return replace(state, scale=state.scale * state.rank / rank, "
        "adapter={key: leading(key, tensor, rank) for key, tensor in state.adapter.items()})",
    ),
    Mutant(
        "FedEx: the residual of a square layer is transposed",
        "strategies/fedex_lora.py",
        'residual[Key(layer, "Q")], residual[Key(layer, "P")] = left, right',
        "left, right = (right.T, left.T) if left.shape[0] == right.shape[1] else (left, right)\n"
        '            residual[Key(layer, "Q")], residual[Key(layer, "P")] = left, right',
    ),
    Mutant(
        "Fed-SB over several rounds: the earlier rounds stay in the mean",
        "strategies/rule.py",
        "        if self.optimizer is not None:\n            return",
        "        mean = {key: (tensor + state.adapter[key]) / 2 for key, tensor in mean.items()}\n"
        "        if self.optimizer is not None:\n            return",
    ),
    Mutant(
        "RAVAN: scales and cores are averaged apart",
        "strategies/ravan.py",
        'sent[key] * local[Key(layer, "s")].repeat_interleave(sent[key].shape[1])[:, None]',
        "sent[key]",
    ),
    Mutant(
        "HetLoRA: the weights are those of the examples",
        "strategies/hetlora.py",
        "total[layer] += norm",
        "norm = update.weight\n                total[layer] += norm",
    ),
    Mutant(
        "HetLoRA: slots from the middle are cut",
        "strategies/hetlora.py",
        "leading(key, tensor, rank) for key, tensor in super()",
        "leading(key, tensor.flip(0 if key.part == 'A' else -1), rank) for key, tensor in super()",
    ),
    Mutant(
        "Fed-PLoRA: slots that nobody trained are diluted",
        "strategies/fed_plora.py",
        "share = update.weight / total[slots]",
        "share = update.weight / (total[slots] + 1)",
    ),
    Mutant(
        "FLASC: the masked values are lost to the server too",
        "strategies/flasc.py",
        "target = {key: state.adapter[key] + tensor",
        "target = {key: self.view(state, state.rank).adapter[key] + tensor",
    ),
    Mutant(
        "FLASC: one threshold a layer",
        "strategies/flasc.py",
        "return {**change, **largest(change, self.up)}",
        "return {**change, **{k: v for key in change for k, v in largest({key: change[key]}, self.up).items()}}",
    ),
    Mutant(
        "LEGO: a slot and its mirror image cancel",
        "strategies/lora_lego.py",
        "squares - 2 * products.abs()",
        "squares - 2 * products",
    ),
    Mutant(
        "LEGO as task arithmetic: the nodes are summed, not averaged",
        "strategies/lora_lego.py",
        "root = mass[order].sqrt()[:, None]",
        "root = torch.ones_like(mass[order])[:, None]",
    ),
    Mutant(
        "FedEx in FedLLM-Factory: alpha / r is left out of the residual",
        "strategies/fedex_lora.py",
        "state.scale * reply.weight / total",
        "reply.weight / total",
    ),
    Mutant(
        "FedEx: the residual is added again in every round",
        "common/adapter.py",
        "left, right = torch.cat([offset[q], left], dim=1), torch.cat([offset[p], right], dim=0)",
        "left, right = torch.cat([offset[q], offset[q], left], dim=1), torch.cat([offset[p], offset[p], right], dim=0)",
    ),
    Mutant(
        "RB-LoRA: V taken for Vh",
        "strategies/flexlora.py",
        "u, singular, vh = low_rank_svd(left, right)",
        "u, singular, vh = low_rank_svd(left, right)\n        vh = vh.flip(1)",
    ),
    Mutant(
        "FlexLoRA in FedLLM-Factory: the root of the singular values is lost",
        "strategies/flexlora.py",
        "(u * singular)[:, :rank] / scale",
        "(u * singular.sqrt())[:, :rank] / scale",
    ),
    Mutant(
        "RoLoRA in FedLLM-Factory: A is trained first, while B is zero",
        "strategies/rolora.py",
        '"B" if round % 2 == 0 else "A"',
        '"A" if round % 2 == 0 else "B"',
    ),
    Mutant(
        "RoLoRA: the frozen factor is sent and averaged too",
        "strategies/rolora.py",
        "Plan(trained=turn, sent=turn)",
        'Plan(trained=turn, sent=frozenset({"A", "B"}))',
    ),
    Mutant(
        "FedFTG's FFA baseline: every node draws another A",
        "strategies/rule.py",
        "generator = torch.Generator().manual_seed(seed)\n        adapter",
        "generator = torch.Generator()\n        generator.seed()\n        adapter",
    ),
    Mutant(
        "FFA: A is trained after all",
        "strategies/ffa_lora.py",
        "Plan(trained=B_ONLY, sent=B_ONLY)",
        'Plan(trained=frozenset({"A", "B"}), sent=B_ONLY)',
    ),
    Mutant(
        "FedRot's hard variant: a reflection is taken for a rotation",
        "strategies/fedrot_lora.py",
        "if torch.linalg.det(u @ vh) < 0:",
        "if False:",
    ),
    Mutant(
        "LoRA-FAIR: the correction has the wrong sign",
        "strategies/lora_fair.py",
        "(mean_b + correction)",
        "(mean_b - correction)",
    ),
    Mutant(
        "FedSVD: the singular values stay behind",
        "strategies/fedsvd.py",
        "((q @ u) * singular)",
        "(q @ u)",
    ),
    Mutant(
        "HetLoRA in public code: keys that do not match are dropped without a word",
        "common/adapter.py",
        "        if keys:\n",
        "        if False:\n",
    ),
    Mutant(
        "FedAvg: an update of NaN is averaged",
        "strategies/rule.py",
        "if not all_finite(tensor):",
        "if False:",
    ),
)


def caught(mutant: Mutant, folder: Path) -> bool:
    """Whether the suite fails on ``mutant``. Raises :class:`ValueError` if the mutant no longer applies."""
    file = folder / mutant.file
    source = file.read_text()
    if source.count(mutant.old) != 1:
        raise ValueError(f"{mutant.file} has {source.count(mutant.old)} places with {mutant.old!r}, expected 1")
    file.write_text(source.replace(mutant.old, mutant.new))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--durations=0", "-p", "no:cacheprovider", *mutant.tests]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    file.write_text(source)
    return run.returncode == 1


def main() -> int:
    """Try every mutant; returns the exit code."""
    survivors = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "copy"
        ignored = shutil.ignore_patterns(".*", "__pycache__", "runs")
        shutil.copytree(ROOT, folder, ignore=ignored)
        for mutant in MUTANTS:
            killed = caught(mutant, folder)
            survivors += not killed
            print(f"{'caught  ' if killed else 'SURVIVED'}  {mutant.bug}", flush=True)
    print(f"{len(MUTANTS) - survivors} of {len(MUTANTS)} mutants caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
