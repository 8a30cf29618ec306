"""What a run leaves on disk: written by one, read by many."""
