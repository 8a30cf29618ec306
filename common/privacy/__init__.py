"""What a private release costs, the mechanism that noises it, and the ledger of it all."""
