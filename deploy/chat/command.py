"""The command line of `bouquet chat`, and the conversation."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from common.error import BouquetError
from common.readable import printable
from deploy.place import add_place
from deploy.settings import Commands, add_command

if TYPE_CHECKING:
    from deploy.chat.model import Model

EXAMPLE = """Example: bouquet chat runs/flu
         bouquet chat exports/flu --prompt "What is a fever?" --base
         bouquet chat exports/chest --image 17.png --prompt "Is a lung inflamed?"
Every text is independent, as in training. A classifier answers with the probability of each class; separate two texts
to be compared with a tab. /quit, or the end of the input, ends the chat."""
QUIT = "/quit"


def add_to(commands: Commands) -> None:
    """Add the subcommand."""
    chat = add_command(commands, "chat", help="try an adapter in the terminal", example=EXAMPLE)
    chat.add_argument("source", type=Path, help="a run directory, or an adapter folder")
    chat.add_argument("--prompt", help="answer this text and exit")
    chat.add_argument(
        "--image", type=Path, action="append", default=[], help="an image that the texts are about; may be repeated"
    )
    chat.add_argument("--base", action="store_true", help="let the base model answer too, without the adapter")
    chat.add_argument("--tokens", type=int, default=128, help="the longest answer, in tokens (default 128)")
    chat.add_argument(
        "--temperature", type=float, default=0.0, help="sampling temperature; 0 (default) takes the likeliest token"
    )
    add_place(chat)
    chat.set_defaults(work=_chat)


def _chat(options: argparse.Namespace) -> int:
    if options.tokens < 1 or options.temperature < 0:
        raise BouquetError("an answer that cannot be given", expected="--tokens 1 or more, --temperature 0 or more")
    from common import tasks  # what loads models takes seconds to import
    from deploy import adapters
    from deploy.chat.model import Model

    folder = adapters.find(options.source, options.node, options.state_directory)
    config = adapters.settings(folder, options.model)
    if tasks.classes(config.task) is None:
        raise adapters.no_words(str(options.source))
    model = Model(folder, config, options.device, options.image)
    if options.base:
        model.demand_base()
    console = Console(highlight=False, soft_wrap=True)
    if options.prompt is not None:
        _answer(model, options.prompt, options, console)
        return 0
    console.print(f"{folder}; {QUIT} ends", markup=False)
    for text in _texts(console):
        try:
            _answer(model, text, options, console)
        except BouquetError as error:
            console.print(str(error), markup=False, style="red")
    return 0


def _texts(console: Console) -> Iterator[str]:
    while True:
        try:
            text = console.input("> ").strip(" ")
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if text == QUIT:
            return
        if text:
            yield text


def _answer(model: "Model", text: str, options: argparse.Namespace, console: Console) -> None:
    """Print what the model says to one text."""
    if model.has_head:
        readings = model.readings(text)
        for name, value in readings.items():
            shown = f"{value:6.1%}  {'█' * round(40 * value)}" if model.tells_apart else f"{value:.4g}"
            console.print(f"{printable(name):{max(map(len, readings))}}  {shown}", markup=False)
        return
    for with_adapter in (True, False) if options.base else (True,):
        if options.base:
            console.print("with the adapter:" if with_adapter else "the base model:", style="bold")
        model.stream(text, options.tokens, options.temperature, with_adapter, lambda piece: _show(console, piece))
        console.print()


def _show(console: Console, piece: str) -> None:
    """A piece of an answer, without anything that steers a terminal."""
    console.print(printable(piece), end="", markup=False)
