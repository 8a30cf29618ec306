"""Tries every mutant."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.mutants import Mutant
from tests.mutants.axes import AXES
from tests.mutants.budget import BUDGET
from tests.mutants.edges import EDGES
from tests.mutants.merges import MERGES
from tests.mutants.nodes import NODES
from tests.mutants.privacy import PRIVACY
from tests.mutants.rules import RULES
from tests.mutants.step import STEP
from tests.mutants.structures import STRUCTURED
from tests.mutants.vision import VISION
from tests.support import ROOT

NO_SUCH_TEST = 4
"""pytest's exit code for it."""

MUTANTS = RULES + MERGES + EDGES + AXES + STRUCTURED + NODES + STEP + VISION + PRIVACY + BUDGET


def caught(mutant: Mutant, folder: Path) -> bool:
    """Whether the suite fails on ``mutant``. Raises :class:`ValueError` if the mutant no longer applies."""
    file = folder / mutant.file
    source = file.read_text()
    file.write_text(mutant.seeded(source))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--durations=0", "-p", "no:cacheprovider", *mutant.tests]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    file.write_text(source)
    if run.returncode == NO_SUCH_TEST:
        raise ValueError(f"there are no such tests: {run.stdout}{run.stderr}")
    return run.returncode == 1


def _left_out(folder: str, names: list[str]) -> set[str]:
    """What a copy does without: of the checkout's own folders also what runs have left there."""
    whatever = shutil.ignore_patterns(".*", "__pycache__")(folder, names)
    return whatever | ({"runs", "comparisons"} if Path(folder) == ROOT else set())


def main() -> int:
    """Try every mutant, or those of the files that are named; returns the exit code."""
    survivors = 0
    wanted = [mutant for mutant in MUTANTS if not sys.argv[1:] or mutant.file in sys.argv[1:]]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "copy"
        shutil.copytree(ROOT, folder, ignore=_left_out)
        for mutant in wanted:
            killed = caught(mutant, folder)
            survivors += not killed
            print(f"{'caught  ' if killed else 'SURVIVED'}  {mutant.bug}", flush=True)
    print(f"{len(wanted) - survivors} of {len(wanted)} mutants caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
