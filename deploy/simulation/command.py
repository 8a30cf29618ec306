"""The command line of `bouquet run`: the main job as a simulation on this machine."""

import argparse
from pathlib import Path

from common.error import BouquetError
from deploy import settings
from deploy.settings import Commands
from deploy.settle import settled
from deploy.simulation import flower_run
from strategies import Recipe


def add_to(commands: Commands) -> None:
    """Add the subcommand."""
    run = commands.add_parser(
        "run",
        help="run a simulation on this machine and follow it",
        description="Example: bouquet run --nodes 3 rule.name=ffa-lora train.learning-rate=0.01",
    )
    run.add_argument("--nodes", type=int, default=4, help="simulated nodes (default 4)")
    run.add_argument("--cpus", type=int, default=1, help="CPU cores per node (default 1)")
    run.add_argument("--gpus", type=float, default=0.0, help="share of a GPU per node (default 0)")
    run.add_argument("--in-process", action="store_true", help="in one program, without Flower's simulation")
    run.add_argument(
        "--directory", type=Path, default=Path("runs"), help="the folder of run directories (default runs)"
    )
    run.add_argument("settings", nargs="*", metavar="key=value", help="run config, or a TOML file of it")
    run.set_defaults(work=_run)


def _run(options: argparse.Namespace) -> int:
    for name, got, least in (("nodes", options.nodes, 1), ("cpus", options.cpus, 1), ("gpus", options.gpus, 0)):
        if not got >= least:
            raise BouquetError(
                "an option that cannot be used", where=f"--{name}", expected=f"{least} or more", got=f"{got:g}"
            )
    flat, said = settled(settings.located(settings.read(options.settings)), options.nodes)
    for line in said:
        print(line)
    Recipe.read(flat)
    directory = options.directory.resolve()
    if not options.in_process:
        return flower_run.simulate(options.nodes, options.cpus, options.gpus, directory, flat)
    from deploy.simulation import one_program  # what knows Flower's messages takes a second to import
    from deploy.simulation.workers import Workers

    with Workers(options.nodes, options.cpus, options.gpus) as workers:
        return one_program.simulate(workers, options.nodes, directory, flat)
