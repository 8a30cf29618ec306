"""The published aggregation rules, one a file."""
