"""The configs of a run and of a machine: sections of flat keys, their ranges, and every mistake at once."""
