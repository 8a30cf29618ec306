"""The adapter that every rule, and every other axis once, leaves after a tiny run: to the bit what it was before.

``python -m tests.laws.test_digests`` writes the digests of the kind of machine that it runs on anew, beside those of
other kinds; a change of them belongs in the changelog.
"""

import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from common.config.run import RunConfig
from strategies import RULES
from tests.support.cells import each
from tests.support.grid import run_in_process

TABLE = Path(__file__).with_name("digests.json")
RECORDS = [{"text": f"def f{n}(self, x{n % 7}): return self.y + {n * n}", "label": n % 2} for n in range(48)]

RUNS: dict[str, dict[str, Any]] = {rule: {"rule.name": rule} for rule in RULES} | {
    "fed-sb, frames found by the nodes": {"rule.name": "fed-sb", "rule.fed-sb.start": "nodes", "num-server-rounds": 3},
    "ravan, without scales": {"rule.name": "ravan", "rule.ravan.scales": 0},
    "hetlora, cutting slots": {"rule.name": "hetlora", "rule.hetlora.keep": 0.5, "rule.hetlora.decay": 100.0},
    "lora-fair, by cosine": {"rule.name": "lora-fair", "rule.lora-fair.solver": "cosine"},
    "fedex-lora, cut": {"rule.name": "fedex-lora", "rule.fedex-lora.residual-rank": 2},
    "flora, energy 0.9": {"rule.name": "flora", "merge.offset-energy": 0.9, "num-server-rounds": 4},
    "trimmed": {"mean.name": "trimmed", "mean.trimmed.share": 0.4},
    "median": {"mean.name": "median"},
    "krum": {"mean.name": "krum"},
    "rank vote": {"mean.name": "rank-vote"},
    "momentum": {"server-optimizer.name": "momentum"},
    "adam": {"server-optimizer.name": "adam"},
    "proximal": {"train.proximal": 0.1},
    "weight decay, linear schedule": {"optimizer.adamw.weight-decay": 0.1, "train.schedule": "linear"},
    "fp16": {"wire.up": "fp16", "wire.down": "fp16"},
    "bf16": {"wire.up": "bf16", "wire.down": "bf16"},
    "int8": {"wire.up": "int8"},
    "nf4": {"wire.up": "nf4"},
    "classify": {"task.name": "classify"},
    "classify, local head": {"task.name": "classify", "task.head": "local"},
    "classify, frozen head": {"task.name": "classify", "task.head": "frozen"},
    "int8 base": {"model.quantization": "int8"},
}


def machine() -> str:
    """What decides the last bits of a float: MKL and oneDNN choose their kernels by a CPU's maker and model, too."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().split("\n\n")[0].splitlines() if cpuinfo.exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    cpu = [facts[name] for name in ("vendor_id", "cpu family", "model") if name in facts]
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} {' '.join(cpu)}, {capability}, torch {torch.__version__.split('+')[0]}"


def digest_of(name: str, folder: Path) -> str:
    """The digest of the adapter that a tiny run of this name leaves."""
    data = folder / "records.jsonl"
    data.write_text("\n".join(map(json.dumps, RECORDS)))
    small = {
        "run-directory": str(folder),
        "run-name": "run",
        "num-server-rounds": 2,
        "data.source": str(data),
        "data.partition": "iid",
        "task.max-length": 32,
        "train.steps": 3,
        "train.batch-size": 4,
        "evaluation.every": 0,
        "evaluation.prompt": "",
    }
    nodes = {number: {"state-directory": str(folder / "state")} for number in range(3)}
    run_in_process(RunConfig().to_flower() | small | RUNS[name], nodes=3, node_config=nodes)
    return str(json.loads((folder / "run/summary.json").read_text())["adapter_digest"])[:16]


ONE_OF_A_KIND = ("fedit", "ravan", "flora", "adam", "int8", "classify, local head")


@pytest.mark.slow
@pytest.mark.parametrize("name", each(RUNS, ONE_OF_A_KIND))
def test_a_tiny_run_ends_where_it_did(name: str, tmp_path: Path) -> None:
    table = json.loads(TABLE.read_text())
    if machine() not in table:
        pytest.skip(f"the digests are those of {', '.join(table)}, and this is {machine()}")
    assert digest_of(name, tmp_path) == table[machine()][name]


def write() -> None:
    """Write the digests of this kind of machine anew."""
    digests = {}
    for name in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            digests[name] = digest_of(name, Path(folder))
        print(name, digests[name], file=sys.stderr)
    table = json.loads(TABLE.read_text()) | {machine(): digests}
    TABLE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    write()
