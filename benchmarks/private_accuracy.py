"""What privacy costs in accuracy: FedIT, FFA-LoRA, FedSVD and Fed-SB at epsilon 1, 3, 6 and without, on two tasks.

    python -m benchmarks.private_accuracy --data /data --model /models/all-MiniLM-L6-v2 --tasks sst2

``--data`` holds a folder a task with ``train.jsonl.gz`` and ``validation.jsonl.gz``. Table and pictures go to
``comparisons/private-<task>/``; broken off, the same command goes on. The profiles are
``profiles/private_<task>.toml``.
"""

import argparse
import sys
from pathlib import Path

from deploy.command import main as bouquet

TASKS = ("sst2", "qnli")


def main() -> int:
    """Compare on each task; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the tasks")
    parser.add_argument("--model", required=True, help="a Transformers folder, or a hub id")
    parser.add_argument("--tasks", nargs="*", default=TASKS, choices=TASKS, help="default: both")
    parser.add_argument("--quick", action="store_true", help="does it run at all?")
    options = parser.parse_args()
    codes = []
    for task in options.tasks:
        folder = options.data.resolve() / task
        scored = f"evaluation.source={folder / 'validation.jsonl.gz'}"
        where = ["--data", str(folder / "train.jsonl.gz"), "--model", options.model]
        output = ["--output", f"comparisons/private-{task}"]
        quick = ["--quick"] if options.quick else []
        codes.append(bouquet(["compare", f"private_{task}", scored, *where, *output, *quick]))
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
