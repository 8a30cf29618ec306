"""Whose code runs: the bundles that this machine allows, and Flower's task processes that hold to it."""
