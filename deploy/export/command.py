"""The command line of `bouquet export`."""

import argparse
from pathlib import Path

from deploy.place import add_place
from deploy.settings import Commands, add_command

EXAMPLE = """Example: bouquet export runs/flu --to exports/flu
         bouquet export runs/flu --to exports/flu-16 --rank 16
         bouquet export runs/flu --to exports/flu-merged --form merged --dtype bf16
         bouquet export runs/flu --to exports/ward-1 --node ward-1
         bouquet export runs/flu --to exports/flu --push my-lab/flu --private
What is written is loaded again and compared with the run's own model; it is deleted if it differs too much."""


def add_to(commands: Commands) -> None:
    """Add the subcommand."""
    export = add_command(
        commands, "export", help="write a run's adapter as a PEFT folder or a merged model, checked", example=EXAMPLE
    )
    export.add_argument("source", type=Path, help="a run directory, or an adapter folder")
    export.add_argument("--to", type=Path, required=True, metavar="DIR", help="the new folder")
    export.add_argument("--form", choices=["peft", "merged"], default="peft", help="an adapter, or a whole model")
    export.add_argument("--rank", type=int, help="truncate the adapter to this rank (default: its full rank)")
    export.add_argument("--dtype", choices=["bf16", "fp16"], help="type of a merged model (default bf16)")
    export.add_argument("--licence", default="", help="licence for the model card (default: the base model's)")
    export.add_argument("--prompt", action="append", default=[], help="a text to compare on; may be repeated")
    export.add_argument("--tolerance", type=float, help="the largest difference, as a share of the adapter's effect")
    export.add_argument("--push", default="", metavar="OWNER/NAME", help="publish it on the hub")
    export.add_argument("--private", action="store_true", help="make the published repository private")
    add_place(export)
    export.set_defaults(work=_export)


def _export(options: argparse.Namespace) -> int:
    from deploy.export.steps import export  # what loads models takes seconds to import

    return export(options)
