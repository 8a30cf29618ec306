"""Units as a person reads them."""


def size(count: float) -> str:
    """Bytes, in powers of 1000."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count / 1e3:.1f} kB" if count >= 1e3 else f"{count:.0f} B"


def duration(seconds: float) -> str:
    """Seconds, in the largest unit of which there are a few."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def figure(value: float) -> str:
    """A measured figure to four digits."""
    return f"{value:.4g}"
