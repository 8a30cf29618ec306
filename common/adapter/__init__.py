"""Adapters as values, and the algebra over them."""
