"""The budget: what a release costs, the mechanism that noises it, and the ledger that adds it up."""
