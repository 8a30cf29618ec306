"""The comparison as one HTML file: it loads nothing, so that it can be mailed, and opened from disk."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --line: #d0d7de; --soft: #57606a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0d1117; --line: #30363d; --soft: #9198a1; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
       max-width: 70rem; padding: 1.5rem 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
p, figcaption { color: var(--soft); max-width: 46rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; white-space: nowrap; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1rem 0 0; } img { width: 100%; height: auto; background: #fff; border-radius: 4px; }
"""


def write(
    file: Path, title: str, about: str, table: Sequence[Sequence[str]], pictures: Mapping[str, Path], note: str
) -> None:
    """Write the page. ``table`` begins with its titles; ``pictures`` are PNG files by what they show."""
    head, *lines = table
    rows = "\n".join(f"<tr>{_tags('td', line)}</tr>" for line in lines)
    figures = "\n".join(
        f'<h2>{escape(caption)}</h2>\n<figure><img alt="{escape(caption)}" src="{_embedded(picture)}"></figure>'
        for caption, picture in pictures.items()
    )
    file.write_text(
        f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
<h1>{escape(title)}</h1>
<p>{escape(about)}</p>
<div class="wide"><table>
<thead><tr>{_tags("th", head)}</tr></thead>
<tbody>
{rows}
</tbody>
</table></div>
<p>{escape(note)}</p>
{figures}
</html>
""",
        encoding="utf-8",
    )


def _tags(tag: str, texts: Sequence[str]) -> str:
    return "".join(f"<{tag}>{escape(text)}</{tag}>" for text in texts)


def _embedded(picture: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
