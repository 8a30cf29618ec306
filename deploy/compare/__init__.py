"""Rules compared on one task: a profile, its cells, their runs, and what they come to."""
