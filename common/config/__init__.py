"""What a run and a machine are told: sections of flat keys, their ranges, and every mistake at once."""
