"""Where an adapter is, and its base model: the arguments of every command that loads one."""

import argparse
from pathlib import Path


def add_place(parser: argparse.ArgumentParser) -> None:
    """The arguments that say where an adapter is, and its base model."""
    parser.add_argument("--node", default="", help="the adapter of this node, where a run has one per node")
    parser.add_argument(
        "--state-directory", type=Path, default=None, help="where the nodes keep their state (default ~/.bouquet/state)"
    )
    add_model(parser)


def add_model(parser: argparse.ArgumentParser) -> None:
    """The arguments that say where the base model is, and where it computes."""
    parser.add_argument("--model", default="", help="the base model, if it has moved since the run")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda:0 (default auto)")
