"""Figures and texts in human-readable form."""


def size(count: float) -> str:
    """Bytes, in powers of 1000, to three digits."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            value = count / factor
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """Seconds, in the largest unit that leaves a few of them."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def figure(value: float) -> str:
    """A measured figure, to four digits where it is not large."""
    return f"{value:,.0f}" if abs(value) >= 9999.5 else f"{value:#.4g}"


def printable(text: str) -> str:
    """What another machine wrote, without anything that steers a terminal or hides in a page; line ends stay."""
    return "".join(sign if sign.isprintable() or sign in "\n\t" else "\N{REPLACEMENT CHARACTER}" for sign in text)
