"""Markdown, and the parts of a file that are generated."""

import re
from collections.abc import Iterable, Sequence


def between(text: str, start: str, end: str, body: str) -> str:
    """``text`` with what stands between two markers replaced; the markers stay. Raises ValueError without them."""
    before, found, rest = text.partition(start)
    _, also, after = rest.partition(end)
    if not (found and also):
        raise ValueError(f"no {start!r} with {end!r} after it")
    return f"{before}{start}{body}{end}{after}"


def part(text: str, name: str, body: str) -> str:
    """``text`` with what stands between ``<!-- name -->`` and ``<!-- /name -->`` replaced."""
    return between(text, f"<!-- {name} -->\n", f"\n<!-- /{name} -->", body)


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    cells = [titles, ["---"] * len(titles), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def code(value: str) -> str:
    """A value as code."""
    return f"`{value}`"


def prose(docstring: str) -> str:
    """A docstring as Markdown: what is code is marked once."""
    return docstring.replace("``", "`")


def paper(name: str) -> str:
    """A link to a paper on arXiv; empty where there is none."""
    found = re.fullmatch(r"arXiv:([\d.]+)", name)
    return f"[{name}](https://arxiv.org/abs/{found[1]})" if found else ""
