"""The comparison as one HTML file."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

from server_app.report import page
from server_app.report.page import Html, element


def write(
    file: Path, title: str, about: str, table: Sequence[Sequence[str]], pictures: Mapping[str, Path], note: str
) -> None:
    """Write the page. ``table`` begins with its titles; ``pictures`` are PNG files by what they show."""
    head, *lines = table
    figures = (_figure(caption, picture) for caption, picture in pictures.items())
    rows = page.table(head, lines)
    content = (element("h1", title), element("p", about), rows, element("p", note), *figures)
    file.write_text(page.page(title, *content), encoding="utf-8")


def _figure(caption: str, picture: Path) -> Html:
    source = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
    return page.joined([element("h2", caption), element("figure", element("img", alt=caption, src=source))])
