"""``docs/config.md``: every key of the configs, and every choice on the axes."""

import json
from collections.abc import Iterable, Iterator

from common.config.renamed import RENAMED
from deploy.config.catalogue import Entry, node_entries, run_entries, sections, summary
from docs.generate.text import code, paper, prose, table
from strategies import AXES

OPENING = """# Every setting

    bouquet config --explain train.steps       # the same in the terminal: for a key, a section, or everything
    bouquet config profiles/private.toml       # the resolved settings, and what differs from the defaults

Set `key=value` on the command line of `bouquet run`, or pass TOML files of such keys, such as those in
`profiles/`; a key left out has its default. A node's own facts are set with `--node-config`. This page is generated
from the code, by `make generate`."""


def reference(_: str) -> str:
    """The whole page."""
    return "\n\n".join([OPENING, *_run(), *_node(), *_renamed()]) + "\n"


def _run() -> Iterator[str]:
    entries = run_entries()
    for section, about in sections().items():
        yield f"## {code(section) if section else 'The run'}"
        yield prose(about)
        yield _entries(entry for entry in entries if entry.section == section)
        for axis in AXES:
            if axis.section == section:
                rows = ([code(name), prose(summary(kind)), paper(kind.paper)] for name, kind in axis.items())
                yield table([code(f"{section}.name"), "what it does", "paper"], rows)


def _node() -> Iterator[str]:
    yield "## A node"
    yield '`flower-supernode --node-config \'name="ward-3" data="/data/notes.jsonl"\'`, or a kit\'s `node.toml`.'
    yield _entries(node_entries())


def _renamed() -> Iterator[str]:
    yield "## Renamed"
    yield (
        "Every `bouquet` command reads an old name as the new one for two minor versions, and says so. "
        "Flower's own `flwr run` knows only the current names."
    )
    yield table(["was", "is"], ([code(old), ", ".join(map(code, new))] for old, new in RENAMED.items()))


def _entries(entries: Iterable[Entry]) -> str:
    rows = ([code(entry.key), code(json.dumps(entry.default)), entry.range, entry.meaning] for entry in entries)
    return table(["key", "default", "expected", "meaning"], rows)
