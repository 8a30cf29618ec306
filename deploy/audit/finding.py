"""What one part of an audit found."""

from typing import NamedTuple


class Finding(NamedTuple):
    """Whether a part of the promise held, and what is to be said of it: a line, or several."""

    name: str
    held: bool
    said: str

    def __str__(self) -> str:
        return f"{self.name:10}  {'held' if self.held else 'BROKEN':6}  {self.said}"
