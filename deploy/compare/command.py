"""`bouquet compare`: rules side by side on one task, in simulation."""

import argparse
from importlib.util import find_spec
from pathlib import Path

from common.error import BouquetError
from deploy import settings
from deploy.compare.cells import cells
from deploy.compare.profile import find, read
from deploy.compare.report import write
from deploy.compare.runs import Runs
from deploy.settings import Commands, add_command

EXAMPLE = """Example: bouquet compare sst2 --data /data/sst2/train.jsonl.gz --model /models/all-MiniLM-L6-v2
         bouquet compare stdlib train.steps=16 num-server-rounds=3 --output /tmp/steps
A profile says what is compared; profiles/ has some, and docs/comparing.md says how to write one. After an interruption,
the same command resumes: finished runs are kept."""


def add_to(commands: Commands) -> None:
    """Add the subcommand."""
    compare = add_command(commands, "compare", help="compare rules on one task, by simulation", example=EXAMPLE)
    compare.add_argument("profile", help="a TOML file, or the name of one in profiles/")
    over = "directly after the profile: run config that overrides its own, or a TOML file of it"
    compare.add_argument("settings", nargs="*", metavar="key=value", help=over)
    compare.add_argument("--data", help="the examples: the run config's data.source")
    compare.add_argument("--model", help="the base model: the run config's model.name")
    compare.add_argument("--output", type=Path, help="where everything goes (default comparisons/<profile>)")
    compare.add_argument("--quick", action="store_true", help="two rules, one seed, few steps: a smoke test")
    compare.add_argument("--dry-run", action="store_true", help="list the runs and start none")
    compare.add_argument("--cpus", type=int, default=1, help="CPU cores per node (default 1)")
    compare.add_argument("--gpus", type=float, default=0.0, help="share of a GPU per node (default 0)")
    compare.set_defaults(work=_compare)


def _compare(options: argparse.Namespace) -> int:
    _demand_matplotlib()
    path = find(options.profile)
    named = {"data.source": options.data, "model.name": options.model}
    given = {key: place for key, place in named.items() if place is not None}
    over = settings.located(settings.read(options.settings) | given)
    profile = read(path, over)
    output = (options.output or Path("comparisons") / path.stem).resolve()
    chosen = cells(profile, over, options.quick)
    if options.dry_run:
        print("\n".join(f"{cell.name}  ({cell.label})" for cell in chosen))
        return 0
    runs = Runs(output / "runs", profile.nodes, options.cpus, options.gpus)
    failed = runs.run(chosen)
    if results := runs.results(chosen):
        print(f"\n{write(output, path.stem, profile, results)}\n{output / 'compare.html'}")
    if failed:
        print(f"{len(failed)} of {len(chosen)} runs failed; the same command tries them again")
    return 1 if failed else 0


def _demand_matplotlib() -> None:
    """Ask for it before hours of runs, not after them."""
    if find_spec("matplotlib") is None:
        raise BouquetError("the pictures need matplotlib", cure="pip install 'bouquet[report]', then try again.")
