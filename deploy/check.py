"""`bouquet check`: what a run would read and what the model would learn of it."""

import argparse
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from common.config.node import NodeConfig
from common.config.run import RunConfig
from common.readable import printable
from deploy import settings
from deploy.settings import Commands, add_command
from deploy.settle import settled
from strategies import read_config

if TYPE_CHECKING:
    from common.sources.records import Placed
    from common.tasks import Example, Task

EXAMPLE = """Example: bouquet check --nodes 2 data.source=tickets.csv task.name=classify
Reports for each node how many records it has, which are left out and why, how long they are and how often each label
occurs, and shows an example as the model sees it: what is learned is in colour, or between « and »."""
BARS, STEP, WIDTH = 6, 8, 30
"""Of the picture of lengths: at most so many bars, of so many tokens or a multiple of it; the longest in characters."""
HEAD, TAIL = 120, 80
"""Of an example, how many tokens are shown of its beginning and of its end."""
SAME = 8
"""So many times in a row, and no more, a token is shown each time."""
LEARNED = "bold green"


def add_to(commands: Commands) -> None:
    """Add the subcommand."""
    check = add_command(commands, "check", help="inspect the data of a run before it starts", example=EXAMPLE)
    check.add_argument("--nodes", type=int, default=4, help="simulated nodes (default 4)")
    check.add_argument("settings", nargs="*", metavar="key=value", help="the run config, as for bouquet run")
    check.set_defaults(work=_check)


def _check(options: argparse.Namespace) -> int:
    flat, said = settled(settings.located(settings.read(options.settings)), options.nodes)
    config, console = read_config(flat), Console(highlight=False, soft_wrap=True)
    for line in said:
        console.print(line, markup=False)
    for number in range(options.nodes):
        node = NodeConfig.from_flower({"partition-id": number, "num-partitions": options.nodes})
        for text in _node(config, node, coloured=console.is_terminal and not console.no_color):
            console.print(text, markup=False)
    typed = " ".join(map(shlex.quote, options.settings))
    console.print(f"next: bouquet run --nodes {options.nodes} {typed}".rstrip(), markup=False)
    return 0


def _node(config: RunConfig, node: NodeConfig, *, coloured: bool) -> Iterator[str | Text]:
    """What is said of one node. Raises :class:`BouquetError` with the first of its records that are broken."""
    from common import tasks
    from common.models import base, lengths  # what knows models takes seconds to import
    from common.sources.records import fields

    tokenizer, private = base.load_tokenizer(config.model), config.privacy.on
    found = _records(config, node, private)
    source = config.data.source
    task = lengths.widest(config, source)
    task.check(fields(found), where=source)
    if not private:
        task = lengths.fitted(config.task, config.model, found, tokenizer, source)
    encoded, counts = tasks.encoded(task, found, tokenizer)
    examples = [example for record in encoded for example in record]
    yield f"\n{node.label}: {counts}, {counts.examples:,} examples of at most {counts.length:,} tokens"
    if not examples:
        return
    yield from _histogram([example.length for example in examples])
    yield from _labels(examples, task)
    yield _shown(examples[0], task, tokenizer, coloured)


def _records(config: RunConfig, node: NodeConfig, private: bool) -> "Sequence[Placed]":
    from common.sources import dealing, stable
    from common.sources.records import Placed

    if not private:
        return dealing.node_records(config.data, node, config.seed)
    found = stable.node_records(config.data, node, config.seed)
    return [Placed(f"record {number}", record) for number, record in enumerate(found, start=1)]


def _histogram(lengths: Sequence[int]) -> Iterator[str]:
    """How many examples have how many tokens, in a few bars."""
    step = STEP * -(-max(lengths) // (BARS * STEP))
    bars = Counter((length - 1) // step for length in lengths)
    for bar in range(max(bars) + 1):
        yield _bar(f"{bar * step + 1} to {(bar + 1) * step} tokens", bars[bar], len(lengths))


def _labels(examples: "Sequence[Example]", task: "Task") -> Iterator[str]:
    """How many examples each class has."""
    counts = Counter(label for example in examples for label in task.told(example))
    for name in task.classes:
        yield _bar(printable(name), counts[name], len(examples))


def _bar(name: str, count: int, whole: int) -> str:
    return f"    {name:20} {count:8,}  {'█' * round(WIDTH * count / whole)}".rstrip()


def _shown(example: "Example", task: "Task", tokenizer: Any, coloured: bool) -> Text:
    """An example as the model sees it; what is learned in colour, or between marks."""
    from common.tasks.task import IGNORED  # with torch, which takes seconds to import

    shown = Text("    ")
    for number, text in enumerate(example.texts):
        shown.append(f"\n    {task.beside[number - 1]}:\n    " if number else "")
        # What is learned elsewhere than of a language model's tokens is learned of a text as a whole.
        labels = text.labels if task.language else [IGNORED] * len(text.tokens)
        place = 0
        for own, run in groupby(label >= 0 for label in labels):
            size = len(list(run))
            part = printable(_decoded(text.tokens[place : place + size], tokenizer)).replace("\n", "\n    ")
            place += size
            shown.append(*(_marked(part, coloured) if own else (part, None)))
    if told := task.told(example):
        shown.append(" ").append(*_marked(printable(", ".join(told)), coloured))
    return shown


def _marked(text: str, coloured: bool) -> tuple[str, str | None]:
    return (text, LEARNED) if coloured else (f"«{text}»", None)


def _decoded(tokens: Sequence[int], tokenizer: Any) -> str:
    """The text of tokens; of one that comes many times in a row, as those of an image do, how often it does."""
    runs = [(token, len(list(run))) for token, run in groupby(tokens)]
    said = []
    for often, part in groupby(runs, lambda run: run[1] > SAME):
        if often:
            said += [f"{tokenizer.decode([token])} ({times} times)" for token, times in part]
        else:
            said.append(_ends([token for token, times in part for _ in range(times)], tokenizer))
    return "".join(said)


def _ends(tokens: Sequence[int], tokenizer: Any) -> str:
    """The text of tokens, without its middle where it is long."""
    if len(tokens) <= HEAD + TAIL:
        return str(tokenizer.decode(tokens))
    return f"{tokenizer.decode(tokens[:HEAD])} … {tokenizer.decode(tokens[-TAIL:])}"
