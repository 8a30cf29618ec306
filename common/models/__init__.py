"""The frozen base, and the base with its adapter."""
