"""A short form of ``make fuzz``."""

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_no_message_ends_anything_or_takes_memory_that_it_does_not_hold():
    command = [sys.executable, "-m", "tests.fuzz", "--messages", "2000", "--seed", "1"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    counts = {end: int(count) for end, count in (line.rsplit("  ", 1) for line in finished.stdout.splitlines())}
    assert sum(counts.values()) == 4000
    # Spoilt so little that it is sound after all, and so much that it is not: both have to occur.
    assert all(counts[f"{where}: {end}"] > 50 for where in ("coordinator", "node") for end in ("read", "refused"))
