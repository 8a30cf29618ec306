"""An HTML page that loads nothing: it can be mailed, and opened from disk.

Text becomes HTML in :func:`element` alone, which escapes whatever is not :class:`Html` already.
"""

from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --paper: #fff; --line: #d8dee4; --shade: #f6f8fa;
        --more: #0003; --accent: #0072b2; --warn: #b54708; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9198a1; --paper: #0d1117; --line: #2f363d; --shade: #161b22;
          --more: #fff2; --accent: #56b4e9; --warn: #f0a35e; }
}
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; color: var(--ink);
       background: var(--paper); margin: 0 auto; max-width: 70rem; padding: 2rem 1.25rem 4rem;
       -webkit-text-size-adjust: 100%; }
h1 { font-size: 1.6rem; line-height: 1.25; letter-spacing: -.01em; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 3rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: .95rem; margin: 1.25rem 0 .25rem; }
p, figcaption { color: var(--soft); max-width: 46rem; margin: .25rem 0 .75rem; }
.wide { overflow-x: auto; background: linear-gradient(to left, var(--paper) 40%, transparent) right / 2.5rem 100%
        no-repeat local, linear-gradient(to left, var(--more), transparent) right / .5rem 100% no-repeat scroll; }
.wide + .wide { margin-top: 1.25rem; } .wide + p { margin-top: .75rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; white-space: nowrap; }
th { font-weight: 600; color: var(--soft); vertical-align: bottom; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
tbody tr:last-child td { border-bottom: 0; }
figure { margin: 1rem 0 0; } img { width: 100%; height: auto; background: #fff; border-radius: 4px; }
"""

Row = Sequence[str]

NOTHING = "-"
"""What stands where there is no figure."""


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def element(tag: str, *content: str, **attributes: object) -> Html:
    """One element; a trailing underscore of an attribute's name is left out, one inside it is a hyphen."""
    named = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(str(value))}"' for name, value in attributes.items()
    )
    return Html(f"<{tag}{named}>" if tag == "img" else f"<{tag}{named}>{joined(content)}</{tag}>")


def joined(content: Iterable[str]) -> Html:
    """Pieces one after another; those that are not HTML are escaped."""
    return Html("".join(piece if isinstance(piece, Html) else escape(piece) for piece in content))


def table(head: Row, rows: Iterable[Row], kind: str = "") -> Html:
    """A table that scrolls by itself where it is too wide for the page; figures are to the right."""
    titles = element("tr", *(element("th", title, scope="col") for title in head))
    lines = (element("tr", *(element("td", cell) for cell in row)) for row in rows)
    body = element("table", element("thead", titles), element("tbody", *lines))
    return element("div", body, class_=f"wide {kind}".strip())


def section(heading: str, *content: str) -> Html:
    """A part of a page, under its heading."""
    return element("section", element("h2", heading), *content)


def page(title: str, *content: str, style: str = "") -> str:
    """The whole page. Its own policy forbids scripts, and anything that would have to be fetched."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}{style}</style>
</head>
<body>
{joined(content)}
</body>
</html>
"""
