"""Rules compared on one task: a profile, its cells, their runs, and their results."""
