"""The published mistakes, seeded one by one into a copy of the code: the suite must catch each.

    python -m tests.mutants          (or: make mutants)
    python -m tests.mutants client_app/training.py          those of one file

A mutant is one line of text exchanged for another. The tests that it names run against it and have to fail; one that
survives, or that no longer applies, is printed, and the exit code is 1.
"""

from typing import NamedTuple


class Mutant(NamedTuple):
    """``old`` in ``file`` becomes ``new``, and one of ``tests`` fails; ``bug`` says whose mistake that is."""

    bug: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def seeded(self, source: str) -> str:
        """The file's ``source`` with the mistake in it. Raises :class:`ValueError` if it no longer applies."""
        if source.count(self.old) != 1:
            raise ValueError(f"{self.file} has {source.count(self.old)} places with {self.old!r}, expected 1")
        return source.replace(self.old, self.new)
