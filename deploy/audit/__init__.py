"""``bouquet audit``: an attempt to break the promise of a private run, on the operator's own data."""
